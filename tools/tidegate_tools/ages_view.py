"""What `tidegate ages` shows of a snapshot: selection, order, the text and the JSON. No I/O.

The JSON is described in docs/tools/ages.md; `schema` is raised when a field changes its meaning or goes.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tidegate.kernel.sock_diag import info_resolution_ns
from tidegate_tools import table
from tidegate_tools.histogram import bucket_percentile
from tidegate_tools.owners import Owner, Owners
from tidegate_tools.queues import Queue, Source, Waiter
from tidegate_tools.snapshot import Snapshot
from tidegate_tools.table import Column

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Selection:
    """What the command line asked for. `connections`: how many to list, 0 for none."""

    patterns: Sequence[str] = ()
    busy: bool = False
    min_age_ns: int = 0
    sort: str = "oldest"
    connections: int = 0


@dataclass(slots=True)
class Row:
    """A queue with what else is known about it. `served`: its entry in tidegate's status, if it is its."""

    queue: Queue
    owner: Owner | None
    served: dict[str, Any] | None

    @property
    def name(self) -> str:
        return str(self.served["name"]) if self.served else ""


@dataclass(slots=True)
class View:
    rows: list[Row]
    selection: Selection
    status: dict[str, Any] | None
    notes: list[str]
    taken_ns: int
    took_ns: int
    unasked: str = ""  # why `status` is None, when one may run


def build(
    snapshot: Snapshot,
    owners: Owners,
    status: dict[str, Any] | None,
    selection: Selection,
    unasked: str = "",
) -> View:
    """The rows that were asked for, in order."""
    served = {str(one["address"]): one for one in (status or {}).get("listeners", ())}
    rows = []
    for queue in snapshot.queues:
        owner = next((owners.by_inode[s.inode] for s in queue.sockets if s.inode in owners.by_inode), None)
        mine = served.get(queue.address) if not queue.netns else None
        row = Row(queue, owner, mine)
        if _wanted(row, selection):
            rows.append(row)
    rows.sort(key=_order(selection.sort))
    notes = list(snapshot.notes)
    if owners.hidden and any(row.owner is None for row in rows):
        more = "" if owners.by_root else "; root sees more"
        notes.append(f"some processes may not be looked into{more}")
    return View(rows, selection, status, notes, snapshot.taken_ns, snapshot.took_ns, unasked)


def _wanted(row: Row, selection: Selection) -> bool:
    if selection.busy and not row.queue.waiting:
        return False
    if selection.min_age_ns and (row.queue.oldest_ns or 0) < selection.min_age_ns:
        return False
    return not selection.patterns or any(matches(row, pattern) for pattern in selection.patterns)


def matches(row: Row, pattern: str) -> bool:
    """By port, address, host, process (name or number), or the name tidegate's configuration gives it."""
    queue, owner = row.queue, row.owner
    if pattern.isdecimal():
        number = int(pattern)
        return queue.port == number or (owner is not None and number in owner.pids)
    names = {queue.address, queue.host, f":{queue.port}", row.name}
    if owner is not None:
        names |= {owner.name, str(owner)}
    return pattern in names


def _order(sort: str) -> Any:
    def key(row: Row) -> tuple[Any, ...]:
        queue = row.queue
        place = (
            queue.netns,
            socket.AF_INET6 if ":" in queue.host else socket.AF_INET,
            queue.port,
            queue.host,
        )
        match sort:
            case "waiting":
                return (-queue.waiting, *place)
            case "gone":
                return (-queue.gone, *place)
            case "address":
                return place
            case "process":
                return (row.owner.name if row.owner else "~", *place)
            case _:
                return (-(queue.oldest_ns or 0), -queue.waiting, *place)

    return key


def as_text(view: View) -> str:
    """One or more tables, and what must be said about them."""
    matching = f" matches {' '.join(view.selection.patterns)}" if view.selection.patterns else ""
    parts = [_queues(view.rows) or f"no TCP listener{matching}"]
    if view.selection.connections:
        parts.append(_connections(view) or "nobody waits")
    accepted = _accepted(view)
    if accepted:
        parts.append(accepted)
    notes = list(view.notes)
    if any(row.queue.source is Source.TCP_INFO for row in view.rows):
        notes.append(f"tcp_info: ages in steps of {table.duration(info_resolution_ns())}")
    if any(row.queue.dead for row in view.rows):
        notes.append("reset clients are counted, but no longer have an age")
    if notes:
        parts.append("\n".join(f"note: {note}" for note in notes))
    return "\n\n".join(parts)


def _queues(rows: Sequence[Row]) -> str:
    # columns that say nothing on most hosts appear when they do
    named = any(row.queue.netns for row in rows)
    dropped = any(row.queue.drops for row in rows)
    columns = [Column("LISTENER", flex=True), Column("PROCESS", flex=True)]
    columns += [Column("NETNS", flex=True)] if named else []
    columns += [Column(title, right=True) for title in ("WAITING", "GONE", "OLDEST", "P50", "P99", "SYN")]
    columns += [Column("DROPS", right=True)] if dropped else []
    columns += [Column("SOURCE")]
    cells = []
    for row in rows:
        queue = row.queue
        line: list[object] = [queue.address, row.owner or "-"]
        line += [queue.netns or "-"] if named else []
        line += [
            f"{table.count(queue.waiting)}/{table.count(queue.backlog)}",
            table.count(queue.gone),
            table.duration(queue.oldest_ns),
            table.duration(queue.percentile_ns(0.5)),
            table.duration(queue.percentile_ns(0.99)),
            table.count(queue.half_open),
        ]
        line += [table.count(queue.drops)] if dropped else []
        cells.append([*line, queue.source or "-"])
    return table.table(columns, cells)


