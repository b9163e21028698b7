"""Log2 histograms and their percentiles."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.metrics.histogram import (
    BUCKETS,
    COUNT,
    FIRST_BUCKET,
    HISTOGRAM_WORDS,
    MAX,
    SUM,
    bucket_of,
    observe,
    percentile,
)

OFFSET = 3
ages = st.integers(0, 2**20) | st.integers(0, 2**45)


def filled(values: list[int]) -> memoryview:
    words = memoryview(bytearray(8 * (OFFSET + HISTOGRAM_WORDS + 2))).cast("Q")
    for value in values:
        observe(words, OFFSET, value)
    return words


def buckets_of(words: memoryview) -> list[int]:
    return list(words[OFFSET + FIRST_BUCKET : OFFSET + HISTOGRAM_WORDS])


@given(ages)
def test_bucket_b_counts_from_2_to_the_b_to_twice_that(value: int) -> None:
    bucket = bucket_of(value)
    assert 0 <= bucket < BUCKETS
    assert bucket == 0 or value >= 2**bucket
    assert bucket == BUCKETS - 1 or value < 2 ** (bucket + 1)


@settings(max_examples=300)
@given(st.lists(ages))
def test_observe_counts_each_value_once_and_touches_nothing_else(values: list[int]) -> None:
    words = filled(values)
    assert words[OFFSET + COUNT] == len(values)
    assert words[OFFSET + SUM] == sum(values)
    assert words[OFFSET + MAX] == max(values, default=0)
    buckets = buckets_of(words)
    assert sum(buckets) == len(values)
    for bucket in range(BUCKETS):
        assert buckets[bucket] == sum(bucket_of(value) == bucket for value in values)
    assert not any(words[:OFFSET]) and not any(words[OFFSET + HISTOGRAM_WORDS :])


def test_a_negative_age_counts_as_zero() -> None:
    words = filled([-5])
    assert (words[OFFSET + COUNT], words[OFFSET + SUM], words[OFFSET + FIRST_BUCKET]) == (1, 0, 1)


@settings(max_examples=300)
@given(st.lists(st.integers(0, 2**39 - 1), min_size=1), st.floats(0, 1))
def test_percentiles_are_within_the_bucket_of_the_exact_answer(values: list[int], q: float) -> None:
    words = filled(values)
    exact = sorted(values)[max(1, math.ceil(q * len(values))) - 1]
    answer = percentile(buckets_of(words), q)
    assert answer is not None
    bucket = bucket_of(exact)
    assert (0 if bucket == 0 else 2**bucket) <= answer <= 2 ** (bucket + 1)


@given(st.lists(ages, min_size=1), st.floats(0, 1), st.floats(0, 1))
def test_percentiles_grow_with_q_and_end_at_the_maximum(values: list[int], one: float, other: float) -> None:
    words = filled(values)
    buckets, top = buckets_of(words), words[OFFSET + MAX]
    low = percentile(buckets, min(one, other), top)
    high = percentile(buckets, max(one, other), top)
    assert low is not None and high is not None
    assert low <= high <= top
    if top < 2 ** (BUCKETS - 1):  # the last bucket has no end of its own
        assert percentile(buckets, 1.0, top) == top


def test_values_are_spread_evenly_within_their_bucket() -> None:
    buckets = [0] * BUCKETS
    buckets[10] = 4  # 1024..2048
    assert [percentile(buckets, q) for q in (0.0, 0.25, 0.5, 0.75, 1.0)] == [1024, 1280, 1536, 1792, 2048]
    buckets[12] = 4  # 4096..8192: the median is still the end of the first half
    assert [percentile(buckets, q) for q in (0.25, 0.5, 0.625, 1.0)] == [1536, 2048, 5120, 8192]


def test_nothing_counted_has_no_percentile() -> None:
    assert percentile([0] * BUCKETS, 0.5) is None


@pytest.mark.parametrize("q", [-0.1, 1.1, 50, math.nan])
def test_shares_are_not_per_cent(q: float) -> None:
    with pytest.raises(ValueError, match="share"):
        percentile([1], q)


def test_the_kernel_sides_histogram_has_the_same_form() -> None:
    header = (Path(__file__).parents[3] / "bpf" / "records.h").read_text("ascii")
    assert int(re.search(r"#define AGE_BUCKETS (\d+)", header)[1]) == BUCKETS  # type: ignore[index]
    fields = re.search(r"struct age_histogram \{(.*?)\};", header, re.DOTALL)[1]  # type: ignore[index]
    assert re.findall(r"__u64 (\w+)", fields)[:4] == ["count", "sum_ns", "max_ns", "buckets"]
    assert (COUNT, SUM, MAX, FIRST_BUCKET) == (0, 1, 2, 3)
