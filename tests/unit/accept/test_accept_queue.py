"""The accept queue and the deadline rule, against models and replayed traces."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.accept.admission import Deadline
from tidegate.accept.queue import AcceptQueue

MS = 1_000_000


@dataclass
class Entry:
    established_ns: int
    name: str = ""


def filled(*times: int, capacity: int = 16) -> AcceptQueue[Entry]:
    queue: AcceptQueue[Entry] = AcceptQueue(capacity)
    for t in times:
        queue.push(Entry(t))
    return queue


def test_newest_is_served_first_and_oldest_swept_first() -> None:
    queue = filled(10 * MS, 20 * MS, 30 * MS)
    rule = Deadline(15 * MS)
    assert queue.pop_newest() == Entry(30 * MS)
    assert queue.sweep(rule, 30 * MS) == [Entry(10 * MS)]
    assert queue.next_expiry_ns(rule) == 35 * MS + 1
    assert queue.pop_newest() == Entry(20 * MS)
    assert queue.pop_newest() is None and queue.pop_oldest() is None and queue.next_expiry_ns(rule) is None


def test_deadline_is_exact() -> None:
    rule = Deadline(500 * MS)
    assert not rule.stale(0, 500 * MS)
    assert rule.stale(0, 500 * MS + 1)
    assert rule.stale(7, rule.expires_ns(7)) and not rule.stale(7, rule.expires_ns(7) - 1)


def test_one_taken_over_late_is_filed_by_its_age() -> None:
    queue = filled(10, 30, 20, 5, 30)
    assert [e.established_ns for e in queue] == [5, 10, 20, 30, 30]


def test_full_queue_refuses_a_push_and_keeps_what_it_has() -> None:
    queue = filled(1, 2, capacity=2)
    assert queue.full
    with pytest.raises(OverflowError):
        queue.push(Entry(3))
    assert [e.established_ns for e in queue] == [1, 2]
    with pytest.raises(ValueError):
        AcceptQueue(0)


def test_replayed_stall_serves_every_younger_and_no_older() -> None:
    """200 connections a second for 2 s of stall: exactly those within the deadline are left to serve."""
    arrivals = [i * 5 * MS for i in range(400)]
    resumed = 2000 * MS
    rule = Deadline(500 * MS)
    queue = filled(*arrivals, capacity=400)
    stale = queue.sweep(rule, resumed)
    served = []
    while (entry := queue.pop_newest()) is not None:
        served.append(entry.established_ns)
    assert [e.established_ns for e in stale] == [t for t in arrivals if resumed - t > 500 * MS]
    assert served == [t for t in reversed(arrivals) if resumed - t <= 500 * MS]


@settings(max_examples=500)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("push"), st.integers(0, 1000)),
            st.tuples(st.sampled_from(["newest", "oldest"]), st.just(0)),
            st.tuples(st.just("sweep"), st.integers(0, 1500)),
        )
    )
)
def test_against_a_sorted_list(steps: list[tuple[str, int]]) -> None:
    queue: AcceptQueue[Entry] = AcceptQueue(8)
    rule = Deadline(100)
    model: list[int] = []
    for what, value in steps:
        if what == "push":
            if len(model) == 8:
                assert queue.full
                continue
            queue.push(Entry(value))
            model.append(value)
            model.sort()
        elif what == "sweep":
            assert [e.established_ns for e in queue.sweep(rule, value)] == [
                t for t in model if value - t > 100
            ]
            model = [t for t in model if value - t <= 100]
        else:
            entry = queue.pop_newest() if what == "newest" else queue.pop_oldest()
            expected = (model.pop() if what == "newest" else model.pop(0)) if model else None
            assert (entry.established_ns if entry else None) == expected
        assert [e.established_ns for e in queue] == model and len(queue) == len(model)
