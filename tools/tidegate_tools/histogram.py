"""Percentiles of ages: exact ones of a list, bounded ones of a log2 histogram."""

from __future__ import annotations

from collections.abc import Sequence


def percentile(sorted_values: Sequence[int], share: float) -> int | None:
    """The smallest value that at least `share` (0..1) do not exceed, by nearest rank. None of none."""
    if not sorted_values:
        return None
    rank = max(1, -int(-share * len(sorted_values) // 1))
    return sorted_values[min(rank, len(sorted_values)) - 1]


def bucket_percentile(buckets: Sequence[int], share: float, max_ns: int | None = None) -> int | None:
    """The same of a log2 histogram, ns: bucket b counts [2^b, 2^(b+1)).

    The answer is placed inside its bucket by rank, in even steps; it is off by less than a factor of two. The
    largest value seen, when given, bounds it. None when the histogram is empty.
    """
    total = sum(buckets)
    if total == 0:
        return None
    rank = max(1, -int(-share * total // 1))
    before = 0
    for index, number in enumerate(buckets):
        if number and before + number >= rank:
            low = 0 if index == 0 else 1 << index
            value = low + ((1 << (index + 1)) - low) * (rank - before) // number
            return value if max_ns is None else min(value, max_ns)
        before += number
    raise AssertionError("the ranks end at the total")


def bars(buckets: Sequence[int], width: int = 40) -> list[tuple[int, int, str]]:
    """(lower bound in ns, count, bar) from the first bucket in use to the last."""
    used = [index for index, number in enumerate(buckets) if number]
    if not used:
        return []
    top = max(buckets)
    rows = []
    for index in range(used[0], used[-1] + 1):
        number = buckets[index]
        length = max(1, round(number / top * width)) if number else 0
        rows.append((0 if index == 0 else 1 << index, number, "#" * length))
    return rows
