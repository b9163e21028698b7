"""The tables of docs/metrics.md, made from the list itself.

`python -m tidegate.metrics.reference docs/metrics.md` writes them anew between the two markers; a test
fails while the page and the list differ.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from tidegate.metrics.names import METRICS, VALUE_DOCS, Scope

BEGIN: Final = "<!-- made from userspace/tidegate/metrics/names.py: begin -->"
END: Final = "<!-- end -->"

_SCOPES: Final = {
    Scope.LISTENER: "Per listener (label `listener`)",
    Scope.BACKEND: "Per backend (labels `cluster`, `backend`)",
    Scope.WORKER: "Per worker (label `worker`)",
    Scope.PROCESS: "Of the whole",
}


def tables() -> str:
    """Every metric by scope, then every closed list of label values."""
    lines: list[str] = []
    for scope, title in _SCOPES.items():
        lines += [f"## {title}", "", "| metric | type | label | meaning |", "|---|---|---|---|"]
        for metric in METRICS:
            if metric.scope is scope:
                label = (
                    f"[`{metric.label}`](#{_anchor(metric.exposed_name, metric.label)})"
                    if metric.label
                    else ""
                )
                lines.append(f"| `{metric.exposed_name}` | {metric.kind} | {label} | {metric.help} |")
        lines.append("")
    for metric in METRICS:
        if metric.label:
            lines += [f"## `{metric.exposed_name}`: `{metric.label}`", ""]
            lines += [f"| {metric.label} | meaning |", "|---|---|"]
            lines += [f"| `{reason.value}` | {reason.doc} |" for reason in VALUE_DOCS[metric.name]]
            lines.append("")
    return "\n".join(lines)


def _anchor(name: str, label: str) -> str:
    return f"{name}-{label}"


def replace_tables(page: str) -> str:
    """The page with the tables between its markers made anew. Raises ValueError when a marker is missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks {BEGIN!r} or {END!r}")
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(replace_tables(path.read_text("utf-8")), "utf-8")
