from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.cluster.building import SECOND, Clock, cluster

from tidegate.cluster.balance import ClusterState
from tidegate.cluster.retry import MAX_RETRY_DELAY_NS, RETRY_DELAY_NS, RetryPlan


def made(*weights: int, seed: int = 1, **changes: object) -> tuple[ClusterState, RetryPlan, Clock]:
    clock = Clock()
    state = ClusterState(cluster(*weights, **changes), Random(seed), clock)
    return state, RetryPlan(state), clock


def run(state: ClusterState, plan: RetryPlan, clock: Clock) -> list[int]:
    """Fail every attempt; the delays there were."""
    delays = []
    while True:
        backend = plan.next(clock())
        assert backend is not None
        state.acquired(backend)
        state.connect_failed(backend, clock())
        state.released(backend)
        delay = plan.failed(clock())
        if delay is None:
            return delays
        delays.append(delay)
        clock.now += delay


def test_the_first_retry_goes_elsewhere_at_once() -> None:
    state, plan, clock = made(1, 1, 1)
    delays = run(state, plan, clock)
    assert len({id(backend) for backend in plan.tried}) == 3
    assert delays[0] == 0
    assert RETRY_DELAY_NS <= delays[1] <= 2 * RETRY_DELAY_NS
    assert plan.retries == 2


def test_a_lone_backend_is_tried_again_after_a_pause() -> None:
    state, plan, clock = made(1)
    delays = run(state, plan, clock)
    assert [backend.index for backend in plan.tried] == [0, 0, 0]
    assert RETRY_DELAY_NS // 2 <= delays[0] <= RETRY_DELAY_NS


def test_a_usable_backend_comes_before_a_second_try_of_the_same() -> None:
    state, plan, clock = made(1, 1, retries=5)
    state.set_health(state.backends[1], False)
    assert plan.next(clock()) is state.backends[0]
    state.connect_failed(state.backends[0], clock())
    assert plan.failed(clock())  # the other is down: no reason to hurry
    assert plan.next(clock()) is state.backends[0]
    state.connect_failed(state.backends[0], clock())
    state.set_health(state.backends[1], True)
    assert plan.next(clock()) is state.backends[1]


def test_no_retries_means_one_attempt() -> None:
    state, plan, clock = made(1, 1, retries=0)
    assert run(state, plan, clock) == []
    assert plan.next(clock()) is None
    assert plan.retries == 0


def test_nobody_to_pick() -> None:
    _, plan, clock = made()
    assert plan.next(clock()) is None
    assert plan.attempts == 0


def test_each_attempt_has_its_own_connect_timeout() -> None:
    _, plan, clock = made(1, connect_timeout_ns=7 * SECOND)
    assert plan.deadline_ns(clock()) == clock() + 7 * SECOND


def test_a_reload_does_not_change_the_rules_for_a_session_under_way() -> None:
    state, plan, clock = made(1, retries=1)
    plan.next(clock())
    state.reconfigure(cluster(1, retries=9))
    assert plan.failed(clock()) is not None
    plan.next(clock())
    assert plan.failed(clock()) is None


def test_the_same_key_starts_at_the_same_backend() -> None:
    state, _, clock = made(1, 1, 1, balance="hash")
    firsts = {RetryPlan(state, b"10.0.0.9").next(clock()) for _ in range(5)}
    assert len(firsts) == 1


def test_a_preferred_backend_comes_first_but_not_twice() -> None:
    state, _, clock = made(1, 1, 1)
    for backend in state.backends:
        plan = RetryPlan(state)
        assert plan.next(clock(), prefer=backend) is backend
        assert plan.next(clock(), prefer=backend) is not backend
    state.set_health(state.backends[0], False)
    plan = RetryPlan(state)
    assert plan.next(clock(), prefer=state.backends[0]) in state.backends[1:]


@given(
    st.integers(1, 5),
    st.integers(0, 30),
    st.integers(1, 10).map(lambda tenths: tenths * SECOND // 10),
    st.integers(0, 99),
)
def test_attempts_are_counted_and_delays_bounded(count: int, retries: int, timeout: int, seed: int) -> None:
    state, plan, clock = made(*[1] * count, seed=seed, retries=retries, connect_timeout_ns=timeout)
    delays = run(state, plan, clock)
    assert plan.attempts == retries + 1 == len(plan.tried)
    assert len({id(b) for b in plan.tried}) == min(count, retries + 1)
    assert all(0 <= delay <= min(timeout, MAX_RETRY_DELAY_NS) for delay in delays)
    assert all(delay > 0 for delay in delays[1:])


@pytest.mark.parametrize("seed", range(3))
def test_delays_differ_between_sessions(seed: int) -> None:
    state, _, clock = made(1, seed=seed, retries=1)
    drawn = set()
    for _ in range(20):
        plan = RetryPlan(state)
        plan.next(clock())
        drawn.add(plan.failed(clock()))
    assert len(drawn) > 15
