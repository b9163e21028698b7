"""Manual pages and docs/tools are made from the same text as --help, and say all of the JSON."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from tidegate.kernel.sock_diag import ListenSocket
from tidegate.kernel.tracing import Ages, Counts
from tidegate_tools import ages_view, manual, trace_view
from tidegate_tools.ages_view import Selection
from tidegate_tools.owners import Owner, Owners
from tidegate_tools.queues import Queue, Source, Waiter
from tidegate_tools.snapshot import Snapshot
from tidegate_tools.trace_view import Sample

DOCS = Path(__file__).resolve().parents[3] / "docs" / "tools"
VERBS = manual.verbs()


@pytest.mark.parametrize("name", VERBS)
def test_the_page_says_what_help_says(name: str) -> None:
    path = DOCS / f"{name}.md"
    assert path.exists(), "python -m tidegate_tools.manual docs docs/tools"
    page = path.read_text()
    assert manual.updated(page, name, VERBS[name]) == page, "python -m tidegate_tools.manual docs docs/tools"


def test_the_list_names_every_page() -> None:
    listed = set(re.findall(r"\(tools/(\w+)\.md\)", (DOCS.parent / "tools.md").read_text()))
    assert listed == {path.stem for path in DOCS.glob("*.md")}


@pytest.mark.parametrize("name", ["", *VERBS])
def test_man_pages_have_no_fault(name: str, tmp_path: Path) -> None:
    command = VERBS[name] if name else manual.group
    page = manual.man(name, command)
    assert page.startswith('.TH "TIDEGATE')
    if shutil.which("groff") is None:
        return  # its own check below is all that needs it
    done = subprocess.run(
        ["groff", "-man", "-ww", "-z", "-Tutf8"], input=page, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


@pytest.mark.parametrize("name", VERBS)
def test_help_fits_eighty_columns(name: str) -> None:
    result = CliRunner().invoke(manual.group, [name, "--help"])
    assert result.exit_code == 0
    # click formats for 80 here, and for two columns less on a real terminal
    assert [line for line in result.output.splitlines() if len(line) > 80] == []


def keys(value: object) -> set[str]:
    if isinstance(value, dict):
        return set(value) | {key for below in value.values() for key in keys(below)}
    if isinstance(value, list):
        return {key for below in value for key in keys(below)}
    return set()


def said(name: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", (DOCS / f"{name}.md").read_text()))


def test_every_field_of_ages_is_described() -> None:
    one = ListenSocket(socket.AF_INET, "127.0.0.1", 80, 0, 1, 128, 0, 1, 1, 1, False, 0)
    waiter = Waiter("c:1", "127.0.0.1:80", 1, 1, Source.STAMP, 0, False, False, 1)
    queue = Queue("127.0.0.1:80", "127.0.0.1", 80, 0, "", [one], [waiter])
    served = {
        "name": "web", "address": "127.0.0.1:80", "accepted": 1, "dropped": {},
        "age_histogram": {"count": 1, "sum_ns": 1, "max_ns": 1, "buckets": [1] + [0] * 39},
    }  # fmt: skip
    status = {"pid": 1, "version": "1", "queue_age": "bpf", "listeners": [served]}
    view = ages_view.build(
        Snapshot([queue], 1), Owners({1: Owner(1, "x", (1,))}), status, Selection(connections=1)
    )
    assert keys(ages_view.as_json(view)) <= said("ages")


def test_every_field_of_trace_is_described() -> None:
    ages = Ages(0, 0, 0, (0,) * 40)
    sample = Sample(0, Counts(0, 0, 0, 0), ages, 0, 0, 0, None)
    interval = trace_view.interval_json(trace_view.between(sample, sample))
    summary = trace_view.summary_json(trace_view.summarize("/c", sample, sample, 0, []))
    assert keys(interval) | keys(summary) <= said("trace")


def test_a_page_keeps_what_stands_around_the_generated_part() -> None:
    page = manual.updated(None, "ages", VERBS["ages"]) + "\n## By hand\n"
    assert manual.updated(page, "ages", VERBS["ages"]) == page
    with pytest.raises(ValueError, match="markers"):
        manual.updated("# lost\n", "ages", VERBS["ages"])
