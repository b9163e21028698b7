"""Log2 histograms of times: `count, sum, max, buckets[40]`, as the kernel side's struct age_histogram.

Bucket b counts values in [2^b, 2^(b+1)) ns, the first one 0 as well, the last one everything above: from a
nanosecond to nine minutes, off by less than a factor of two, in 43 words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

BUCKETS: Final = 40
COUNT, SUM, MAX, FIRST_BUCKET = range(4)
HISTOGRAM_WORDS: Final = FIRST_BUCKET + BUCKETS
_LAST: Final = BUCKETS - 1


def bucket_of(value: int) -> int:
    """The bucket a value (>= 0) belongs to."""
    bucket = value.bit_length() - 1
    return 0 if bucket < 0 else min(bucket, _LAST)


def observe(words: memoryview, index: int, value: int) -> None:
    """Add one value, ns, to the histogram at `index`. A negative one (clocks misread) counts as 0."""
    words[index] += 1
    if value > 0:
        words[index + 1] += value
        if value > words[index + 2]:
            words[index + 2] = value
        bucket = value.bit_length()
        index += bucket if bucket <= BUCKETS else BUCKETS
    else:
        index += 1
    words[index + 2] += 1  # FIRST_BUCKET, less the one that bit_length() is ahead


def percentile(buckets: Sequence[int], q: float, max_ns: int | None = None) -> int | None:
    """The value, ns, that a share `q` (0..1) of those counted does not exceed; None when there are none.

    Values are taken to be spread evenly within their bucket, so the answer is off by less than a factor of
    two. `max_ns`, the largest value seen, bounds it; without it the last bucket is taken to end at twice its
    beginning. Raises ValueError for a `q` outside 0..1.
    """
    if not 0.0 <= q <= 1.0:
        raise ValueError(f"a share lies between 0 and 1, not at {q}")
    total = sum(buckets)
    if total == 0:
        return None
    rank = q * total
    below = 0
    value = 0
    for bucket, number in enumerate(buckets):
        if number == 0:
            continue
        low = 0 if bucket == 0 else 1 << bucket
        width = (1 << (bucket + 1)) - low
        if below + number >= rank:
            value = low + int(width * max(0.0, rank - below) / number)
            break
        below += number
    return value if max_ns is None else min(value, max_ns)
