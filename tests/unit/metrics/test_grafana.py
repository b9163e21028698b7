"""The dashboard and the alert rules ask only for series that exist, with labels and values that they have."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tidegate.metrics.names import METRICS, Kind, Scope

FOLDER = Path(__file__).parents[3] / "docs" / "grafana"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
RULES = (FOLDER / "alerts.yml").read_text()
# what Prometheus itself adds to every series
ADDED = {"instance", "job"}


def series() -> dict[str, dict[str, tuple[str, ...]]]:
    """Every series that is exposed: its labels, and their values where the list is closed."""
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for metric in METRICS:
        labels: dict[str, tuple[str, ...]] = dict.fromkeys(metric.scope.label_names, ())
        if metric.scope is Scope.WORKER:
            labels["worker"] = ()
        if metric.label:
            labels[metric.label] = metric.values
        if metric.kind is Kind.HISTOGRAM:
            found[f"{metric.exposed_name}_bucket"] = labels | {"le": ()}
            found[f"{metric.exposed_name}_sum"] = found[f"{metric.exposed_name}_count"] = labels
        else:
            found[metric.exposed_name] = labels
    return found


def dashboard_queries() -> list[str]:
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    return queries + [
        one["query"]["query"] for one in DASHBOARD["templating"]["list"] if one["type"] == "query"
    ]


def rule_queries() -> list[str]:
    return re.findall(r"^ +expr: (.+)$", RULES, re.MULTILINE)


@pytest.mark.parametrize("query", [*dashboard_queries(), *rule_queries()])
def test_a_query_names_what_there_is(query: str) -> None:
    known = series()
    used = re.findall(r"(tidegate_\w+)(?:\{(.*?)\})?", query)
    assert used
    for name, selector in used:
        assert name in known
        for label, value in re.findall(r'(\w+)=~?"(.*?)"', selector):
            assert label in known[name].keys() | ADDED, f"{name} has no label {label}"
            if known[name].get(label):
                assert value in known[name][label], f"{name} never has {label}={value}"
    for group in re.findall(r"by \((.*?)\)", query):
        for label in re.split(r",\s*", group):
            assert any(label in known[name].keys() | ADDED for name, _ in used), f"nothing has {label}"
    assert query.count("(") == query.count(")")


def test_a_counter_is_never_shown_bare() -> None:
    counters = {m.exposed_name for m in METRICS if m.kind is Kind.COUNTER}
    for query in [*dashboard_queries(), *rule_queries()]:
        for name in counters:
            for at in re.finditer(rf"{name}\b", query):
                before = query[: at.start()]
                assert before.endswith(("rate(", "increase(", "label_values(")), query


def test_the_queue_age_comes_first() -> None:
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert "tidegate_queue_age_seconds_bucket" in panels[0]["targets"][0]["expr"]


def test_panels_do_not_overlap_and_have_numbers_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at: dict[str, Any] = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)


def test_every_rule_says_what_it_means() -> None:
    rules = RULES.split("- alert: ")[1:]
    assert len(rules) >= 8
    for rule in rules:
        assert "severity:" in rule
        assert "summary:" in rule
