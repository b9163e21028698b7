"""What the HTTP sessions of one listener share in one worker, and what all of them share of a cluster."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from tidegate.cluster.balance import ClusterState
from tidegate.cluster.inflight import Gate, WaitEnd
from tidegate.cluster.pool import ConnectionPool, readable
from tidegate.cluster.sticky import Sticky
from tidegate.config.model import Balance, Listener, ProxyProtocol
from tidegate.http.accesslog import Record
from tidegate.http.forwarded import Peer
from tidegate.http.response import ResponseMemo
from tidegate.http.site import Site
from tidegate.loop.reactor import Reactor
from tidegate.metrics.names import LISTENER
from tidegate.session.http_back import BackConnection

if TYPE_CHECKING:
    from tidegate.session.accesslog import LogFile

# Most requests are answered sooner than this: a client of one request is never watched.
WATCH_CLIENT_AFTER_NS: Final = 20_000_000
# Clients whose generated header lines are remembered: as many as are likely to come back soon.
_KNOWN_PEERS: Final = 1024
_SECOND_NS: Final = 1_000_000_000
_LOG_DROPPED: Final = LISTENER.index("log_lines_dropped_total")


class Queued:
    """What waits at a cluster's gate: a session."""

    def gate_opened(self) -> None:
        """A place at the cluster is yours: `gate.leave` gives it back."""
        raise NotImplementedError

    def gate_closed(self, reason: WaitEnd) -> None:
        """No place came in time."""
        raise NotImplementedError


class HttpCluster:
    """One cluster's connections and places, in one worker; shared by its listeners, kept over reloads."""

    __slots__ = ("_memo", "cookie", "gate", "hashed", "plain", "pool", "pooled", "reactor",
                 "sends_proxy", "state", "sticky")  # fmt: skip

    def __init__(self, state: ClusterState, reactor: Reactor) -> None:
        self.state = state
        self.reactor = reactor
        self.pool: ConnectionPool[BackConnection] = ConnectionPool(
            state.config.pool, reactor.timers, _close, _stale
        )
        self.gate: Gate[Queued] | None = None
        self.sticky: Sticky | None = None
        self.cookie = b""
        self.hashed = False
        self.plain = True  # a backend is picked by load alone
        self.pooled = True
        self.sends_proxy = False
        self._memo = ResponseMemo()
        state.on_change.append(self.pool.sync)
        self._configure()

    def reconfigure(self) -> None:
        """After the state took over a new configuration."""
        self.pool.reconfigure(self.state.config.pool, self.reactor.now)
        self._configure()

    def connection(self) -> BackConnection:
        """A new connection object; whoever has it connects it."""
        return BackConnection(self.pool, self._memo, self.reactor)

    def close(self) -> None:
        """The cluster is no longer used by anything new."""
        self.pool.close_all()
        if self.gate is not None:
            self.gate.close()

    def _configure(self) -> None:
        config = self.state.config
        self.hashed = config.balance is Balance.HASH
        self.sends_proxy = config.send_proxy is not ProxyProtocol.OFF
        # the header names one client: nobody else's requests may follow it
        self.pooled = not self.sends_proxy and config.pool.max_idle > 0
        self.cookie = config.sticky_cookie.encode("ascii")
        if self.cookie and self.sticky is None:
            self.sticky = Sticky(self.state)
        self.plain = not self.hashed and self.sticky is None
        limit = config.max_in_flight or None
        if self.gate is not None:
            self.gate.set_limit(limit, config.max_waiting, self.reactor.now)
        elif limit is not None:
            self.gate = Gate(limit, config.max_waiting, self.reactor.timers, _serve, _refuse)


def local_name(sock: socket.socket) -> tuple[str, int]:
    """Where a client connected to; ("", 0) for a Unix socket, and for one that is gone."""
    try:
        name = sock.getsockname()
    except OSError:  # the next read will tell
        return "", 0
    return (name[0], name[1]) if isinstance(name, tuple) else ("", 0)


def _stale(connection: BackConnection) -> bool:
    return readable(connection.sock)


def _close(connection: BackConnection) -> None:
    connection.close()


def _serve(session: Queued) -> None:
    session.gate_opened()


def _refuse(session: Queued, reason: WaitEnd) -> None:
    session.gate_closed(reason)


class HttpSide:
    """One listener's configuration, compiled, in one worker. Replaced whole by a reload.

    Sessions move to the new one between two requests.
    """

    __slots__ = ("_local", "_offset_ns", "_offset_until_ns", "_peers", "clusters", "expect_proxy",
                 "first_tick_ns", "listener", "log", "site", "tick_ns")  # fmt: skip

    def __init__(
        self,
        listener: Listener,
        clusters: Mapping[str, HttpCluster],
        previous: HttpSide | None = None,
        log: LogFile | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Raises OperatorErrors as Site does."""
        self.listener = listener
        used = {listener.cluster, *(route.cluster for route in listener.routes)} - {""}
        clusters = self.clusters = {name: clusters[name] for name in used}
        sticky = {name: one.state.config.sticky_cookie for name, one in clusters.items()}
        self.site: Site = Site(listener, sticky, clock, previous.site if previous is not None else None)
        self.log = log
        self.expect_proxy = listener.proxy_protocol is not ProxyProtocol.OFF
        # A session's timer fires at least this often and looks what the time is for: moving a deadline to
        # any of these is then no more than knowing it.
        self.tick_ns = min(
            listener.request_timeout_ns,
            listener.front_timeout_ns,
            listener.keepalive_timeout_ns,
            *(one.state.config.back_timeout_ns for one in clusters.values()),
        )
        self.first_tick_ns = min(self.tick_ns, WATCH_CLIENT_AFTER_NS)
        self._peers: dict[str, Peer] = {}
        host = listener.address.host
        self._local = (host, listener.address.port) if host not in ("0.0.0.0", "::") else None
        self._offset_ns = self._offset_until_ns = 0

    def peer(self, address: str, local: Callable[[], tuple[str, int]]) -> Peer:
        """How a client is described to backends; `local` tells where it connected to, asked if needed."""
        if self._local is None:
            return self.site.peer(address, local())
        known = self._peers.get(address)
        if known is None:
            if len(self._peers) >= _KNOWN_PEERS:
                self._peers.clear()
            known = self._peers[address] = self.site.peer(address, self._local)
        return known

    def write(self, record: Record, words: memoryview, now_ns: int) -> None:
        """A line of the access log, which there is: what is the same of every record is filled in here."""
        log, line = self.log, self.site.log_line
        assert log is not None and line is not None
        record.time_ns = now_ns + self.epoch_offset_ns(now_ns)
        record.listener = self.listener.name
        log.write(line(record))
        if log.dropped:
            words[_LOG_DROPPED] += log.dropped
            log.dropped = 0

    def epoch_offset_ns(self, now_ns: int) -> int:
        """What CLOCK_MONOTONIC lacks to the time since the epoch; follows a stepped clock within a second."""
        if now_ns >= self._offset_until_ns:
            self._offset_ns = time.time_ns() - time.monotonic_ns()
            self._offset_until_ns = now_ns + _SECOND_NS
        return self._offset_ns
