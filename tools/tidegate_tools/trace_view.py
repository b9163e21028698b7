"""What `tidegate trace` shows: figures per interval, and the summary at the end. No I/O.

The JSON is described in docs/tools/trace.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tidegate.kernel.tracing import Ages, Cost, Counts
from tidegate_tools import table
from tidegate_tools.histogram import bars, bucket_percentile
from tidegate_tools.queues import Queue
from tidegate_tools.table import Column

SCHEMA = 1
COLUMNS = [
    Column("TIME"),
    *(
        Column(title, right=True)
        for title in ("ARRIVED", "ACCEPTED", "GONE", "WAITING", "OLDEST", "P50", "P99", "MAX")
    ),
]
_WIDTHS = (8, 8, 8, 6, 8, 6, 6, 6, 6)


@dataclass(frozen=True, slots=True)
class Sample:
    """One look: what was counted so far, and who waits now."""

    at_ns: int  # CLOCK_MONOTONIC
    counts: Counts
    ages: Ages
    waiting: int
    untimed: int
    waiting_gone: int
    oldest_ns: int | None


@dataclass(frozen=True, slots=True)
class Interval:
    """What happened between two looks, and who waits at the second."""

    seconds: float
    arrived: int
    accepted: int
    gone: int  # accepted only to find that the client had reset
    waiting: int
    waiting_gone: int
    oldest_ns: int | None
    p50_ns: int | None
    p99_ns: int | None
    max_ns: int | None


def oldest_ns(queues: Sequence[Queue]) -> int | None:
    """The greatest age among those that wait; None when nobody does."""
    return max((queue.oldest_ns or 0 for queue in queues if queue.waiters), default=None)


def between(first: Sample, second: Sample) -> Interval:
    """The difference of two looks. The maximum is known to its histogram bucket, unless it is a new one."""
    ages = _ages_between(first.ages, second.ages)
    max_ns = ages.max_ns if ages.count else None
    return Interval(
        seconds=(second.at_ns - first.at_ns) / 1e9,
        arrived=second.counts.arrived - first.counts.arrived,
        accepted=second.counts.taken - first.counts.taken,
        gone=second.counts.gone - first.counts.gone,
        waiting=second.waiting,
        waiting_gone=second.waiting_gone,
        oldest_ns=second.oldest_ns,
        p50_ns=bucket_percentile(ages.buckets, 0.5, max_ns),
        p99_ns=bucket_percentile(ages.buckets, 0.99, max_ns),
        max_ns=max_ns,
    )


def _ages_between(first: Ages, second: Ages) -> Ages:
    buckets = tuple(b - a for a, b in zip(first.buckets, second.buckets, strict=True))
    top = max((index for index, number in enumerate(buckets) if number > 0), default=None)
    max_ns = second.max_ns
    if max_ns <= first.max_ns:  # it may be of before
        max_ns = 0 if top is None else min((2 << top) - 1, max_ns)
    return Ages(sum(buckets), second.sum_ns - first.sum_ns, max_ns, buckets)


def header() -> str:
    return _row([column.title for column in COLUMNS])


def line(interval: Interval, clock: str) -> str:
    """One interval for people; counts are per interval."""
    cells = [clock, *(table.count(n) for n in (interval.arrived, interval.accepted, interval.gone))]
    cells.append(table.count(interval.waiting))
    cells += [
        table.duration(ns) for ns in (interval.oldest_ns, interval.p50_ns, interval.p99_ns, interval.max_ns)
    ]
    return _row(cells)


def _row(cells: Sequence[str]) -> str:
    out = [cells[0].ljust(_WIDTHS[0])]
    out += [cell.rjust(width) for cell, width in zip(cells[1:], _WIDTHS[1:], strict=True)]
    return " ".join(out)


@dataclass(frozen=True, slots=True)
class Summary:
    """The whole of it. `untimed`: accepted by a server that did not ask for the address."""

    cgroup: str
    seconds: float
    arrived: int
    accepted: int
    gone: int
    half_closed: int
    waited_before: int  # established before the trace; `arrived` does not have them, what became of them does
    waiting: int
    waiting_gone: int
    untimed: int
    high_water_ns: int
    ages: Ages
    cost: list[Cost] | None


def summarize(
    cgroup: str, first: Sample, last: Sample, high_water_ns: int, cost: list[Cost] | None
) -> Summary:
    """From the first look to the last; `high_water_ns` is the oldest that any look saw waiting.

    As the intervals do, it leaves out what was accepted after the programs were attached and before the first
    look: with it there would be more accepted than came.
    """
    whole = between(first, last)
    ages = _ages_between(first.ages, last.ages)
    return Summary(
        cgroup=cgroup,
        seconds=whole.seconds,
        arrived=whole.arrived,
        accepted=whole.accepted,
        gone=whole.gone,
        half_closed=last.counts.half_closed - first.counts.half_closed,
        waited_before=first.waiting,
        waiting=last.waiting,
        waiting_gone=last.waiting_gone,
        untimed=last.untimed,
        high_water_ns=max(high_water_ns, ages.max_ns),
        ages=ages,
        cost=cost,
    )


def summary_text(summary: Summary) -> str:
    """For people: totals, the histogram as bars, the cost when it was asked for."""
    ages = summary.ages
    p50, p90, p99 = (bucket_percentile(ages.buckets, share, ages.max_ns) for share in (0.5, 0.9, 0.99))
    lines = [
        f"traced {summary.cgroup} for {summary.seconds:.1f} s",
        "",
        f"established    {summary.arrived}"
        + (f", and {summary.waited_before} that waited before" if summary.waited_before else ""),
        f"accepted       {summary.accepted}, of them reset while they waited {summary.gone}, "
        f"half-closed {summary.half_closed}",
        f"left waiting   {summary.waiting}, of them gone {summary.waiting_gone}",
        f"high water     {table.duration(summary.high_water_ns)}",
    ]
    if summary.untimed:
        lines.append(f"not timed      {summary.untimed} (the server accepts without asking for the address)")
    if ages.count:
        figures = (p50, p90, p99, ages.max_ns)
        lines.append(
            "age at accept  p50 {}, p90 {}, p99 {}, max {}".format(*(table.duration(ns) for ns in figures))
        )
        lines += ["", "AGE AT ACCEPT"]
        lines += [
            f"{table.duration(low) if low >= 1000 else f'{low}ns':>8} {number:>9} {bar}".rstrip()
            for low, number, bar in bars(ages.buckets)
        ]
    if summary.cost is not None:
        lines += ["", *_cost_lines(summary)]
    return "\n".join(lines)


def _cost_lines(summary: Summary) -> list[str]:
    assert summary.cost is not None
    total = sum(cost.run_ns for cost in summary.cost)
    lines = [
        f"cost  {cost.name}: {cost.runs} runs of {cost.run_ns / cost.runs:.0f} ns"
        for cost in summary.cost
        if cost.runs
    ]
    if summary.arrived:
        lines.append(f"cost  {total / summary.arrived:.0f} ns per connection, the measuring itself included")
    return lines or ["cost  nothing ran"]


def interval_json(interval: Interval) -> dict[str, Any]:
    return {"schema": SCHEMA, "kind": "interval", **asdict(interval)}


def summary_json(summary: Summary) -> dict[str, Any]:
    ages = summary.ages
    out = asdict(summary)
    out["ages"] = {
        "count": ages.count,
        "sum_ns": ages.sum_ns,
        "max_ns": ages.max_ns,
        "p50_ns": bucket_percentile(ages.buckets, 0.5, ages.max_ns),
        "p90_ns": bucket_percentile(ages.buckets, 0.9, ages.max_ns),
        "p99_ns": bucket_percentile(ages.buckets, 0.99, ages.max_ns),
        "buckets": list(ages.buckets),
    }
    out["cost"] = summary.cost and [cost._asdict() for cost in summary.cost]
    return {"schema": SCHEMA, "kind": "summary", **out}
