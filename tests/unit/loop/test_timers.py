"""The timer wheel against a list of deadlines, sorted."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tidegate.loop.timers import Timer, TimerWheel

SLOTS = 8  # few, so that rounds, collisions and wraps happen all the time
COUNT = 4

timer_numbers = st.integers(0, COUNT - 1)
offsets = st.integers(-3, 12) | st.integers(-30, 200)  # ns; the wheel spans 8 slots of 1..5 ns
actions = st.tuples(st.sampled_from(["arm", "cancel", "store 0", "store later"]), timer_numbers, offsets)
plans = st.lists(actions, max_size=3)


class WheelMachine(RuleBasedStateMachine):
    """`model` maps each armed timer to its deadline and to the time it was last armed or moved.

    What each callback does is drawn beforehand as its plan: actions on any timer, the firing one included.
    """

    @initialize(start=st.integers(0, 100), tick=st.integers(1, 5), plans=st.lists(plans, max_size=COUNT))
    def begin(self, start: int, tick: int, plans: list[list[tuple[str, int, int]]]) -> None:
        self.now = start
        self.tick = tick
        self.wheel = TimerWheel(start, tick, SLOTS)
        self.timers = [Timer(self.callback_of(number)) for number in range(COUNT)]
        self.model: dict[int, tuple[int, int]] = {}
        self.plans = dict(enumerate(plans))
        self.fired: list[tuple[int, int]] = []
        self.in_advance = False

    def callback_of(self, number: int):  # type: ignore[no-untyped-def]
        def fire(now_ns: int) -> None:
            assert self.in_advance and now_ns == self.now
            assert number in self.model, "fired although cancelled, never armed, or fired twice"
            deadline, _ = self.model.pop(number)
            assert deadline <= now_ns, "fired early"
            assert not self.timers[number].armed
            self.fired.append((deadline, number))
            for verb, other, offset in self.plans.get(number, ()):
                self.act(verb, other, offset)

        return fire

    def act(self, verb: str, number: int, offset: int) -> None:
        timer = self.timers[number]
        deadline = max(1, self.now + offset)
        if verb == "arm":
            self.wheel.arm(timer, deadline)
            self.model[number] = (deadline, self.now)
        elif verb == "cancel":
            self.wheel.cancel(timer)
            self.model.pop(number, None)
        elif verb == "store 0":
            timer.deadline_ns = 0
            self.model.pop(number, None)
        elif verb == "store later" and number in self.model:
            later = self.model[number][0] + abs(offset)
            timer.deadline_ns = later
            self.model[number] = (later, self.now)

    @rule(action=actions)
    def outside(self, action: tuple[str, int, int]) -> None:
        self.act(*action)

    @rule(deadlines=st.lists(offsets, min_size=COUNT, max_size=COUNT))
    def arm_all(self, deadlines: list[int]) -> None:
        for number, offset in enumerate(deadlines):
            self.act("arm", number, offset)

    @rule(number=timer_numbers, plan=plans)
    def plan(self, number: int, plan: list[tuple[str, int, int]]) -> None:
        self.plans[number] = plan

    def latest(self, number: int) -> int:
        """When the timer must have fired: one tick after its deadline, or after it was armed too late."""
        deadline, touched = self.model[number]
        return deadline + self.tick if deadline > touched else touched + self.tick + 1

    def step(self) -> None:
        acting = any(self.plans.values())
        self.fired.clear()
        self.in_advance = True
        count = self.wheel.advance(self.now)
        self.in_advance = False
        assert count == len(self.fired)
        assert count <= COUNT  # each at most once, whatever callbacks arm
        if not acting:
            assert self.fired == sorted(self.fired, key=lambda entry: entry[0])
        for number in self.model:
            assert self.now < self.latest(number), f"timer {number} is more than one tick late"

    @rule(step=st.integers(0, 8))
    def time_passes(self, step: int) -> None:
        self.now += step
        self.step()

    @rule(step=st.integers(100, 10**12))
    def process_was_stopped(self, step: int) -> None:
        self.now += step
        self.step()

    @rule()
    def sleep_as_told(self) -> None:
        """What the loop does: sleep for next_due, advance. It must fire or get nearer each time."""
        if not self.model:
            return
        first = min(deadline for deadline, _ in self.model.values())
        for _ in range(SLOTS * (2 + max(0, first - self.now) // (SLOTS * self.tick)) + COUNT):
            wait = self.wheel.next_due(self.now)
            assert wait is not None
            self.now += wait
            self.step()
            if self.fired:
                return
            assert self.wheel.next_due(self.now) != 0
        raise AssertionError("the loop spins")

    @rule(back=st.integers(0, 50))
    def clock_stands_still_or_goes_back(self, back: int) -> None:
        assert self.wheel.advance(max(0, self.now - back)) == 0

    @invariant()
    def next_due_is_never_late_and_never_idle(self) -> None:
        if not hasattr(self, "wheel"):
            return
        for now in (
            self.now,
            self.now + 1,
            self.now + self.tick * 3 + 1,
            self.now + self.tick * SLOTS * 2 + 1,
        ):
            wait = self.wheel.next_due(now)
            if not self.model:
                continue
            assert wait is not None and wait >= 0
            first = min(self.latest(number) for number in self.model)
            assert now + wait < max(first, now + 1), "would sleep past a deadline"
            if wait == 0:
                assert any(deadline <= now for deadline, _ in self.model.values()), "woken for nothing"

    @invariant()
    def occupancy_matches_the_slots(self) -> None:
        if hasattr(self, "wheel"):
            assert bytes(slot is not None for slot in self.wheel._slots) == bytes(self.wheel._occupied)
            assert all(slot is None or slot for slot in self.wheel._slots)
            assert len(self.wheel) <= COUNT


TestWheel = WheelMachine.TestCase
TestWheel.settings = settings(max_examples=500, stateful_step_count=30, deadline=None)


class Recorder:
    def __init__(self) -> None:
        self.at: list[int] = []

    def __call__(self, now_ns: int) -> None:
        self.at.append(now_ns)


MS = 1_000_000


def test_moving_a_deadline_later_is_a_store_and_costs_one_look_per_round() -> None:
    wheel = TimerWheel(0)
    fired = Recorder()
    timer = Timer(fired)
    wheel.arm(timer, 10 * MS)
    for now in range(0, 1000 * MS, 5 * MS):
        timer.deadline_ns = now + 10 * MS
        wheel.advance(now)
    assert fired.at == []
    wheel.advance(995 * MS + 10 * MS - 1)
    assert fired.at == []
    wheel.advance(995 * MS + 10 * MS)
    assert fired.at == [1005 * MS]


def test_an_hour_takes_one_look_per_round_of_the_wheel() -> None:
    wheel = TimerWheel(0)
    fired = Recorder()
    wheel.arm(Timer(fired), 3_600_000 * MS)
    now = looks = 0
    while not fired.at:
        wait = wheel.next_due(now)
        assert wait
        now += wait
        wheel.advance(now)
        looks += 1
    assert fired.at == [3_600_000 * MS]
    assert looks <= 3_600_000 // 8192 + 1


def test_a_stop_of_minutes_fires_everything_once_in_order_of_deadlines() -> None:
    wheel = TimerWheel(0)
    order: list[int] = []
    timers = [Timer(lambda now, number=number: order.append(number)) for number in range(500)]  # type: ignore[misc]
    for number, timer in enumerate(timers):
        wheel.arm(timer, (number * 7919 % 500 + 1) * 400 * MS)
    assert wheel.advance(300_000 * MS) == 500
    assert order == sorted(range(500), key=lambda number: number * 7919 % 500)
    assert wheel.next_due(300_000 * MS) is None
    assert len(wheel) == 0


def test_activity_found_after_a_stop_saves_its_timer() -> None:
    wheel = TimerWheel(0)
    idle, busy = Recorder(), Recorder()
    idle_timer, busy_timer = Timer(idle), Timer(busy)
    wheel.arm(idle_timer, 100 * MS)
    wheel.arm(busy_timer, 100 * MS)
    now = 120_000 * MS
    busy_timer.deadline_ns = now + 100 * MS
    wheel.advance(now)
    assert (idle.at, busy.at) == ([now], [])
    assert wheel.next_due(now) == 100 * MS


def test_a_callback_that_rearms_itself_for_the_past_does_not_loop() -> None:
    wheel = TimerWheel(0)
    calls = 0

    def again(now_ns: int) -> None:
        nonlocal calls
        calls += 1
        wheel.arm(timer, 1)

    timer = Timer(again)
    wheel.arm(timer, 5 * MS)
    assert wheel.advance(6 * MS) == 1
    assert wheel.next_due(6 * MS) == 1 * MS
    assert wheel.advance(6 * MS) == 0
    assert wheel.advance(7 * MS) == 1
    assert calls == 2


def test_a_callback_cancels_and_moves_others_due_at_the_same_time() -> None:
    wheel = TimerWheel(0)
    first, cancelled, moved, rearmed = Recorder(), Recorder(), Recorder(), Recorder()
    timers = [Timer(recorder) for recorder in (cancelled, moved, rearmed)]

    def act(now_ns: int) -> None:
        first(now_ns)
        wheel.cancel(timers[0])
        timers[1].deadline_ns = 50 * MS
        wheel.arm(timers[2], 60 * MS)

    leader = Timer(act)
    wheel.arm(leader, 1 * MS)
    for timer in timers:
        wheel.arm(timer, 2 * MS)
    assert wheel.advance(10 * MS) == 1
    wheel.advance(50 * MS)
    wheel.advance(60 * MS)
    assert (cancelled.at, moved.at, rearmed.at) == ([], [50 * MS], [60 * MS])


def test_an_exception_loses_no_other_timer() -> None:
    wheel = TimerWheel(0)
    before, after, moved = Recorder(), Recorder(), Recorder()

    def fail(now_ns: int) -> None:
        raise RuntimeError("handler")

    moved_timer = Timer(moved)
    for timer, deadline in ((Timer(before), 1), (Timer(fail), 2), (Timer(after), 3), (moved_timer, 4)):
        wheel.arm(timer, deadline * MS)
    with pytest.raises(RuntimeError, match="handler"):
        wheel.advance(10 * MS)
    moved_timer.deadline_ns = 20 * MS
    assert (before.at, after.at) == ([10 * MS], [])
    assert wheel.next_due(10 * MS) == 1 * MS
    assert wheel.advance(11 * MS) == 1
    assert after.at == [11 * MS]
    wheel.advance(20 * MS)
    assert moved.at == [20 * MS]
    assert len(wheel) == 0


def test_cancel_forgets_at_once_and_a_stored_zero_within_a_round() -> None:
    wheel = TimerWheel(0, slots=64)
    cancelled, zeroed = Timer(Recorder()), Timer(Recorder())
    wheel.arm(cancelled, 10_000 * MS)
    wheel.arm(zeroed, 10_000 * MS)
    wheel.cancel(cancelled)
    zeroed.deadline_ns = 0
    assert len(wheel) == 1
    wheel.advance(64 * MS)
    assert len(wheel) == 0
    assert wheel.next_due(64 * MS) is None


def test_repeated_moves_earlier_leave_nothing_behind() -> None:
    wheel = TimerWheel(0)
    timer = Timer(Recorder())
    for number in range(1000):
        wheel.arm(timer, (5000 + number) * MS)
        wheel.arm(timer, (4000 - number) * MS)
    assert len(wheel) == 1


@pytest.mark.parametrize("deadline", [0, -5])
def test_arming_for_no_time_is_refused(deadline: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        TimerWheel(0).arm(Timer(Recorder()), deadline)


def test_an_empty_wheel_is_true_and_waits_for_nothing() -> None:
    wheel = TimerWheel(0)
    assert wheel
    assert wheel.next_due(5) is None


def test_an_abandoned_timer_never_fires_and_is_forgotten_soon() -> None:
    wheel = TimerWheel(0, slots=64)
    recorder = Recorder()
    near, far, moved = (Timer(recorder) for _ in range(3))
    wheel.arm(near, 20 * MS)
    wheel.arm(far, 50 * MS)
    wheel.arm(moved, 20 * MS)
    moved.deadline_ns = 10_000 * MS
    for timer in (near, far, moved):
        wheel.abandon(timer)
        wheel.abandon(timer)
        assert not timer.armed
    assert len(wheel) == 0 or wheel.next_due(0) is not None
    wheel.advance(32 * MS)
    assert recorder.at == []
    assert wheel.next_due(32 * MS) is None
    wheel.arm(near, 40 * MS)  # and may be used again
    wheel.advance(40 * MS)
    assert recorder.at == [40 * MS]
