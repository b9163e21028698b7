"""Idle keep-alive connections to the backends of one cluster, per worker. Holds objects, touches no socket.

The newest is reused first: its congestion window is warmest, the backend is the least likely to have timed
it out, and those at the other end grow old and are closed, so the pool shrinks to what traffic needs. An
idle connection that becomes readable has been closed (or speaks out of turn): whoever watches it calls
`discard`, and `checkout` asks `stale` once more, because the news may lie in the batch that is being worked
on.
"""

from __future__ import annotations

import socket
from collections import OrderedDict
from collections.abc import Callable, Hashable
from enum import StrEnum
from typing import Final, Generic, TypeVar

from tidegate.cluster.backend import BackendState
from tidegate.config.model import Pool
from tidegate.loop.timers import Timer, TimerWheel

C = TypeVar("C", bound=Hashable)


class IdleEnd(StrEnum):
    """How an idle connection's wait ended."""

    REUSED = "reused"
    EXPIRED = "expired"  # idle for idle_timeout
    OVERFLOW = "overflow"  # the oldest, when max_idle was reached
    STALE = "stale"  # closed by the backend, or it sent something unasked
    DRAINED = "drained"  # its backend was removed
    SHUTDOWN = "shutdown"


def readable(sock: socket.socket) -> bool:
    """Whether an idle connection is of no use any more: closed, broken, or with bytes nobody asked for.

    The socket is a non-blocking one: Python would wait for the timeout of another.
    """
    try:
        sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


_REUSED: Final = IdleEnd.REUSED


class ConnectionPool(Generic[C]):
    """Connections are opaque and compared by identity or hash; `close` is called for each one that is given
    up.

    Every connection is announced with `opened` before it is connected and leaves by `closed` (in use) or by
    the pool's own doing (idle); `max_per_backend` counts both kinds.
    """

    __slots__ = ("_close", "_idle", "_order", "_stale", "_timer", "_timers", "config", "ended", "open")

    def __init__(
        self,
        config: Pool,
        timers: TimerWheel,
        close: Callable[[C], None],
        stale: Callable[[C], bool] | None = None,
    ) -> None:
        self.config = config
        self.open: dict[BackendState, int] = {}  # connections per backend, idle ones included
        self.ended = dict.fromkeys(IdleEnd, 0)
        self._timers = timers
        self._timer = Timer(self._expire)
        self._close = close
        self._stale = stale
        # Newest last. A backend's stays when it is empty: it is about to be filled again.
        self._idle: dict[BackendState, dict[C, None]] = {}
        self._order: OrderedDict[C, tuple[BackendState, int]] = OrderedDict()  # oldest first; since when, ns

    def __len__(self) -> int:
        """Idle connections."""
        return len(self._order)

    def idle(self, backend: BackendState) -> int:
        return len(self._idle.get(backend, ()))

    def may_open(self, backend: BackendState) -> bool:
        """Whether `max_per_backend` leaves room for a further connection."""
        most = self.config.max_per_backend
        return not most or self.open.get(backend, 0) < most

    def opened(self, backend: BackendState) -> None:
        """A connection to `backend` is being made; paired with `closed` unless it comes to rest here."""
        self.open[backend] = self.open.get(backend, 0) + 1

    def closed(self, backend: BackendState) -> None:
        """A connection that is not idle here was closed. Raises ValueError when none was open."""
        count = self.open.get(backend, 0) - 1
        if count < 0:
            raise ValueError(f"{backend.name} has no open connection")
        if count:
            self.open[backend] = count
        else:
            del self.open[backend]

    def checkout(self, backend: BackendState, look: bool = True) -> C | None:
        """The newest idle connection to `backend` that is not stale; it is the caller's now.

        Without `look` nobody asks `stale`: for what can be sent once more should it turn out to be.
        """
        idle = self._idle.get(backend)
        while idle:
            connection, _ = idle.popitem()
            del self._order[connection]
            if not look or self._stale is None or not self._stale(connection):
                self.ended[_REUSED] += 1
                return connection
            self._end(backend, connection, IdleEnd.STALE)
        return None

    def checkin(self, backend: BackendState, connection: C, now_ns: int) -> bool:
        """A whole exchange is over: keep the connection for the next. False: it was closed instead."""
        order, most = self._order, self.config.max_idle
        if backend.draining or most < 1:
            self._end(backend, connection, IdleEnd.OVERFLOW if most < 1 else IdleEnd.DRAINED)
            return False
        if connection in order:
            raise ValueError("this connection is idle already")
        idle = self._idle.get(backend)
        if idle is None:
            idle = self._idle[backend] = {}
        idle[connection] = None
        order[connection] = (backend, now_ns)
        while len(order) > most:
            self._end_oldest(IdleEnd.OVERFLOW)
        if not self._timer.deadline_ns:
            self._timers.arm(self._timer, now_ns + self.config.idle_timeout_ns)
        return True

    def discard(self, connection: C) -> bool:
        """It became readable while idle: give it up. False when it was not idle (any more)."""
        return self._take_and_end(connection, IdleEnd.STALE)

    def drop(self, backend: BackendState) -> None:
        """Close what is idle for a backend."""
        for connection in list(self._idle.get(backend, ())):
            self._take_and_end(connection, IdleEnd.DRAINED)
        self._idle.pop(backend, None)

    def sync(self) -> None:
        """Drop the idle connections of backends that drain; for `ClusterState.on_change`.

        Those of a backend that is merely down stay until they expire: if every backend is said to be down,
        traffic goes on, and it may as well be cheap.
        """
        for backend in [backend for backend in self._idle if backend.draining]:
            self.drop(backend)

    def reconfigure(self, config: Pool, now_ns: int) -> None:
        """Take over new limits; what is beyond them is closed."""
        self.config = config
        while len(self._order) > config.max_idle:
            self._end_oldest(IdleEnd.OVERFLOW)
        self._expire(now_ns)

    def close_all(self) -> None:
        """The worker is leaving."""
        while self._order:
            self._end_oldest(IdleEnd.SHUTDOWN)
        self._timers.cancel(self._timer)

    def _expire(self, now_ns: int) -> None:
        timeout_ns = self.config.idle_timeout_ns
        while self._order:
            _, since_ns = next(iter(self._order.values()))
            if since_ns + timeout_ns > now_ns:
                self._timers.arm(self._timer, since_ns + timeout_ns)
                return
            self._end_oldest(IdleEnd.EXPIRED)
        self._timers.cancel(self._timer)

    def _end_oldest(self, reason: IdleEnd) -> None:
        self._take_and_end(next(iter(self._order)), reason)

    def _take_and_end(self, connection: C, reason: IdleEnd) -> bool:
        entry = self._order.pop(connection, None)
        if entry is None:
            return False
        backend, _ = entry
        del self._idle[backend][connection]
        self._end(backend, connection, reason)
        return True

    def _end(self, backend: BackendState, connection: C, reason: IdleEnd) -> None:
        self.ended[reason] += 1
        self.closed(backend)
        self._close(connection)
