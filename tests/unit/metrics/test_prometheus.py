"""The exposition, read back by prometheus_client's own parser."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

from tidegate.metrics.names import LISTENER, METRICS, Kind, Scope, layout
from tidegate.metrics.prometheus import render, seconds
from tidegate.metrics.segment import SUPERVISOR, RowKey, Segment
from tidegate.metrics.totals import totals

AGE = LISTENER.index("queue_age_ns")


def parsed(text: str) -> dict[str, Family]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def exposition(segment: Segment) -> str:
    text = render(totals(segment.snapshot()))
    segment.close()
    return text


def filled() -> Segment:
    """Every word of every scope has a value of its own, as far as histograms allow."""
    segment = Segment.sized_for(dict.fromkeys(Scope, 2))
    keys = [
        RowKey(Scope.LISTENER, 0, ("web",)),
        RowKey(Scope.LISTENER, 1, ("web",)),
        RowKey(Scope.WORKER, 0),
        RowKey(Scope.WORKER, 1),
        RowKey(Scope.BACKEND, 0, ("app", "127.0.0.1:9000")),
        RowKey(Scope.PROCESS, SUPERVISOR),
    ]
    for key in keys:
        row, at = segment.row(key), layout(key.scope)
        for metric in at.metrics:
            for value in metric.values or ("",):
                index = at.index(metric.name, value)
                if metric.kind is Kind.HISTOGRAM:
                    for exponent in range(45):
                        row.observe(index, 2**exponent)
                else:
                    row.words[index] = 1000 + index
    return segment


def test_every_metric_of_the_list_is_exposed_and_nothing_else() -> None:
    families = parsed(exposition(filled()))
    # the parser takes _total off the names of counters
    assert set(families) == {metric.exposed_name.removesuffix("_total") for metric in METRICS}
    for metric in METRICS:
        family = families[metric.exposed_name.removesuffix("_total")]
        assert family.type == metric.kind.value
        assert family.documentation == metric.help
        if metric.label:
            assert {sample.labels[metric.label] for sample in family.samples} == set(metric.values)


def test_values_and_labels_are_those_of_the_rows() -> None:
    families = parsed(exposition(filled()))
    for metric in METRICS:
        if metric.kind is Kind.HISTOGRAM:
            continue
        samples = families[metric.exposed_name.removesuffix("_total")].samples
        workers = {Scope.LISTENER: 2, Scope.WORKER: 1}.get(metric.scope, 1)
        for sample in samples:
            labels = dict(sample.labels)
            value = labels.pop(metric.label) if metric.label else ""
            word = workers * (1000 + layout(metric.scope).index(metric.name, value))
            assert sample.value == pytest.approx(word / 1e9 if metric.nanoseconds else word)
            expected = {
                Scope.LISTENER: [{"listener": "web"}],
                Scope.BACKEND: [{"cluster": "app", "backend": "127.0.0.1:9000"}],
                Scope.WORKER: [{"worker": "0"}, {"worker": "1"}],
                Scope.PROCESS: [{}],
            }[metric.scope]
            assert labels in expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**42), max_size=60))
def test_histograms_are_cumulative_complete_and_in_seconds(values: list[int]) -> None:
    segment = Segment.sized_for({Scope.LISTENER: 1})
    row = segment.row(RowKey(Scope.LISTENER, 0, ("web",)))
    for value in values:
        row.observe(AGE, value)
    family = parsed(exposition(segment))["tidegate_queue_age_seconds"]
    by_name: dict[str, list[tuple[dict[str, str], float]]] = {}
    for sample in family.samples:
        by_name.setdefault(sample.name, []).append((sample.labels, sample.value))
    ((_, total),) = by_name["tidegate_queue_age_seconds_sum"]
    ((_, count),) = by_name["tidegate_queue_age_seconds_count"]
    assert count == len(values)
    assert total == pytest.approx(sum(values) / 1e9)
    bounds = [
        (float(labels["le"]), number) for labels, number in by_name["tidegate_queue_age_seconds_bucket"]
    ]
    assert [bound for bound, _ in bounds] == sorted({bound for bound, _ in bounds})
    assert bounds[0][0] == 1.024e-6 and bounds[-2][0] == 549.755813888 and math.isinf(bounds[-1][0])
    for bound, number in bounds:
        assert number == sum(value < round(bound * 1e9) if math.isfinite(bound) else 1 for value in values)
    assert bounds[-1][1] == count


@pytest.mark.parametrize("name", ['say "hi"', "back\\slash", "two\nlines", "\\n", "Zürich", "{}", "a=b,c"])
def test_label_values_come_back_as_they_were(name: str) -> None:
    segment = Segment.sized_for({Scope.LISTENER: 1})
    segment.row(RowKey(Scope.LISTENER, 0, (name,)))
    family = parsed(exposition(segment))["tidegate_queued"]
    assert [sample.labels for sample in family.samples] == [{"listener": name}]


def test_samples_of_a_family_stand_together_and_lines_are_well_formed() -> None:
    text = exposition(filled())
    assert text.endswith("\n") and "\n\n" not in text
    seen: list[str] = []
    for line in text.splitlines():
        if line.startswith("# TYPE"):
            seen.append(line.split()[2])
        elif not line.startswith("#"):
            assert re.fullmatch(r'[a-z_]+(\{([a-z]+="[^"]*",?)+\})? \d+(\.\d+)?', line)
            assert line.startswith(seen[-1])
    assert len(seen) == len(set(seen))


def test_no_rows_no_text() -> None:
    assert render([]) == ""


@given(st.integers(0, 2**64 - 1))
def test_seconds_are_exact(ns: int) -> None:
    text = seconds(ns)
    whole, _, rest = text.partition(".")
    assert int(whole) * 10**9 + int(rest.ljust(9, "0") or 0) == ns
    assert not rest.endswith("0")
