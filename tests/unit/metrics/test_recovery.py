"""Sums over workers, and what becomes of the counters of a worker or a predecessor that is gone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.metrics.names import LISTENER, DropReason, EndReason, Scope
from tidegate.metrics.recovery import carry_over, worker_died
from tidegate.metrics.segment import SUPERVISOR, Row, RowKey, Segment
from tidegate.metrics.totals import Total, totals

AGE = LISTENER.index("queue_age_ns")


def put(row: Row, name: str, number: int, value: str = "") -> None:
    row.words[LISTENER.index(name, value)] = number


def consistent(total: Total) -> bool:
    return total.value("accepted_total") == total.value("queued") + sum(
        total.value("dropped_total", reason) for reason in DropReason
    ) + total.value("sessions_total") and total.value("sessions_total") == total.value("sessions") + sum(
        total.value("ended_total", reason) for reason in EndReason
    )


def web(worker: int) -> RowKey:
    return RowKey(Scope.LISTENER, worker, ("web",))


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 50),
    st.lists(st.integers(0, 9), min_size=len(DropReason), max_size=len(DropReason)),
    st.lists(st.integers(0, 9), min_size=len(EndReason), max_size=len(EndReason)),
    st.integers(0, 50),
)
def test_what_a_dead_worker_had_in_hand_is_counted_once(
    queued: int, dropped: list[int], ended: list[int], sessions: int
) -> None:
    segment = Segment.sized_for({Scope.LISTENER: 2, Scope.WORKER: 1})
    row, other = segment.row(web(0)), segment.row(web(1))
    segment.row(RowKey(Scope.WORKER, 0))
    put(other, "sessions", 3)
    for reason, number in zip(DropReason, dropped, strict=True):
        put(row, "dropped_total", number, reason)
    for reason, number in zip(EndReason, ended, strict=True):
        put(row, "ended_total", number, reason)
    put(row, "sessions_total", sessions + sum(ended))
    put(row, "accepted_total", queued + sum(dropped) + sessions + sum(ended))
    put(row, "sessions", sessions)
    put(row, "queued", queued)

    assert worker_died(segment, 0) == (sessions, queued)
    (total,) = (total for total in totals([snap for snap in segment.snapshot() if snap.key == web(0)]))
    assert consistent(total)
    assert (total.value("sessions"), total.value("queued")) == (0, 0)
    assert total.value("ended_total", "worker_died") == ended[-1] + sessions
    assert total.value("dropped_total", "worker_died") == dropped[-1] + queued
    assert worker_died(segment, 0) == (0, 0)
    assert other.words[LISTENER.index("sessions")] == 3
    segment.close()


def test_a_worker_killed_between_two_stores_does_not_count_backwards() -> None:
    segment = Segment.sized_for({Scope.LISTENER: 1})
    row = segment.row(web(0))
    put(row, "ended_total", 1, EndReason.DONE)  # ended, but never counted as begun
    assert worker_died(segment, 0) == (0, 0)
    assert row.words[LISTENER.index("ended_total", EndReason.WORKER_DIED)] == 0
    segment.close()


def test_totals_sum_over_workers_and_keep_workers_apart_where_they_are_the_subject() -> None:
    segment = Segment.sized_for({Scope.LISTENER: 3, Scope.WORKER: 2})
    for worker in range(2):
        row = segment.row(web(worker))
        put(row, "dropped_total", 10 + worker, "stale")
        for value in (100, 5000 * (worker + 1)):
            row.observe(AGE, value)
        segment.row(RowKey(Scope.WORKER, worker)).words[0] = worker + 1
    segment.row(RowKey(Scope.LISTENER, 0, ("other",)))
    found = {(total.scope, total.labels, total.worker): total for total in totals(segment.snapshot())}
    assert set(found) == {
        (Scope.LISTENER, ("web",), None),
        (Scope.LISTENER, ("other",), None),
        (Scope.WORKER, (), 0),
        (Scope.WORKER, (), 1),
    }
    total = found[Scope.LISTENER, ("web",), None]
    metric = next(metric for metric in LISTENER.metrics if metric.name == "dropped_total")
    assert total.by_value(metric) == {**dict.fromkeys(DropReason, 0), "stale": 21}
    ages = total.histogram("queue_age_ns")
    assert (ages.count, ages.sum_ns, ages.max_ns) == (4, 15200, 10000)
    assert (ages.buckets[6], ages.buckets[12], ages.buckets[13]) == (2, 1, 1)
    assert [found[Scope.WORKER, (), worker].words[0] for worker in range(2)] == [1, 2]
    with pytest.raises(KeyError):
        total.value("nonsense")
    segment.close()


def test_a_removed_listener_is_left_out_of_totals() -> None:
    segment = Segment.sized_for({Scope.LISTENER: 1})
    segment.row(web(0))
    assert len(totals(segment.snapshot())) == 1
    segment.retire(web(0))
    assert totals(segment.snapshot()) == []
    segment.close()


def test_a_histogram_read_between_two_stores_agrees_with_itself() -> None:
    segment = Segment.sized_for({Scope.LISTENER: 1})
    row = segment.row(web(0))
    row.observe(AGE, 1000)
    row.words[AGE] += 1  # the next observe() has begun
    (total,) = totals(segment.snapshot())
    assert total.histogram("queue_age_ns").count == 1
    segment.close()


def test_a_successor_carries_counters_over_and_no_gauges() -> None:
    old = Segment.sized_for({Scope.LISTENER: 3, Scope.WORKER: 1})
    for worker in range(2):
        row = old.row(web(worker))
        put(row, "accepted_total", 10)
        put(row, "sessions", 4)
        row.observe(AGE, 7000 + worker)
    old.retire(web(1))
    gone = RowKey(Scope.LISTENER, 0, ("gone",))
    old.row(gone)
    old.retire(gone)
    old.row(RowKey(Scope.WORKER, 0)).words[0] = 99
    new = Segment.sized_for({Scope.LISTENER: 2, Scope.WORKER: 1})
    put(new.row(web(0)), "accepted_total", 5)
    carry_over(new, old.snapshot())
    assert {row.key for row in new.rows()} == {web(0), web(SUPERVISOR)}
    (total,) = totals(new.snapshot())
    assert (total.value("accepted_total"), total.value("sessions")) == (25, 0)
    ages = total.histogram("queue_age_ns")
    assert (ages.count, ages.max_ns) == (2, 7001)
    old.close()
    new.close()
