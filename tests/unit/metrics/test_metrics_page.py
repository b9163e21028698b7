"""docs/metrics.md and the list of metrics say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tidegate.metrics.names import METRICS, VALUE_DOCS
from tidegate.metrics.reference import replace_tables
from tidegate.metrics.statsd import name_of

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text("utf-8")


def rows_under(page: str, heading: str) -> dict[str, str]:
    section = page.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return dict(re.findall(r"^\| `(\w+)` \| (?:.* \| )?(.*) \|$", section, re.MULTILINE))


def test_the_tables_are_those_made_from_the_list(page: str) -> None:
    assert replace_tables(page) == page, "run python -m tidegate.metrics.reference docs/metrics.md"


def test_every_metric_has_its_line_and_every_line_its_metric(page: str) -> None:
    lines = dict(re.findall(r"^\| `(tidegate_\w+)` \| \w+ \| .*\| (.*) \|$", page, re.MULTILINE))
    assert lines == {metric.exposed_name: metric.help for metric in METRICS}


def test_every_label_value_has_its_line_and_every_line_its_value(page: str) -> None:
    for metric in METRICS:
        if metric.label:
            lines = rows_under(page, f"`{metric.exposed_name}`: `{metric.label}`")
            assert lines == {value.value: value.doc for value in VALUE_DOCS[metric.name]}


def test_the_prose_names_only_what_is_listed(page: str) -> None:
    exposed = {metric.exposed_name for metric in METRICS}
    named = {
        re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\btidegate_[a-z_]*[a-z]", page)
    }
    assert named <= exposed
    prose = {metric.removeprefix("tidegate_") for metric in exposed}
    prose |= {name_of(metric) for metric in METRICS}  # as StatsD has it
    assert set(re.findall(r"\b[a-z_]+_total\b", page.split("<!--", 1)[0])) <= prose
    values = {value.value for kind in VALUE_DOCS.values() for value in kind}
    assert "worker_died" in values  # the prose relies on it


def test_a_page_without_its_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks"):
        replace_tables("# Metrics\n")
