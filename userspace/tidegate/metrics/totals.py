"""What the rows of a snapshot come to: sums over workers, by listener and backend."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tidegate.metrics.histogram import FIRST_BUCKET, HISTOGRAM_WORDS, MAX, SUM
from tidegate.metrics.names import Kind, Metric, Scope, layout
from tidegate.metrics.segment import RowSnapshot


@dataclass(frozen=True, slots=True)
class Histogram:
    """Of times, ns; bucket b counts [2^b, 2^(b+1))."""

    count: int
    sum_ns: int
    max_ns: int
    buckets: tuple[int, ...]


@dataclass(slots=True)
class Total:
    """The sums of all rows with these labels; of one worker alone in scope WORKER."""

    scope: Scope
    labels: tuple[str, ...]
    worker: int | None
    words: list[int] = field(default_factory=list)

    def value(self, name: str, label_value: str = "") -> int:
        """A counter or gauge. Raises KeyError for a name that is not in the list."""
        return self.words[layout(self.scope).index(name, label_value)]

    def by_value(self, metric: Metric) -> dict[str, int]:
        """A counter or gauge with a label: every value of the closed list, those at 0 too."""
        return {value: self.value(metric.name, value) for value in metric.values}

    def histogram(self, name: str, label_value: str = "") -> Histogram:
        words = self.words
        at = layout(self.scope).index(name, label_value)
        buckets = tuple(words[at + FIRST_BUCKET : at + HISTOGRAM_WORDS])
        # a reader may come between two stores of observe(): the buckets decide, so that all figures agree
        return Histogram(sum(buckets), words[at + SUM], words[at + MAX], buckets)


def totals(snapshot: Iterable[RowSnapshot]) -> list[Total]:
    """One Total per worker in scope WORKER, per set of labels in the others, in order of first appearance.

    What only retired rows bear is left out. Where a live row bears the same labels, retired ones (of workers
    that are no more) still count, so that a sum never drops.
    """
    found: dict[tuple[Scope, tuple[str, ...], int | None], Total] = {}
    living = set()
    for row in snapshot:
        scope = row.key.scope
        key = (scope, row.key.labels, row.key.worker if scope is Scope.WORKER else None)
        if not row.retired:
            living.add(key)
        total = found.get(key)
        if total is None:
            found[key] = Total(*key, words=list(row.words))
        else:
            add(scope, total.words, row.words)
    return [total for key, total in found.items() if key in living]


def add(scope: Scope, to: list[int] | memoryview, words: Sequence[int]) -> None:
    """Add a row to another of the same scope, word by word; of two histograms' maxima the larger counts."""
    at = layout(scope)
    maxima = {
        at.index(metric.name, value) + MAX
        for metric in at.metrics
        if metric.kind is Kind.HISTOGRAM
        for value in metric.values or ("",)
    }
    for index, word in enumerate(words):
        if index in maxima:
            to[index] = max(to[index], word)
        else:
            to[index] += word
