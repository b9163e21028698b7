"""Accept queues as an operator sees them: listeners, and the connections that wait at each. No I/O.

Sockets that listen on the same address and interface of one network namespace (a reuseport group) are one
queue here, for a waiting connection does not tell which of them holds it.
"""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from tidegate.kernel.records import Stamp, StampFlag
from tidegate.kernel.sock_diag import HalfOpenSocket, ListenSocket, QueuedSocket
from tidegate_tools.histogram import percentile

_MAPPED = "::ffff:"
_STAMP_SIZE = ctypes.sizeof(Stamp)


class Source(StrEnum):
    """Where an age comes from, the most exact first."""

    STAMP = "stamp"  # tidegate's own program
    ATTACHED = "attached"  # the socket itself, asked by the program of a `tidegate trace` that runs
    TCP_INFO = "tcp_info"  # the kernel's own book-keeping, in ticks


@dataclass(slots=True)
class Waiter:
    """One connection that waits for accept()."""

    peer: str
    local: str
    age_ns: int
    established_ns: int  # CLOCK_MONOTONIC
    source: Source
    received: int  # bytes
    half_closed: bool
    left: bool
    cookie: int

    @property
    def state(self) -> str:
        if self.left:
            return "left"
        return "half-closed" if self.half_closed else "open"


@dataclass(slots=True)
class Queue:
    """The accept queue of one address: one listening socket, or a reuseport group."""

    address: str
    host: str
    port: int
    ifindex: int
    netns: str  # "" is the one we are in
    sockets: list[ListenSocket]
    waiters: list[Waiter] = field(default_factory=list)
    half_open: int = 0
    dead: int = 0  # reset while they waited: still in the queue, and no longer a socket that can be listed

    @property
    def backlog(self) -> int:
        return sum(listener.backlog for listener in self.sockets)

    @property
    def drops(self) -> int:
        """What its full queues threw away: clients that the ages do not tell of."""
        return sum(listener.drops for listener in self.sockets)

    @property
    def waiting(self) -> int:
        """All that accept() would return, the dead included."""
        return len(self.waiters) + self.dead

    @property
    def left(self) -> int:
        return sum(waiter.left for waiter in self.waiters)

    @property
    def gone(self) -> int:
        """Clients that are no longer there: reset, or FIN without a byte."""
        return self.dead + self.left

    @property
    def oldest_ns(self) -> int | None:
        return max((waiter.age_ns for waiter in self.waiters), default=None)

    def percentile_ns(self, share: float) -> int | None:
        """Of the ages of those that wait now."""
        return percentile(sorted(waiter.age_ns for waiter in self.waiters), share)

    @property
    def source(self) -> Source | None:
        """The least exact source among the ages shown; None when nobody waits."""
        sources = {waiter.source for waiter in self.waiters}
        return next((source for source in reversed(Source) if source in sources), None)


def address_text(host: str, port: int) -> str:
    """host:port, as a configuration has it; an IPv4 address on an IPv6 socket is shown as IPv4."""
    host = host.removeprefix(_MAPPED) if "." in host else host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class QueueTable:
    """Finds the queue that a connection waits in, the way the kernel's listener look-up does."""

    def __init__(self, listeners: Iterable[ListenSocket], netns: str = "") -> None:
        self._by_port: dict[int, dict[tuple[int, str, int], Queue]] = {}
        self._cache: dict[tuple[int, str, int, int], Queue | None] = {}
        for listener in listeners:
            queues = self._by_port.setdefault(listener.port, {})
            key = (listener.family, listener.host, listener.ifindex)
            queue = queues.get(key)
            if queue is None:
                address = address_text(listener.host, listener.port)
                queue = Queue(address, listener.host, listener.port, listener.ifindex, netns, [])
                queues[key] = queue
            queue.sockets.append(listener)

    def queues(self) -> list[Queue]:
        return [queue for queues in self._by_port.values() for queue in queues.values()]

    def find(self, family: int, host: str, port: int, ifindex: int) -> Queue | None:
        """The queue of a connection with this local end; None when its listener is gone."""
        key = (family, host, port, ifindex)
        if key not in self._cache:
            self._cache[key] = self._look_up(family, host, port, ifindex)
        return self._cache[key]

    def _look_up(self, family: int, host: str, port: int, ifindex: int) -> Queue | None:
        best: tuple[int, Queue] | None = None
        for (bound_family, bound_host, bound_ifindex), queue in self._by_port.get(port, {}).items():
            if bound_ifindex not in (0, ifindex):
                continue
            exact = bound_family == family and bound_host == host
            if not exact and not _wildcard_covers(queue, bound_family, bound_host, family, host):
                continue
            score = 4 * exact + 2 * (bound_ifindex != 0) + (bound_family == family)
            if best is None or score > best[0]:
                best = (score, queue)
        return best[1] if best else None


