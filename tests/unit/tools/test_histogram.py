"""Percentiles against a plain model."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate_tools.histogram import bars, bucket_percentile, percentile

AGES = st.lists(st.integers(0, 2**38), min_size=1, max_size=60)
SHARES = st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0])


def log2_buckets(values: list[int]) -> list[int]:
    buckets = [0] * 40
    for value in values:
        buckets[max(0, value.bit_length() - 1)] += 1
    return buckets


@settings(deadline=None)
@given(AGES, SHARES)
def test_percentile_is_the_nearest_rank(values: list[int], share: float) -> None:
    values.sort()
    got = percentile(values, share)
    assert got is not None
    assert sum(value <= got for value in values) >= share * len(values)
    assert got == values[0] or sum(value < got for value in values) < share * len(values)


@settings(deadline=None)
@given(AGES, SHARES)
def test_bucket_percentile_is_in_the_right_bucket(values: list[int], share: float) -> None:
    values.sort()
    exact = percentile(values, share)
    got = bucket_percentile(log2_buckets(values), share, max(values))
    assert exact is not None
    assert got is not None
    assert got <= max(values)
    low = 0 if exact < 2 else 2 ** int(math.log2(exact))
    assert low <= got <= max(2, low * 2)


def test_nothing_has_no_percentile() -> None:
    assert percentile([], 0.5) is None
    assert bucket_percentile([0] * 40, 0.5) is None


@pytest.mark.parametrize("share", [0.5, 0.99])
def test_one_value(share: float) -> None:
    assert percentile([7], share) == 7
    assert bucket_percentile(log2_buckets([7]), share, 7) == 7


def test_bars_span_what_is_used() -> None:
    buckets = [0] * 40
    buckets[3], buckets[5] = 100, 1
    assert bars(buckets, 10) == [(8, 100, "#" * 10), (16, 0, ""), (32, 1, "#")]
    assert bars([0] * 40) == []
