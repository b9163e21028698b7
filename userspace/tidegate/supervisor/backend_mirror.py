"""A worker's figures about its backends, brought into shared memory now and then."""

from __future__ import annotations

from collections.abc import Iterable

from tidegate.cluster.backend import BackendState
from tidegate.cluster.balance import ClusterState
from tidegate.metrics.names import BACKEND, Scope
from tidegate.metrics.segment import RowKey, Segment

_CURRENT = BACKEND.index("backend_current_connections")
_USABLE = BACKEND.index("backend_usable_workers")
_MADE = BACKEND.index("backend_connections_total")
_FAILED = BACKEND.index("backend_connect_failures_total")


class BackendMirror:
    """Adds differences, so that counters survive a worker and a backend that comes back."""

    def __init__(self, segment: Segment, worker: int) -> None:
        self._segment = segment
        self._worker = worker
        self._told: dict[BackendState, tuple[int, int]] = {}
        self._rows: dict[tuple[str, str], memoryview | None] = {}

    def forget_rows(self) -> None:
        """After a reload: the directory of rows may have changed."""
        self._rows.clear()

    def update(self, clusters: Iterable[ClusterState], now_ns: int) -> None:
        """A host name's addresses are summed under the name, as configured."""
        told: dict[BackendState, tuple[int, int]] = {}
        for cluster in clusters:
            active: dict[str, int] = {str(b.address): 0 for b in cluster.config.backends}
            usable = {str(b.origin) for b in cluster.backends if b.usable(now_ns)}
            for backend in (*cluster.backends, *cluster.draining()):
                name = str(backend.origin)
                made, failed = backend.connections_total, backend.connect_failures_total
                before = self._told.get(backend, (0, 0))
                told[backend] = (made, failed)
                active[name] = active.get(name, 0) + backend.active
                if (made, failed) != before:
                    words = self._words(cluster, name)
                    if words is not None:
                        words[_MADE] += made - before[0]
                        words[_FAILED] += failed - before[1]
            for name, count in active.items():
                words = self._words(cluster, name)
                if words is not None:
                    words[_CURRENT] = count
                    words[_USABLE] = name in usable
        self._told = told

    def _words(self, cluster: ClusterState, backend: str) -> memoryview | None:
        labels = (cluster.config.name, backend)
        if labels not in self._rows:
            row = self._segment.find(RowKey(Scope.BACKEND, self._worker, labels))
            self._rows[labels] = row.words if row is not None else None
        return self._rows[labels]
