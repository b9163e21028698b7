"""Counters across the death of their writers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from tidegate.metrics.names import LISTENER, DropReason, EndReason, Kind, Scope, layout
from tidegate.metrics.segment import SUPERVISOR, Row, RowKey, RowSnapshot, Segment
from tidegate.metrics.totals import add

_ACCEPTED: Final = LISTENER.index("accepted_total")
_BEGUN: Final = LISTENER.index("sessions_total")
_DROPPED: Final = tuple(LISTENER.index("dropped_total", reason.value) for reason in DropReason)
_ENDED: Final = tuple(LISTENER.index("ended_total", reason.value) for reason in EndReason)
_DROPPED_BY_DEATH: Final = LISTENER.index("dropped_total", DropReason.WORKER_DIED)
_ENDED_BY_DEATH: Final = LISTENER.index("ended_total", EndReason.WORKER_DIED)


def worker_died(segment: Segment, worker: int) -> tuple[int, int]:
    """Account for what a dead worker had in hand; returns (sessions lost, waiting connections lost).

    For the supervisor, once the worker is reaped and before its replacement writes. What was accepted is
    either waiting, dropped or a session, and a session is under way or ended: what is missing in those sums
    died with the worker. They are exact to the one connection that it may have been counting when it died.
    """
    sessions = waiting = 0
    for row in segment.rows():
        if row.key.worker != worker:
            continue
        if row.key.scope is Scope.LISTENER and not row.retired:
            words = row.words
            lost = words[_BEGUN] - sum(words[index] for index in _ENDED)
            if lost > 0:
                words[_ENDED_BY_DEATH] += lost
                sessions += lost
            lost = words[_ACCEPTED] - words[_BEGUN] - sum(words[index] for index in _DROPPED)
            if lost > 0:
                words[_DROPPED_BY_DEATH] += lost
                waiting += lost
        row.reset_gauges()
    return sessions, waiting


def carry_over(segment: Segment, predecessor: Iterable[RowSnapshot]) -> None:
    """Add the counters of a predecessor's segment, taken when its last worker had ended, to this one.

    They go into the supervisor's rows of the same labels, which no worker writes; what only retired rows
    bore is dropped. Per-worker counters start anew: the workers are others.
    """
    rows = list(predecessor)
    living = {(row.key.scope, row.key.labels) for row in rows if not row.retired}
    into: dict[RowKey, Row] = {}
    for old in rows:
        scope, labels = old.key.scope, old.key.labels
        if scope is Scope.WORKER or (scope, labels) not in living:
            continue
        key = RowKey(scope, SUPERVISOR, labels)
        row = into.get(key) or into.setdefault(key, segment.row(key))
        words = list(old.words)
        at = layout(scope)
        for metric in at.metrics:
            if metric.kind is Kind.GAUGE:
                for value in metric.values or ("",):
                    words[at.index(metric.name, value)] = 0
        add(scope, row.words, words)
