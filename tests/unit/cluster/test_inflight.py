from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from unit.cluster.building import SECOND

from tidegate.cluster.inflight import Entry, Gate, WaitEnd
from tidegate.loop.timers import TimerWheel

START = 1_000 * SECOND


class Bench:
    def __init__(self, limit: int | None = 1, max_waiting: int = 10) -> None:
        self.now = START
        self.wheel = TimerWheel(START)
        self.served: list[str] = []
        self.refused: list[tuple[str, WaitEnd]] = []
        self.unwanted: set[str] = set()
        self.gate: Gate[str] = Gate(
            limit,
            max_waiting,
            self.wheel,
            self.served.append,
            lambda item, reason: self.refused.append((item, reason)),
            lambda item, now_ns: item not in self.unwanted,
        )

    def enter(self, item: str, age_s: float = 0, patience_s: float = 1) -> Entry:
        established = self.now - int(age_s * SECOND)
        return self.gate.enter(item, established, established + int(patience_s * SECOND))

    def leave(self) -> None:
        self.gate.leave(self.now)

    def advance(self, seconds: float) -> None:
        self.now += int(seconds * SECOND)
        self.wheel.advance(self.now)


def test_up_to_the_limit_nobody_waits() -> None:
    bench = Bench(limit=2)
    assert [bench.enter(item) for item in "abc"] == [Entry.ENTERED, Entry.ENTERED, Entry.WAITING]
    bench.leave()
    assert bench.served == ["c"]
    assert bench.gate.in_flight == 2


def test_no_limit_means_no_waiting() -> None:
    bench = Bench(limit=None, max_waiting=0)
    assert {bench.enter(str(i)) for i in range(500)} == {Entry.ENTERED}
    assert bench.gate.in_flight == 500


def test_the_newest_by_true_age_is_served_first() -> None:
    bench = Bench()
    bench.enter("holder")
    bench.enter("middle", age_s=0.2)
    bench.enter("oldest", age_s=0.5)  # came later, but has waited longest
    bench.enter("newest", age_s=0.1)
    assert bench.gate.oldest_ns() == START - SECOND // 2
    for _ in range(3):
        bench.leave()
    assert bench.served == ["newest", "middle", "oldest"]


def test_age_goes_on_counting_here() -> None:
    bench = Bench()
    bench.enter("holder")
    bench.enter("a", age_s=0.9)
    bench.advance(0.05)
    assert bench.refused == []
    bench.advance(0.06)
    assert bench.refused == [("a", WaitEnd.STALE)]
    bench.leave()
    assert bench.served == []


def test_deadlines_need_not_follow_ages() -> None:
    bench = Bench()
    bench.enter("holder")
    bench.enter("patient", age_s=0.5, patience_s=9)
    bench.enter("hasty", patience_s=0.2)
    bench.advance(0.3)
    assert bench.refused == [("hasty", WaitEnd.STALE)]
    bench.leave()
    assert bench.served == ["patient"]


def test_a_stalled_process_serves_nobody_past_the_deadline() -> None:
    bench = Bench()
    bench.enter("holder")
    bench.enter("old", patience_s=1)
    bench.now += 2 * SECOND  # the timer has had no chance yet
    bench.enter("young")
    bench.leave()
    bench.leave()
    assert bench.served == ["young"]
    assert bench.refused == [("old", WaitEnd.STALE)]


def test_admission_has_the_last_word() -> None:
    bench = Bench()
    bench.enter("holder")
    bench.enter("good", age_s=0.5)
    bench.enter("bad")
    bench.unwanted.add("bad")
    bench.leave()
    assert bench.served == ["good"]
    assert bench.refused == [("bad", WaitEnd.STALE)]


def test_a_full_queue_refuses_the_new() -> None:
    bench = Bench(max_waiting=1)
    assert [bench.enter(item) for item in "abc"] == [Entry.ENTERED, Entry.WAITING, Entry.FULL]
    assert bench.gate.ended[WaitEnd.FULL] == 1
    assert bench.gate.waiting == 1


def test_who_leaves_while_waiting_is_forgotten() -> None:
    bench = Bench()
    bench.enter("holder")
    bench.enter("a")
    assert bench.gate.cancel("a")
    assert not bench.gate.cancel("a")
    bench.leave()
    assert bench.served == []
    assert bench.gate.in_flight == 0
    assert bench.gate.ended[WaitEnd.GONE] == 1


