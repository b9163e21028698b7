"""TCP sessions with something to do before they relay: PROXY headers, and limits per client."""

from __future__ import annotations

import socket
from typing import Any

from tidegate.cluster.balance import ClusterState
from tidegate.cluster.retry import RetryPlan
from tidegate.config.model import Balance, Listener, ProxyProtocol
from tidegate.http.proxyproto import ProxyError, ProxyHeader, ProxyReader, encode_v1, encode_v2, not_trusted
from tidegate.http.ratelimit import ConnectionCount
from tidegate.http.site import trust
from tidegate.loop.reactor import EPOLLIN
from tidegate.metrics.names import EndReason
from tidegate.session.context import Context
from tidegate.session.refusals import RING as refusals  # noqa: N811 - one per process
from tidegate.session.tcp import TcpSession
from tidegate.session.tcp_state import CLOSED, format_peer

# Both versions end well below it; what follows a header waits in the kernel or goes first.
_RECV = 16 * 1024


class TcpSide:
    """What the guarded sessions of one listener share in one worker."""

    __slots__ = ("connections", "expect", "listener", "trusts")

    def __init__(self, listener: Listener, previous: TcpSide | None) -> None:
        self.listener = listener
        self.expect = listener.proxy_protocol
        self.trusts = trust(listener)
        most = listener.limits.connections_per_client
        self.connections: ConnectionCount | None = ConnectionCount(most) if most else None
        if previous is not None and previous.listener.limits == listener.limits:
            self.connections = previous.connections


def side(listener: Listener, cluster: ClusterState | None, previous: TcpSide | None) -> TcpSide | None:
    """None when the listener's sessions have nothing to do before they relay."""
    if (
        listener.proxy_protocol is ProxyProtocol.OFF
        and not listener.limits.connections_per_client
        and (cluster is None or cluster.config.send_proxy is ProxyProtocol.OFF)
    ):
        return None
    return TcpSide(listener, previous)


def make(ctx: Context, front: socket.socket, peer: Any, established_ns: int) -> TcpSession:
    """The session for a connection, as plain as its listener allows."""
    if ctx.tcp is None:
        return TcpSession(ctx, front, peer, established_ns)
    return GuardedSession(ctx, front, peer, established_ns)


class GuardedSession(TcpSession):
    """Reads a PROXY header, counts the client, and says who it is to the backend, as far as configured."""

    __slots__ = ("_counted", "_early", "_fault", "_header", "_reader", "_side")

    def __init__(self, ctx: Context, front: socket.socket, peer: Any, established_ns: int) -> None:
        super().__init__(ctx, front, peer, established_ns)
        assert ctx.tcp is not None
        self._side: TcpSide = ctx.tcp
        self._reader: ProxyReader | None = None
        self._header: ProxyHeader | None = None
        self._counted = ""
        self._fault = ""
        self._early = b""  # what came behind the header

    def start(self) -> None:
        if self._side.expect is ProxyProtocol.OFF:
            self._admitted()
        elif isinstance(self.peer, tuple) and not self._side.trusts(self.peer[0]):
            self._refused(not_trusted())
            self._end(EndReason.BAD_PROXY_HEADER, reset_front=True)
        else:
            self._reader = ProxyReader(self._side.expect)
            limit = self.established_ns + self.ctx.listener.request_timeout_ns
            self.ctx.reactor.timers.arm(self._timer, max(limit, self.ctx.reactor.now + 1))
            self._on_header(0)

    def _on_header(self, mask: int) -> None:
        reader = self._reader
        assert reader is not None
        try:
            data = self.front.recv(_RECV)
            if not data:
                self._end(EndReason.CLIENT_GONE)
                return
            header = reader.receive(data)
        except BlockingIOError:
            header = None
        except ProxyError as error:
            self._refused(error)
            self._end(EndReason.BAD_PROXY_HEADER, reset_front=True)
            return
        except OSError:
            self._end(EndReason.CLIENT_RESET)
            return
        fd = self.front.fileno()
        if header is None:
            if not self.ctx.reactor.watches(fd):
                self.ctx.reactor.add(fd, EPOLLIN, self._on_header)
            return
        self.ctx.reactor.remove(fd)
        self._header = header
        self._reader = None
        self._early = reader.rest
        self._admitted()

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"fault": self._fault}

    def _refused(self, error: ProxyError) -> None:
        self._fault = error.fault
        refusals.note(error, listener=self.ctx.listener.name, client=format_peer(self.peer))

    def _admitted(self) -> None:
        source = self._source()
        counts = self._side.connections
        if counts is not None and source is not None:
            if not counts.enter(source[0]):
                self._end(EndReason.LIMITED, reset_front=True)
                return
            self._counted = source[0]
        if self._cluster.config.balance is Balance.HASH and source is not None:
            self._retry = RetryPlan(self._cluster, source[0].encode())
        self._connect()

    def _connected(self) -> None:
        first = self._early
        version = self._cluster.config.send_proxy
        if version is not ProxyProtocol.OFF:
            encode = encode_v1 if version is ProxyProtocol.V1 else encode_v2
            first = encode(self._source(), self._destination()) + first
        if first:
            self._up.bytes += len(self._early)
            self._up.pending = memoryview(first)
        super()._connected()

    def _source(self) -> tuple[str, int] | None:
        if self._header is not None and self._header.source is not None:
            return self._header.source
        return (self.peer[0], self.peer[1]) if isinstance(self.peer, tuple) else None

    def _destination(self) -> tuple[str, int] | None:
        if self._header is not None and self._header.source is not None:
            return self._header.destination
        try:
            name = self.front.getsockname()
        except OSError:
            return None
        return (name[0], name[1]) if isinstance(name, tuple) else None

    def _on_timer(self, now: int) -> None:
        if self._reader is not None:
            self._end(EndReason.REQUEST_TIMEOUT, reset_front=True)
        else:
            super()._on_timer(now)

    def _end(self, reason: EndReason, *, reset_front: bool = False, reset_back: bool = False) -> None:
        if self._counted and self._state != CLOSED:
            counts, counted = self._side.connections, self._counted
            self._counted = ""
            if counts is not None:
                counts.leave(counted)
        super()._end(reason, reset_front=reset_front, reset_back=reset_back)
