"""When a dead worker is started again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tidegate.supervisor.restarts import (
    CRASH_LOOP_LIMIT,
    FIRST_DELAY_NS,
    HEALTHY_AFTER_NS,
    MAX_DELAY_NS,
    RestartPolicy,
)

YOUNG, OLD = HEALTHY_AFTER_NS - 1, HEALTHY_AFTER_NS


def test_a_crash_loop_backs_off_and_is_given_up() -> None:
    policy = RestartPolicy()
    delays = [policy.died(0) for _ in range(CRASH_LOOP_LIMIT)]
    assert delays[0] == 0, "the first death is mended at once"
    assert delays[1] == FIRST_DELAY_NS
    assert delays[2] == 2 * FIRST_DELAY_NS
    waits = [delay for delay in delays[:-1] if delay is not None]
    assert waits == sorted(waits)
    assert waits[-1] == MAX_DELAY_NS
    assert delays[-1] is None


def test_one_healthy_life_forgives() -> None:
    policy = RestartPolicy()
    for _ in range(CRASH_LOOP_LIMIT - 1):
        assert policy.died(YOUNG) is not None
    assert policy.died(OLD) == 0
    assert policy.died(YOUNG) == 0
    assert policy.died(YOUNG) == FIRST_DELAY_NS


@given(st.lists(st.integers(0, 2 * HEALTHY_AFTER_NS), max_size=60))
def test_whatever_the_lives(lives: list[int]) -> None:
    policy = RestartPolicy()
    young = 0
    for lived in lives:
        delay = policy.died(lived)
        young = 0 if lived >= HEALTHY_AFTER_NS else young + 1
        assert (delay is None) == (young >= CRASH_LOOP_LIMIT)
        if delay is not None:
            assert 0 <= delay <= MAX_DELAY_NS
            assert (delay == 0) == (young <= 1)
