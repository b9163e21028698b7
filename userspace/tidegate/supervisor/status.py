"""The `status` document: what tidegate does now, from shared memory and the kernel, no worker asked."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from tidegate import __version__
from tidegate.config.model import Backend, BackendMode
from tidegate.kernel.records import AGE_BUCKETS
from tidegate.metrics.names import METRICS, Scope
from tidegate.metrics.totals import Total, totals
from tidegate.supervisor import workers as states

if TYPE_CHECKING:
    from tidegate.supervisor.plan import ListenerGroup
    from tidegate.supervisor.supervisor import Supervisor

_DROPPED = next(metric for metric in METRICS if metric.name == "dropped_total")
_ENDED = next(metric for metric in METRICS if metric.name == "ended_total")


def document(supervisor: Supervisor) -> dict[str, Any]:
    """See docs/tools.md for the schema. Costs a few milliseconds."""
    supervisor.mirror_verdicts()
    rows = list(supervisor.segment.snapshot())
    if supervisor.predecessor is not None:
        rows += [row for row in supervisor.predecessor.snapshot() if row.key.scope is not Scope.WORKER]
    sums = totals(rows)
    listeners = {total.labels[0]: total for total in sums if total.scope is Scope.LISTENER}
    backends = {total.labels: total for total in sums if total.scope is Scope.BACKEND}
    loops = {total.worker: total for total in sums if total.scope is Scope.WORKER}
    half = supervisor.half
    return {
        "version": __version__,
        "pid": supervisor.pid,
        "uptime_s": round((time.monotonic_ns() - supervisor.started_ns) / 1e9, 3),
        "config": supervisor.path,
        "control": supervisor.config.control,
        "log_level": supervisor.config.log.level,
        "runtime_changes": supervisor.changes.describe(),
        "queue_age": {"source": supervisor.age.source, "reason": supervisor.age.reason},
        "cgroup": str(half.cgroup.path) if half is not None else "",
        "maps": half.map_ids() if half is not None else {},
        "steering": _steering(supervisor),
        "splice": {"by": supervisor.splice.by, "reason": supervisor.splice.reason},
        "workers": worker_list(supervisor, rows, loops),
        "listeners": [
            _listener(supervisor, group, listeners.get(group.name)) for group in supervisor.groups.groups
        ],
        "clusters": [
            {
                "name": cluster.name,
                "backends": [
                    _backend(b, backends.get((cluster.name, str(b.address))), supervisor.workers.running)
                    for b in cluster.backends
                ],
            }
            for cluster in supervisor.config.clusters
        ],
    }


def worker_list(
    supervisor: Supervisor, rows: list[Any], loops: dict[int | None, Total]
) -> list[dict[str, Any]]:
    """One entry per worker position."""
    now = time.monotonic_ns()
    result = []
    for worker in supervisor.workers.all:
        mine = {
            t.labels: t
            for t in totals(
                row for row in rows if row.key.scope is Scope.LISTENER and row.key.worker == worker.index
            )
        }
        beat = supervisor.heartbeat_ns(worker.index)
        state = worker.state
        if state == states.ACTIVE and now - beat > supervisor.config.hang_after_ns:
            state = "hung"
        loop = loops.get(worker.index)
        result.append(
            {
                "index": worker.index,
                "pid": worker.pid,
                "state": state,
                "heartbeat_age_ms": round((now - beat) / 1e6, 1) if worker.running and beat else None,
                "restarts": worker.restarts,
                "sessions": sum(t.value("sessions") for t in mine.values()),
                "queued": sum(t.value("queued") for t in mine.values()),
                "waiting": sum(
                    supervisor.groups.waiting_at(g, worker.index) for g in supervisor.groups.groups
                ),
                "thefts": sum(t.value("thefts_total") for t in mine.values()),
                "loop_iterations": loop.value("loop_iterations_total") if loop else 0,
                "loop_busy_ns": loop.value("loop_busy_ns_total") if loop else 0,
            }
        )
    return result


def _listener(supervisor: Supervisor, group: ListenerGroup, total: Total | None) -> dict[str, Any]:
    listener = group.listener
    address = listener.address
    if not address.port and group.socks and group.socks[0].fileno() >= 0:
        address = type(address)(address.host, group.socks[0].getsockname()[1])
    source = supervisor.age.source
    if group.shared and source == "bpf":
        source = "tcp_info"  # opened by systemd, outside our cgroup
    one = {
        "name": group.name,
        "address": str(address),
        "protocol": listener.protocol.value,
        "cluster": listener.cluster,
        "queue_age_source": source,
        "slots": list(group.slots),
        "backlog": listener.backlog,
        "stale_after_ms": listener.stale_after_ns / 1e6,
        "policy": listener.policy.value,
        "max_connections": listener.max_connections,
        "accept_queue": listener.accept_queue,
        "when_queue_full": listener.when_queue_full.value,
        "waiting": supervisor.groups.waiting(group),
        "accepted": 0,
        "sessions": 0,
        "queued": 0,
        "thefts": 0,
        "zombies": 0,
        "bytes_in": 0,
        "bytes_out": 0,
        "spliced": 0,
        "bytes_spliced": 0,
        "dropped": dict.fromkeys(_DROPPED.values, 0),
        "ended": dict.fromkeys(_ENDED.values, 0),
        "age_histogram": {"count": 0, "sum_ns": 0, "max_ns": 0, "buckets": [0] * AGE_BUCKETS},
    }
    if total is not None:
        ages = total.histogram("queue_age_ns")
        one |= {
            "accepted": total.value("accepted_total"),
            "sessions": total.value("sessions"),
            "queued": total.value("queued"),
            "thefts": total.value("thefts_total"),
            "zombies": total.value("zombies_total"),
            "bytes_in": total.value("received_bytes_total"),
            "bytes_out": total.value("sent_bytes_total"),
            "spliced": total.value("spliced_total"),
            "bytes_spliced": total.value("spliced_bytes_total"),
            "dropped": total.by_value(_DROPPED),
            "ended": total.by_value(_ENDED),
            "age_histogram": {
                "count": ages.count,
                "sum_ns": ages.sum_ns,
                "max_ns": ages.max_ns,
                "buckets": list(ages.buckets),
            },
        }
    return one


def _backend(backend: Backend, total: Total | None, workers: int) -> dict[str, Any]:
    usable = total.value("backend_usable_workers") if total else 0
    state = "up" if usable >= workers else "partly" if usable else "down"
    return {
        "address": str(backend.address),
        "weight": backend.weight,
        "mode": backend.mode.value,
        "state": state if backend.mode is BackendMode.READY else backend.mode.value,
        "connections": total.value("backend_current_connections") if total else 0,
        "connections_total": total.value("backend_connections_total") if total else 0,
        "connect_failures": total.value("backend_connect_failures_total") if total else 0,
    }


def _steering(supervisor: Supervisor) -> dict[str, Any]:
    groups = supervisor.groups
    if supervisor.half is None:
        reason = supervisor.age.reason or "the kernel half is not loaded"
        return {"by": "kernel_hash", "reason": reason}
    if groups.unsteered:
        return {"by": "kernel_hash", "reason": "; ".join(f"{k}: {v}" for k, v in groups.unsteered.items())}
    if supervisor.worker_count == 1:
        return {"by": "single_worker", "reason": ""}
    return {"by": supervisor.config.steer.value, "reason": ""}
