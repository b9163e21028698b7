"""Metrics as StatsD lines: snapshots in, lines and datagrams out. No I/O.

The names are those exposed to Prometheus, times in milliseconds. Counters are sent as what was added since
the last time, gauges as they are. A histogram is not sent as StatsD timings: we hold buckets, not values, and
what servers make of one timing that stands for many differs. It is evaluated here, over the time since the
last push: `.count` and `.sum` as counters; `.p50`, `.p90`, `.p99` and `.max` as gauges, 0 after nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Final

from tidegate.metrics.histogram import percentile
from tidegate.metrics.names import EXPOSED_PREFIX, Kind, Metric, Scope, layout
from tidegate.metrics.segment import RowSnapshot
from tidegate.metrics.totals import Histogram, Total, totals

# What an Ethernet frame of 1500 bytes leaves after the headers, rounded down as StatsD's own pages have it.
MAX_DATAGRAM: Final = 1432
QUANTILES: Final = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
_MS: Final = 1_000_000
_NOT_IN_A_NAME: Final = re.compile(r"[^A-Za-z0-9_-]")
_NOT_IN_A_TAG: Final = re.compile(r"[^!-~]|[|,#@]")

_Key = tuple[Scope, tuple[str, ...], int | None]  # as in Total
_Series = tuple[str, str]  # what stands before and behind the value and its type


def name_of(metric: Metric) -> str:
    """Its name here: as exposed, but times are in ms."""
    name = metric.exposed_name.removeprefix(EXPOSED_PREFIX)
    return name.replace("_seconds", "_ms") if metric.nanoseconds else name


class Deltas:
    """Knows what was told last, and so what there is to tell."""

    def __init__(self, tags: bool, told: Iterable[RowSnapshot] = ()) -> None:
        """`tags`: labels as DogStatsD has them, else as parts of the name. `told` counts as told already."""
        self._tags = tags
        self._told: dict[_Key, Total] = {_key(total): total for total in totals(told)}
        self._raised: set[_Series] = set()  # gauges that were not told 0 last

    def lines(self, rows: list[RowSnapshot]) -> list[str]:
        """What to send of a snapshot; it counts as told then."""
        out: list[str] = []
        gauges: dict[_Series, float] = {}
        for total in totals(rows):
            key = _key(total)
            old = self._told.get(key)
            if old is None:
                old = Total(*key, words=[0] * len(total.words))
            for metric in layout(total.scope).metrics:
                for value in metric.values or ("",):
                    if metric.kind is Kind.GAUGE:
                        gauges[self._series(metric, value, total)] = total.value(metric.name, value)
                    elif metric.kind is Kind.COUNTER:
                        added = _added(metric, total.value(metric.name, value), old.value(metric.name, value))
                        if added:
                            before, behind = self._series(metric, value, total)
                            out.append(f"{before}:{added}|c{behind}")
                    else:
                        self._histogram(metric, value, total, old, out, gauges)
            self._told[key] = total
        # A removed listener may come back and go on counting, for as long as its rows are kept.
        known = {(row.key.scope, row.key.labels) for row in rows}
        self._told = {key: total for key, total in self._told.items() if key[:2] in known}
        for before, behind in sorted(self._raised - gauges.keys()):
            out.append(f"{before}:0|g{behind}")
        for (before, behind), number in gauges.items():
            out.append(f"{before}:{_number(number)}|g{behind}")
        self._raised = {series for series, number in gauges.items() if number}
        return out

    def _histogram(
        self,
        metric: Metric,
        value: str,
        total: Total,
        old: Total,
        out: list[str],
        gauges: dict[_Series, float],
    ) -> None:
        now, then = total.histogram(metric.name, value), old.histogram(metric.name, value)
        buckets = tuple(a - b for a, b in zip(now.buckets, then.buckets, strict=True))
        if min(buckets) < 0:  # it began anew
            buckets, then = now.buckets, Histogram(0, 0, 0, (0,) * len(now.buckets))
        before, behind = self._series(metric, value, total)
        count = sum(buckets)
        if count:
            out.append(f"{before}.count:{count}|c{behind}")
            summed = now.sum_ns // _MS - then.sum_ns // _MS
            if summed > 0:
                out.append(f"{before}.sum:{summed}|c{behind}")
        # the largest is known exactly when it is a new one, else to its bucket
        top = max((index for index, number in enumerate(buckets) if number), default=None)
        largest = 0
        if top is not None:
            largest = now.max_ns if now.max_ns > then.max_ns else min((2 << top) - 1, now.max_ns)
        gauges[f"{before}.max", behind] = largest / _MS
        for name, share in QUANTILES:
            gauges[f"{before}.{name}", behind] = (percentile(buckets, share, largest) or 0) / _MS

    def _series(self, metric: Metric, value: str, total: Total) -> _Series:
        labels = list(zip(total.scope.label_names, total.labels, strict=True))
        if total.worker is not None:
            labels.append(("worker", str(total.worker)))
        name = name_of(metric)
        if self._tags:
            if metric.label:
                labels.append((metric.label, value))
            tags = ",".join(f"{label}:{_NOT_IN_A_TAG.sub('_', text)}" for label, text in labels)
            return f"tidegate.{name}", f"|#{tags}" if tags else ""
        parts = [_NOT_IN_A_NAME.sub("_", text) for _, text in labels]
        if total.scope is not Scope.PROCESS:
            parts.insert(0, total.scope.value)
        return ".".join(["tidegate", *parts, name, *([value] if metric.label else [])]), ""


def datagrams(lines: Iterable[str], limit: int = MAX_DATAGRAM) -> Iterator[bytes]:
    """As many lines in each as go into `limit` bytes; a line that is longer goes alone."""
    packed = bytearray()
    for line in lines:
        data = line.encode("ascii", "replace")
        if packed and len(packed) + 1 + len(data) > limit:
            yield bytes(packed)
            packed.clear()
        if packed:
            packed += b"\n"
        packed += data
    if packed:
        yield bytes(packed)


def _key(total: Total) -> _Key:
    return total.scope, total.labels, total.worker


def _added(metric: Metric, now: int, then: int) -> int:
    """A counter that is smaller than it was began anew. Of times the fraction of a ms waits for more."""
    if now < then:
        then = 0
    return now // _MS - then // _MS if metric.nanoseconds else now - then


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6f}".rstrip("0").rstrip(".")
