"""The list of metrics: conventions, layouts, no double meaning."""

from __future__ import annotations

import re

import pytest

from tidegate.metrics import names
from tidegate.metrics.histogram import HISTOGRAM_WORDS
from tidegate.metrics.names import METRICS, VALUE_DOCS, Kind, Layout, Metric, Scope, layout

every_metric = pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)


@every_metric
def test_names_follow_the_conventions(metric: Metric) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", metric.name)
    assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER)
    assert not re.search(r"_(count|sum|bucket|seconds|ms|milliseconds|kb)(_total)?$", metric.name)
    assert metric.kind is not Kind.HISTOGRAM or metric.nanoseconds
    assert metric.exposed_name.startswith("tidegate_")
    assert "_ns" not in metric.exposed_name
    assert metric.exposed_name.removesuffix("_total").endswith("_seconds") == metric.nanoseconds


@every_metric
def test_help_is_one_sentence(metric: Metric) -> None:
    assert re.fullmatch(r"[A-Z][^\n]*\.", metric.help)


def test_names_are_unique_exposed_or_not() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    families = [metric.exposed_name.removesuffix("_total") for metric in METRICS]
    assert sorted(set(families)) == sorted(families)


@every_metric
def test_labels_have_closed_lists_of_documented_values(metric: Metric) -> None:
    assert bool(metric.label) == bool(metric.values) == (metric.name in VALUE_DOCS)
    if metric.label:
        assert metric.label not in (*metric.scope.label_names, "worker", "le")
        assert metric.values == tuple(value.value for value in VALUE_DOCS[metric.name])


@pytest.mark.parametrize("value", [value for kind in VALUE_DOCS.values() for value in kind])
def test_label_values_and_their_lines(value: names.Documented) -> None:
    assert re.fullmatch(r"[a-z][a-z_]*", value.value)
    assert value.name == value.value.upper()
    assert re.fullmatch(r"[A-Z][^\n|]*\.", value.doc)


@pytest.mark.parametrize("scope", Scope)
def test_every_word_of_a_layout_belongs_to_one_series(scope: Scope) -> None:
    at = layout(scope)
    taken: list[int] = []
    for metric in METRICS:
        if metric.scope is scope:
            for value in metric.values or ("",):
                first = at.index(metric.name, value)
                taken += range(first, first + (HISTOGRAM_WORDS if metric.kind is Kind.HISTOGRAM else 1))
    assert sorted(taken) == list(range(at.words))


def test_index_knows_the_list_and_nothing_else() -> None:
    listener = layout(Scope.LISTENER)
    assert listener.index("dropped_total", "stale") != listener.index("dropped_total", "queue_full")
    assert listener.index("dropped_total", names.DropReason.STALE) == listener.index("dropped_total", "stale")
    for unknown in (
        ("drops_total", ""),
        ("dropped_total", ""),
        ("dropped_total", "bored"),
        ("accepted_total", "x"),
    ):
        with pytest.raises(KeyError):
            listener.index(*unknown)


def test_a_metric_listed_twice_is_refused() -> None:
    metric = Metric("x_total", Scope.WORKER, Kind.COUNTER, "X.")
    with pytest.raises(ValueError, match="twice"):
        Layout(Scope.WORKER, [metric, metric])


def test_the_fingerprint_tells_lists_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    before = names.fingerprint()
    assert before == names.fingerprint() < 1 << 64
    monkeypatch.setattr(names, "METRICS", METRICS[1:])
    assert names.fingerprint() != before
    monkeypatch.setattr(names, "METRICS", (METRICS[1], METRICS[0], *METRICS[2:]))
    assert names.fingerprint() != before
