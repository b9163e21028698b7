"""How a TCP session gets its backend: attempts, back-off, and a client that may leave meanwhile."""

from __future__ import annotations

from typing import Final

from tidegate.loop.reactor import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP
from tidegate.metrics.names import LISTENER, EndReason
from tidegate.session.context import has_unread_bytes
from tidegate.session.plain_sockets import connect, stream
from tidegate.session.tcp_state import CONNECTING, TcpState

# A connect that takes longer than this is worth watching the client for: most finish within the
# same millisecond, and for those two epoll_ctl calls would be waste.
WATCH_CLIENT_AFTER_NS = 20_000_000

_ATTEMPTS: Final = LISTENER.index("connect_attempts_total")
_FAILURES: Final = LISTENER.index("connect_failures_total")
_RETRIES: Final = LISTENER.index("connect_retries_total")


class Connecting(TcpState):
    """See the module."""

    __slots__ = ()

    def _connected(self) -> None:
        raise NotImplementedError

    def _connect(self) -> None:
        ctx = self.ctx
        now = ctx.reactor.now
        backend = self._retry.next(now)
        if backend is None:
            self._end(EndReason.NO_BACKEND, reset_front=True)
            return
        ctx.words[_ATTEMPTS] += 1
        self._backend = backend
        self._cluster.acquired(backend)
        self._cluster.connect_started(backend)
        self._connect_started_ns = now
        try:
            back = stream(backend.family)
        except OSError:  # EMFILE, ENFILE, ENOBUFS: ours, not the backend's
            self._end(EndReason.FD_EXHAUSTED, reset_front=True)
            return
        self.back = back
        if not connect(back, backend, self._cluster.config.tcp_keepalive):
            self._attempt_failed(now)
            return
        self._back_interest = EPOLLIN | EPOLLOUT
        ctx.reactor.add(back.fileno(), self._back_interest, self._on_connect_event)
        self._connect_deadline_ns = deadline = self._retry.deadline_ns(now)
        if self._front_interest == -1:
            deadline = min(deadline, now + WATCH_CLIENT_AFTER_NS)
        ctx.reactor.timers.arm(self._timer, deadline)

    def _on_connect_event(self, mask: int) -> None:
        # HUP with something to read: it answered and closed before we looked (a Unix backend can)
        if mask & EPOLLERR or (mask & EPOLLHUP and not mask & EPOLLIN):
            self._attempt_failed(self.ctx.reactor.now)
            return
        self._connected()

    def _attempt_failed(self, now: int) -> None:
        ctx, backend = self.ctx, self._backend
        assert backend is not None
        ctx.words[_FAILURES] += 1
        self._drop_back()
        self._cluster.connect_ended(backend, established=False)
        self._cluster.released(backend)
        self._cluster.connect_failed(backend, now)
        self._backend = None
        delay = self._retry.failed(now)
        if delay is None:
            self._end(EndReason.CONNECT_FAILED, reset_front=True)
            return
        ctx.words[_RETRIES] += 1
        if delay == 0:
            self._connect()
            return
        self._wait_until_ns = now + delay
        self._watch_client()
        if self._state == CONNECTING:
            ctx.reactor.timers.arm(self._timer, self._wait_until_ns)

    def _watch_client(self) -> None:
        if self._front_interest == -1:
            self._front_interest = EPOLLRDHUP
            self.ctx.reactor.add(self.front.fileno(), EPOLLRDHUP, self._on_client_while_connecting)

    def _on_client_while_connecting(self, mask: int) -> None:
        left = mask & (EPOLLERR | EPOLLHUP) or not has_unread_bytes(self.front)
        if left or self.ctx.listener.abort_on_close:
            self._end(EndReason.CLIENT_GONE, reset_back=True)
        else:  # it sent its request and half-closed: served
            self._front_interest = 0
            self.ctx.reactor.modify(self.front.fileno(), 0)
