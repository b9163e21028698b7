"""Metrics as Prometheus text: totals in, text out.

Format 0.0.4, https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from tidegate.metrics.histogram import BUCKETS
from tidegate.metrics.names import METRICS, Kind, Metric, Scope
from tidegate.metrics.totals import Total

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

# Bounds below a microsecond tell nothing that matters and would be a quarter of all lines.
FIRST_EXPOSED_BUCKET: Final = 9  # up to 2^10 ns
_BOUNDS: Final = tuple(range(FIRST_EXPOSED_BUCKET, BUCKETS - 1))


def render(totals: Sequence[Total]) -> str:
    """The exposition of these totals; a metric that no total has is left out."""
    by_scope: dict[Scope, list[Total]] = {}
    for total in totals:
        by_scope.setdefault(total.scope, []).append(total)
    lines: list[str] = []
    for metric in METRICS:
        if found := by_scope.get(metric.scope):
            lines.append(f"# HELP {metric.exposed_name} {_escape_help(metric.help)}")
            lines.append(f"# TYPE {metric.exposed_name} {metric.kind.value}")
            for total in found:
                _series(lines, metric, total)
    lines.append("")
    return "\n".join(lines)


def _series(lines: list[str], metric: Metric, total: Total) -> None:
    row_labels = list(zip(metric.scope.label_names, total.labels, strict=True))
    if total.worker is not None:
        row_labels.append(("worker", str(total.worker)))
    for value in metric.values or ("",):
        labels = [*row_labels, (metric.label, value)] if metric.label else row_labels
        if metric.kind is Kind.HISTOGRAM:
            _histogram(lines, metric, total, value, labels)
        else:
            number = total.value(metric.name, value)
            text = seconds(number) if metric.nanoseconds else str(number)
            lines.append(f"{metric.exposed_name}{_labels(labels)} {text}")


def _histogram(
    lines: list[str], metric: Metric, total: Total, value: str, labels: list[tuple[str, str]]
) -> None:
    histogram = total.histogram(metric.name, value)
    name = metric.exposed_name
    below = sum(histogram.buckets[:FIRST_EXPOSED_BUCKET])
    for bucket in _BOUNDS:
        below += histogram.buckets[bucket]
        bound = seconds(1 << (bucket + 1))
        lines.append(f"{name}_bucket{_labels([*labels, ('le', bound)])} {below}")
    lines.append(f"{name}_bucket{_labels([*labels, ('le', '+Inf')])} {histogram.count}")
    lines.append(f"{name}_sum{_labels(labels)} {seconds(histogram.sum_ns)}")
    lines.append(f"{name}_count{_labels(labels)} {histogram.count}")


def seconds(ns: int) -> str:
    """Nanoseconds as decimal seconds, exact: a float would round sums of more than 104 days."""
    whole, rest = divmod(ns, 1_000_000_000)
    return f"{whole}.{rest:09d}".rstrip("0").rstrip(".") if rest else str(whole)


def _labels(labels: Iterable[tuple[str, str]]) -> str:
    text = ",".join(f'{name}="{_escape_value(value)}"' for name, value in labels)
    return f"{{{text}}}" if text else ""


def _escape_value(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _escape_help(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")
