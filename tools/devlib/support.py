"""What kernels can do, from runs: judged against what they must, kept as JSON, rendered into the docs."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from devlib.common import ROOT
from devlib.qemu import Outcome

DATA = ROOT / "docs/kernels.json"
PAGE = ROOT / "docs/kernels.md"
_BEGIN, _END = "<!-- table: written by tools/dev vm-test --table -->", "<!-- end of table -->"


@dataclass(frozen=True, slots=True)
class Run:
    """One kernel's run: `features` as its doctor reported them, `faults` why it failed (none: it passed)."""

    name: str
    release: str
    features: list[dict[str, Any]]
    faults: list[str]
    booted_s: float
    total_s: float

    def abilities(self) -> str:
        """Its features in one line, those it lacks with how that showed."""
        have = [each["feature"] for each in self.features if each["works"]]
        lack = [f"{each['feature']} ({each['reason']})" for each in self.features if not each["works"]]
        return f"has {', '.join(have) or 'nothing'}" + (f"; lacks {', '.join(lack)}" if lack else "")

    @property
    def passed(self) -> bool:
        return not self.faults

    def line(self) -> str:
        how = "passed" if self.passed else f"FAILED: {'; '.join(self.faults)}"
        kernel = self.release or f"{self.name} (did not come up)"
        return f"{kernel}: {how} (up after {self.booted_s:.0f} s, {self.total_s:.0f} s in all)"


def judge(name: str, outcome: Outcome) -> Run:
    """Passed: the guest's tests did, and the kernel has every feature that kernels of its age must have."""
    found = outcome.result
    if found is None:
        return Run(name, "", [], ["the guest gave no result"], outcome.booted_s, outcome.total_s)
    faults = []
    if found["status"] != 0:
        faults.append(f"the tests ended with status {found['status']}")
    doctor = found.get("doctor") or {}
    features = doctor.get("features", [])
    if not features:
        faults.append("the guest's doctor did not report")
    faults += [
        f"{feature['feature']} must work there and does not: {feature['reason']}"
        for feature in features
        if feature["required"] and not feature["works"]
    ]
    return Run(name, found["kernel"], features, faults, outcome.booted_s, outcome.total_s)


def write(runs: list[Run]) -> None:
    """Puts runs that reported into the data, over what was known of those kernels, and renders the page."""
    known: dict[str, Any] = json.loads(DATA.read_text()) if DATA.exists() else {}
    for run in runs:
        if run.features:
            known[run.name] = {
                "release": run.release,
                "features": {
                    each["feature"]: {"works": each["works"], "reason": each["reason"]}
                    for each in run.features
                },
            }
    DATA.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
    PAGE.write_text(place(PAGE.read_text(), table(known)))


def table(known: dict[str, Any]) -> str:
    """Markdown: a column for each kernel, a row for each feature, how an absence showed as a footnote."""
    kernels = sorted(known, key=_order)
    rows = [["feature", *(known[kernel]["release"] for kernel in kernels)]]
    rows.append(["---"] * len(rows[0]))
    notes: list[str] = []
    names: list[str] = []
    for kernel in kernels:
        names += [name for name in known[kernel]["features"] if name not in names]
    for name in names:
        cells = [f"`{name}`"]
        for kernel in kernels:
            seen = known[kernel]["features"].get(name)
            if seen is None:
                cells.append("not tried")
            elif seen["works"]:
                cells.append("yes")
            else:
                if seen["reason"] not in notes:
                    notes.append(seen["reason"])
                cells.append(f"no ({notes.index(seen['reason']) + 1})")
        rows.append(cells)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    if notes:
        lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(notes, 1))]
    return "\n".join(lines)


def _order(kernel: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", kernel)]


def place(page: str, text: str) -> str:
    """The page with `text` between its two marks.

    Raises:
        ValueError: the marks are not there.
    """
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"{PAGE} has lost the marks of its table")
    return f"{before}{_BEGIN}\n\n{text}\n\n{_END}{after}"