def _connections(view: View) -> str:
    waiters = _oldest(view)
    columns = [
        Column("LISTENER", flex=True),
        Column("CLIENT", flex=True),
        Column("AGE", right=True),
        Column("RECEIVED", right=True),
        Column("STATE"),
        Column("SOURCE"),
    ]
    cells = [
        [
            row.queue.address,
            one.peer,
            table.duration(one.age_ns),
            table.size(one.received),
            one.state,
            one.source,
        ]
        for row, one in waiters
    ]
    text = table.table(columns, cells)
    total = sum(len(row.queue.waiters) for row in view.rows)
    if total > len(waiters):
        text += f"\n(the oldest {len(waiters)} of {total}; --limit shows more)"
    return text


def _oldest(view: View) -> list[tuple[Row, Waiter]]:
    pairs = [(row, one) for row in view.rows for one in row.queue.waiters]
    pairs.sort(key=lambda pair: (-pair[1].age_ns, pair[1].cookie))
    return pairs[: view.selection.connections]


def _accepted(view: View) -> str:
    rows = [row for row in view.rows if row.served]
    if not rows or view.status is None:
        return ""
    columns = [Column("TIDEGATE", flex=True)]
    columns += [Column(title, right=True) for title in ("ACCEPTED", "P50", "P90", "P99", "MAX")]
    columns += [Column("DROPPED", flex=True)]
    cells = []
    for row in rows:
        assert row.served is not None
        ages = accepted_ages(row.served)
        figures = [table.duration(ages[name]) for name in ("p50_ns", "p90_ns", "p99_ns", "max_ns")]
        accepted = table.count(row.served["accepted"])
        cells.append([row.name, accepted, *figures, table.reasons(row.served["dropped"])])
    source = view.status["queue_age"]["source"]
    # its counters are handed on by an upgrade: they are not of this process alone
    title = f"Ages at accept since tidegate started, upgrades included (by {source}):\n"
    return title + table.table(columns, cells)


def accepted_ages(served: dict[str, Any]) -> dict[str, Any]:
    """Percentiles of the ages that tidegate found when it accepted, from its histogram."""
    histogram = served["age_histogram"]
    buckets, top = histogram["buckets"], histogram["max_ns"]
    return {
        "count": histogram["count"],
        "p50_ns": bucket_percentile(buckets, 0.5, top),
        "p90_ns": bucket_percentile(buckets, 0.9, top),
        "p99_ns": bucket_percentile(buckets, 0.99, top),
        "max_ns": top if histogram["count"] else None,
        "sum_ns": histogram["sum_ns"],
        "buckets": buckets,
    }


def as_json(view: View) -> dict[str, Any]:
    """The documented form."""
    status = view.status
    return {
        "schema": SCHEMA,
        "monotonic_ns": view.taken_ns,
        "took_ns": view.took_ns,
        "tcp_info_resolution_ns": info_resolution_ns(),
        "tidegate": status and {key: status[key] for key in ("pid", "version", "queue_age")},
        "listeners": [_row_json(row, bool(view.selection.connections)) for row in view.rows],
        "notes": [*view.notes, *([view.unasked] if view.unasked else [])],
    }


def _row_json(row: Row, connections: bool) -> dict[str, Any]:
    queue, owner, served = row.queue, row.owner, row.served
    out: dict[str, Any] = {
        "address": queue.address,
        "netns": queue.netns,
        "interface": queue.ifindex,
        "process": owner and {"pid": owner.pid, "name": owner.name, "pids": list(owner.pids)},
        "sockets": len(queue.sockets),
        "backlog": queue.backlog,
        "waiting": queue.waiting,
        "gone": queue.gone,
        "reset": queue.dead,
        "left": queue.left,
        "half_open": queue.half_open,
        "drops": queue.drops,
        "oldest_ns": queue.oldest_ns,
        "p50_ns": queue.percentile_ns(0.5),
        "p90_ns": queue.percentile_ns(0.9),
        "p99_ns": queue.percentile_ns(0.99),
        "source": queue.source,
        "name": row.name or None,
        "accepted": served and served["accepted"],
        "dropped": served and served["dropped"],
        "accepted_ages": served and accepted_ages(served),
    }
    if connections:
        out["connections"] = [
            {
                "client": one.peer,
                "local": one.local,
                "age_ns": one.age_ns,
                "established_ns": one.established_ns,
                "source": one.source,
                "received": one.received,
                "state": one.state,
                "cookie": one.cookie,
            }
            for one in sorted(queue.waiters, key=lambda one: -one.age_ns)
        ]
    return out
