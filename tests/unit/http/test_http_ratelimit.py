"""Token buckets and connection counts per client."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.http.ratelimit import ConnectionCount, RequestRate, retry_after_s

S = 1_000_000_000


def test_a_burst_then_the_rate() -> None:
    rate = RequestRate(10, 5)
    assert [rate.take("a", S) for _ in range(5)] == [0] * 5
    wait = rate.take("a", S)
    assert wait == S // 10
    assert rate.take("a", S + wait - 1) == 1
    assert rate.take("a", S + wait) == 0
    assert rate.take("b", S) == 0
    # Idle for long, the bucket is full and no fuller.
    later = 100 * S
    assert [rate.take("a", later) > 0 for _ in range(6)] == [False] * 5 + [True]


def test_no_burst_given_is_one_second_s_worth() -> None:
    rate = RequestRate(3, 0)
    assert [rate.take("a", S) > 0 for _ in range(4)] == [False] * 3 + [True]


@given(
    st.integers(1, 50),
    st.integers(1, 20),
    st.lists(st.integers(0, S // 4), min_size=1, max_size=200),
)
@settings(deadline=None)
def test_never_more_than_burst_and_rate_allow(rate: int, burst: int, steps: list[int]) -> None:
    limiter = RequestRate(rate, burst)
    now, allowed = S, []
    for step in steps:
        now += step
        if limiter.take("a", now) == 0:
            allowed.append(now)
    for first in range(len(allowed)):
        for last in range(first, len(allowed)):
            span = allowed[last] - allowed[first]
            assert last - first + 1 <= burst + span // (S // rate)


def test_refusals_cost_nothing() -> None:
    rate = RequestRate(1, 1)
    rate.take("a", S)
    for _ in range(100):
        assert rate.take("a", S) == S
    assert rate.take("a", 2 * S) == 0


def test_the_table_is_bounded_and_forgets_the_full_and_the_old() -> None:
    rate = RequestRate(1, 1, capacity=100)
    for client in range(1000):
        rate.take(client, S)
        assert len(rate) <= 100
    # All are as busy: the latest is still known.
    assert rate.take(999, S) > 0
    # An hour later the old ones' buckets are full: several go for each that comes.
    rate.take("new", 3600 * S)
    assert len(rate) < 100
    assert rate.take("new", 3600 * S) > 0


def test_a_client_in_use_outlives_idle_ones() -> None:
    rate = RequestRate(1, 1, capacity=10)
    for client in range(50):
        rate.take("busy", S)
        rate.take(client, S)
    assert rate.take("busy", S) > 0


def test_connections_per_client() -> None:
    count = ConnectionCount(2)
    assert [count.enter("a"), count.enter("a"), count.enter("a"), count.enter("b")] == [
        True,
        True,
        False,
        True,
    ]
    count.leave("a")
    assert count.enter("a")
    for client in ("a", "a", "b"):
        count.leave(client)
    assert len(count) == 0
    with pytest.raises(KeyError):
        count.leave("a")


def test_arguments() -> None:
    with pytest.raises(ValueError):
        RequestRate(0, 1)
    with pytest.raises(ValueError):
        ConnectionCount(0)


def test_retry_after_is_never_too_few() -> None:
    assert [retry_after_s(wait) for wait in (1, S, S + 1, 5 * S)] == [1, 1, 2, 5]
