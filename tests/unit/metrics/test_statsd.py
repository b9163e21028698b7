"""StatsD lines: every metric of the list and no other, each addition told once, datagrams that fit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.metrics.names import LISTENER, METRICS, WORKER, Kind, Scope, layout
from tidegate.metrics.recovery import worker_died
from tidegate.metrics.segment import SUPERVISOR, RowKey, Segment
from tidegate.metrics.statsd import MAX_DATAGRAM, QUANTILES, Deltas, datagrams, name_of

WEB = (RowKey(Scope.LISTENER, 0, ("web",)), RowKey(Scope.LISTENER, 1, ("web",)))
ACCEPTED, AGE, SESSIONS = (LISTENER.index(name) for name in ("accepted_total", "queue_age_ns", "sessions"))
MS = 1_000_000
LINE = re.compile(r"(?P<name>[\w.-]+):(?P<value>[0-9.]+)\|(?P<kind>[cg])(?:\|#(?P<tags>.+))?")


@pytest.fixture
def segment() -> Iterator[Segment]:
    one = Segment.create(200_000)
    yield one
    one.close()


def told(deltas: Deltas, segment: Segment) -> dict[str, float]:
    """{name|type|tags: value} of what is sent now."""
    out: dict[str, float] = {}
    for line in deltas.lines(list(segment.snapshot())):
        found = LINE.fullmatch(line)
        assert found, line
        name = f"{found['name']}|{found['kind']}" + (f"|{found['tags']}" if found["tags"] else "")
        assert name not in out, f"{name} twice"
        out[name] = float(found["value"])
    return out


def counters(sent: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in sent.items() if name.partition("|")[2].startswith("c")}


def test_each_metric_of_the_list_is_sent_and_nothing_else(segment: Segment) -> None:
    keys = [
        WEB[0],
        RowKey(Scope.WORKER, 0),
        RowKey(Scope.BACKEND, 0, ("app", "10.0.0.7:9000")),
        RowKey(Scope.PROCESS, SUPERVISOR),
    ]
    for key in keys:
        row, at = segment.row(key), layout(key.scope)
        for metric in at.metrics:
            for value in metric.values or ("",):
                if metric.kind is Kind.HISTOGRAM:
                    row.observe(at.index(metric.name, value), 5 * MS)
                else:
                    row.words[at.index(metric.name, value)] = 7 * MS
    place = {
        Scope.LISTENER: "listener.web.",
        Scope.WORKER: "worker.0.",
        Scope.BACKEND: "backend.app.10_0_0_7_9000.",
        Scope.PROCESS: "",
    }
    expected: dict[str, float] = {}
    for metric in METRICS:
        for value in metric.values or ("",):
            name = f"tidegate.{place[metric.scope]}{name_of(metric)}" + (f".{value}" if value else "")
            if metric.kind is Kind.HISTOGRAM:
                expected |= {f"{name}.count|c": 1, f"{name}.sum|c": 5, f"{name}.max|g": 5}
                expected |= dict.fromkeys((f"{name}.{quantile}|g" for quantile, _ in QUANTILES), -1)
            else:
                kind = "c" if metric.kind is Kind.COUNTER else "g"
                expected[f"{name}|{kind}"] = 7 if metric.nanoseconds else 7 * MS
    sent = told(Deltas(tags=False), segment)
    assert sent.keys() == expected.keys()
    for name, number in expected.items():
        if number >= 0:
            assert sent[name] == number, name
        else:
            assert 4.1 <= sent[name] <= 5, name  # in the bucket that begins at 4.19 ms


def test_labels_as_tags(segment: Segment) -> None:
    segment.row(RowKey(Scope.LISTENER, 0, ("w|e,b#\n1",))).words[LISTENER.index("dropped_total", "stale")] = 3
    segment.row(RowKey(Scope.WORKER, 4)).words[WORKER.index("loop_iterations_total")] = 5
    segment.row(RowKey(Scope.BACKEND, 0, ("app", "10.0.0.7:9000")))
    segment.row(RowKey(Scope.PROCESS, SUPERVISOR))
    sent = told(Deltas(tags=True), segment)
    assert sent["tidegate.dropped_total|c|listener:w_e_b__1,reason:stale"] == 3
    assert sent["tidegate.loop_iterations_total|c|worker:4"] == 5
    assert sent["tidegate.backend_current_connections|g|cluster:app,backend:10.0.0.7:9000"] == 0
    assert sent["tidegate.workers|g"] == 0


def test_counters_are_told_once_and_summed_over_workers(segment: Segment) -> None:
    deltas = Deltas(tags=False)
    one, two = (segment.row(key) for key in WEB)
    assert counters(told(deltas, segment)) == {}
    one.words[ACCEPTED] += 3
    two.words[ACCEPTED] += 4
    assert counters(told(deltas, segment)) == {"tidegate.listener.web.accepted_total|c": 7}
    assert counters(told(deltas, segment)) == {}
    two.words[ACCEPTED] += 1
    assert counters(told(deltas, segment)) == {"tidegate.listener.web.accepted_total|c": 1}


def test_what_was_told_before_is_not_told_again(segment: Segment) -> None:
    """After the death of the process that pushes, and in a successor."""
    segment.row(WEB[0]).words[ACCEPTED] = 5
    deltas = Deltas(False, segment.snapshot())
    assert counters(told(deltas, segment)) == {}
    segment.row(WEB[0]).words[ACCEPTED] += 2
    assert counters(told(deltas, segment)) == {"tidegate.listener.web.accepted_total|c": 2}


def test_a_dead_worker_takes_nothing_back(segment: Segment) -> None:
    deltas = Deltas(tags=False)
    row = segment.row(WEB[0])
    row.words[ACCEPTED], row.words[SESSIONS] = 5, 3
    row.words[LISTENER.index("sessions_total")] = 4
    sent = told(deltas, segment)
    assert sent["tidegate.listener.web.current_sessions|g"] == 3
    worker_died(segment, 0)
    sent = told(deltas, segment)
    assert counters(sent) == {
        "tidegate.listener.web.dropped_total.worker_died|c": 1,
        "tidegate.listener.web.ended_total.worker_died|c": 4,
    }
    assert sent["tidegate.listener.web.current_sessions|g"] == 0


def test_a_listener_that_goes_and_comes_back_goes_on(segment: Segment) -> None:
    deltas = Deltas(tags=False)
    segment.row(WEB[0]).words[ACCEPTED] = 5
    segment.row(WEB[0]).words[SESSIONS] = 2
    told(deltas, segment)
    segment.retire(WEB[0])
    gone = told(deltas, segment)
    assert gone["tidegate.listener.web.current_sessions|g"] == 0, "once, or it would stay at its last value"
    assert set(gone) == {"tidegate.listener.web.current_sessions|g"}
    assert told(deltas, segment) == {}
    segment.row(WEB[0]).words[ACCEPTED] += 1
    assert counters(told(deltas, segment)) == {"tidegate.listener.web.accepted_total|c": 1}


def test_a_counter_that_began_anew_counts_from_0(segment: Segment) -> None:
    deltas = Deltas(tags=False)
    row = segment.row(WEB[0])
    row.words[ACCEPTED] = 5
    for _ in range(4):
        row.observe(AGE, 3 * MS)
    told(deltas, segment)
    row.words[ACCEPTED] = 2
    for index in range(AGE, AGE + 43):
        row.words[index] = 0
    row.observe(AGE, 100 * MS)
    sent = told(deltas, segment)
    assert sent["tidegate.listener.web.accepted_total|c"] == 2
    assert sent["tidegate.listener.web.queue_age_ms.count|c"] == 1
    assert sent["tidegate.listener.web.queue_age_ms.sum|c"] == 100


def test_percentiles_are_those_of_the_interval(segment: Segment) -> None:
    deltas = Deltas(tags=False)
    row = segment.row(WEB[0])
    age = "tidegate.listener.web.queue_age_ms"
    for _ in range(1000):
        row.observe(AGE, 900 * MS)
    assert told(deltas, segment)[f"{age}.max|g"] == 900
    for _ in range(98):
        row.observe(AGE, 2 * MS)
    row.observe(AGE, 40 * MS)
    row.observe(AGE, 40 * MS)
    sent = told(deltas, segment)
    assert sent[f"{age}.count|c"] == 100
    assert sent[f"{age}.sum|c"] == 98 * 2 + 80
    assert 1 <= sent[f"{age}.p50|g"] <= 2.1
    assert 1 <= sent[f"{age}.p90|g"] <= 2.1
    assert 33.5 <= sent[f"{age}.p99|g"] <= 67.2
    assert 40 <= sent[f"{age}.max|g"] <= 67.2, "the largest of the interval, to its bucket"
    quiet = told(deltas, segment)
    assert {name: value for name, value in quiet.items() if name.startswith(age)} == {
        f"{age}.{name}|g": 0 for name in ("max", "p50", "p90", "p99")
    }


@given(st.lists(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1 << 45)), max_size=5), max_size=8))
@settings(max_examples=50, deadline=None)
def test_what_is_told_adds_up(steps: list[list[tuple[int, int]]]) -> None:
    segment = Segment.create(200_000)
    deltas = Deltas(tags=False)
    total: Counter[str] = Counter()
    for observations in steps:
        for worker, value in observations:
            row = segment.row(WEB[worker])
            row.observe(AGE, value)
            row.words[ACCEPTED] += 1
        total.update(counters(told(deltas, segment)))  # type: ignore[arg-type]
    everything = [value for step in steps for _, value in step]
    assert total["tidegate.listener.web.queue_age_ms.count|c"] == len(everything)
    assert total["tidegate.listener.web.queue_age_ms.sum|c"] == sum(everything) // MS, "no fraction is lost"
    assert total["tidegate.listener.web.accepted_total|c"] == len(everything)
    segment.close()


@given(st.lists(st.text("abc.:|", min_size=1, max_size=80), max_size=60), st.integers(10, 200))
def test_datagrams_fit_and_lose_nothing(lines: list[str], limit: int) -> None:
    packed = list(datagrams(lines, limit))
    assert b"\n".join(packed).decode().split("\n") == (lines or [""])
    for data in packed:
        assert len(data) <= limit or b"\n" not in data
    for data, after in pairwise(packed):
        assert len(data) + 1 + len(after.split(b"\n")[0]) > limit, "a line more would have fitted"
    assert MAX_DATAGRAM <= 1500 - 40 - 8
