"""What `tidegate trace` sums up: its intervals, no more and no less."""

from __future__ import annotations

from itertools import pairwise

from tidegate.kernel.tracing import Ages, Counts
from tidegate_tools import trace_view
from tidegate_tools.trace_view import Sample

S = 1_000_000_000


def sample(at_s: int, arrived: int, ages_ns: list[int], waiting: int = 0) -> Sample:
    buckets = [0] * 40
    for age_ns in ages_ns:
        buckets[age_ns.bit_length() - 1] += 1
    ages = Ages(len(ages_ns), sum(ages_ns), max(ages_ns, default=0), tuple(buckets))
    counts = Counts(arrived, len(ages_ns), len(ages_ns), len(ages_ns))
    return Sample(at_s * S, counts, ages, waiting, 0, 0, None)


def test_what_was_accepted_before_the_first_look_is_in_no_sum() -> None:
    early = [5_000_000_000] * 3
    looks = [sample(0, 0, early), sample(1, 2, [*early, 1000]), sample(2, 2, [*early, 1000, 3000])]
    intervals = [trace_view.between(a, b) for a, b in pairwise(looks)]
    summary = trace_view.summarize("/c", looks[0], looks[-1], 0, None)
    assert summary.arrived == sum(one.arrived for one in intervals) == 2
    assert summary.accepted == sum(one.accepted for one in intervals) == 2
    assert summary.gone == summary.half_closed == 2
    assert (summary.ages.count, summary.ages.sum_ns, sum(summary.ages.buckets)) == (2, 4000, 2)
    assert 3000 <= summary.ages.max_ns < 4096, "to its bucket: the greatest of all was before"
    assert summary.high_water_ns == summary.ages.max_ns


def test_what_waited_before_is_said() -> None:
    summary = trace_view.summarize("/c", sample(0, 0, [], waiting=3), sample(1, 0, [1000] * 3), 0, None)
    assert "established    0, and 3 that waited before" in trace_view.summary_text(summary)
    summary = trace_view.summarize("/c", sample(0, 0, []), sample(1, 3, [1000] * 3), 0, None)
    assert "established    3\n" in trace_view.summary_text(summary)