def _wildcard_covers(queue: Queue, bound_family: int, bound_host: str, family: int, host: str) -> bool:
    if bound_family == socket.AF_INET:
        return bound_host == "0.0.0.0" and family == socket.AF_INET
    if bound_host != "::":
        return False
    is_ipv4 = family == socket.AF_INET or host.startswith(_MAPPED)
    return not (is_ipv4 and all(listener.v6only for listener in queue.sockets))


def collect(
    table: QueueTable,
    waiting: Iterable[QueuedSocket],
    half_open: Iterable[HalfOpenSocket],
    after: Iterable[ListenSocket],
    stamp_maps: Mapping[int, Source],
) -> None:
    """Fills the queues of `table`.

    `after`: the listeners once more, read after the rest. A queue's dead are what the kernel counts and does
    not list, and while connections come and go the smaller of the two counts errs on the side of fewer.
    """
    for entry in waiting:
        queue = table.find(entry.family, entry.host, entry.port, entry.ifindex)
        if queue is not None:
            queue.waiters.append(waiter(entry, stamp_maps))
    for handshake in half_open:
        queue = table.find(handshake.family, handshake.host, handshake.port, handshake.ifindex)
        if queue is not None:
            queue.half_open += 1
    later = {listener.cookie: listener.waiting for listener in after}
    for queue in table.queues():
        counted = sum(min(one.waiting, later.get(one.cookie, 0)) for one in queue.sockets)
        queue.dead = max(0, counted - len(queue.waiters))


def waiter(entry: QueuedSocket, stamp_maps: Mapping[int, Source]) -> Waiter:
    """Its age by the best source that the answer has."""
    age_ns, source = entry.info_age_ns or 0, Source.TCP_INFO
    if entry.established_ns:
        age_ns, source = max(0, entry.seen_ns - entry.established_ns), Source.ATTACHED
    for map_id, value in entry.storages.items():
        found = stamp_maps.get(map_id)
        if found is None or len(value) < _STAMP_SIZE:
            continue
        stamp = Stamp.from_buffer_copy(value)
        if not stamp.established_ns or stamp.flags & StampFlag.LISTENER:
            continue
        if source is Source.TCP_INFO or found is Source.STAMP:
            age_ns, source = max(0, entry.seen_ns - stamp.established_ns), found
    return Waiter(
        peer=address_text(entry.peer_host, entry.peer_port),
        local=address_text(entry.host, entry.port),
        age_ns=age_ns,
        established_ns=entry.seen_ns - age_ns,
        source=source,
        received=entry.received,
        half_closed=entry.half_closed,
        left=entry.left,
        cookie=entry.cookie,
    )


def settle(queues: Sequence[Queue], again: Sequence[Queue]) -> None:
    """Takes the smaller number of dead of two looks: connections that came and went between them are not."""
    second = {(queue.netns, queue.address, queue.ifindex): queue.dead for queue in again}
    for queue in queues:
        queue.dead = min(queue.dead, second.get((queue.netns, queue.address, queue.ifindex), 0))