def test_a_thousand_that_fail_at_once_do_not_nest() -> None:
    bench = Bench(max_waiting=5000)
    served = []

    def serve(item: str) -> None:
        served.append(item)
        bench.gate.leave(bench.now)

    bench.gate._serve = serve
    bench.enter("holder")
    for i in range(5000):
        bench.enter(str(i))
    bench.leave()
    assert len(served) == 5000
    assert bench.gate.in_flight == 0


def test_a_raised_limit_is_used_at_once_and_a_lowered_one_throws_nobody_out() -> None:
    bench = Bench(limit=2)
    for item in "abcde":
        bench.enter(item)
    bench.gate.set_limit(4, 10, bench.now)
    assert bench.served == ["e", "d"]
    bench.gate.set_limit(1, 10, bench.now)
    assert bench.gate.in_flight == 4
    for _ in range(3):
        bench.leave()
    assert bench.served == ["e", "d"]
    bench.leave()
    assert bench.served == ["e", "d", "c"]
    bench.gate.set_limit(None, 10, bench.now)
    assert bench.enter("f") is Entry.ENTERED


def test_close_refuses_all_that_wait() -> None:
    bench = Bench()
    for item in "abc":
        bench.enter(item)
    bench.gate.close()
    assert bench.refused == [("b", WaitEnd.SHUTDOWN), ("c", WaitEnd.SHUTDOWN)]
    assert bench.wheel.next_due(bench.now) is None


def test_mistakes_are_refused() -> None:
    bench = Bench()
    with pytest.raises(ValueError, match="left"):
        bench.leave()
    bench.enter("a")
    bench.enter("b")
    with pytest.raises(ValueError, match="waiting already"):
        bench.enter("b")


class GateModel(RuleBasedStateMachine):
    """Places never exceed the limit, nobody waits while there is room, and everyone has exactly one end."""

    @initialize(limit=st.integers(1, 3), max_waiting=st.integers(0, 5))
    def begin(self, limit: int, max_waiting: int) -> None:
        self.bench = Bench(limit, max_waiting)
        self.waiting: dict[str, tuple[int, int]] = {}
        self.inside = 0
        self.count = 0
        self.seen = [0, 0]  # served, refused already looked at

    @rule(age=st.floats(0, 2), patience=st.floats(0.001, 3))
    def enter(self, age: float, patience: float) -> None:
        self.count += 1
        item = str(self.count)
        result = self.bench.enter(item, age, patience)
        if result is Entry.ENTERED:
            assert self.inside < self.bench.gate.limit
            self.inside += 1
        elif result is Entry.WAITING:
            established = self.bench.now - int(age * SECOND)
            self.waiting[item] = (established, established + int(patience * SECOND))
        else:
            assert len(self.waiting) == self.bench.gate.max_waiting

    @precondition(lambda self: self.inside)
    @rule()
    def leave(self) -> None:
        self.inside -= 1
        alive = {item: key for item, key in self.waiting.items() if key[1] > self.bench.now}
        self.bench.leave()
        new = self.bench.served[self.seen[0] :]
        if alive:
            youngest = max(key[0] for key in alive.values())
            assert len(new) == 1
            assert alive[new[0]][0] == youngest
        else:
            assert new == []
        self.account()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from(sorted(self.waiting)))
        assert self.bench.gate.cancel(item)
        del self.waiting[item]

    @rule(seconds=st.sampled_from([0.01, 0.4, 1.5]))
    def wait(self, seconds: float) -> None:
        self.bench.advance(seconds)
        self.account()
        assert all(key[1] + 2_000_000 > self.bench.now for key in self.waiting.values())

    def account(self) -> None:
        for item in self.bench.served[self.seen[0] :]:
            del self.waiting[item]
            self.inside += 1
        for item, reason in self.bench.refused[self.seen[1] :]:
            assert reason is WaitEnd.STALE
            assert self.waiting.pop(item)[1] <= self.bench.now
        self.seen = [len(self.bench.served), len(self.bench.refused)]

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "bench"):
            return
        gate = self.bench.gate
        assert gate.in_flight == self.inside <= gate.limit
        assert gate.waiting == len(self.waiting) <= gate.max_waiting
        assert not self.waiting or gate.in_flight == gate.limit
        oldest = min((key[0] for key in self.waiting.values()), default=None)
        assert gate.oldest_ns() == oldest


TestGateModel = GateModel.TestCase
TestGateModel.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
