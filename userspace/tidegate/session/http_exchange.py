"""The backend's side of an HTTP session: a place, a backend, a connection, the request, its retries."""

from __future__ import annotations

from time import monotonic_ns
from typing import TYPE_CHECKING, Final

from tidegate.cluster.inflight import Entry, WaitEnd
from tidegate.cluster.retry import RetryPlan
from tidegate.config.model import ProxyProtocol
from tidegate.http.cookies import read_cookie
from tidegate.http.errors import RequestError
from tidegate.http.proxyproto import encode_v1, encode_v2
from tidegate.http.reader import BODY, COMPLETE
from tidegate.http.request import Request
from tidegate.http.routes import Action
from tidegate.loop.reactor import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP
from tidegate.metrics.names import EndReason
from tidegate.metrics.segment import observe
from tidegate.session.http_front import FrontSide
from tidegate.session.http_shared import WATCH_CLIENT_AFTER_NS
from tidegate.session.http_state import (
    ATTEMPTS,
    BACKOFF,
    CONNECT_TIME,
    CONNECTING,
    EXCHANGE,
    FAILURES,
    QUEUED,
    RETRIES,
    REUSED,
    WATCHED,
)

if TYPE_CHECKING:
    from tidegate.cluster.backend import BackendState

# RFC 9110 9.2.2: sending them twice does what sending them once does.
IDEMPOTENT: Final = frozenset({b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"})


class BackSide(FrontSide):
    """See the module."""

    __slots__ = ()

    # a place at the cluster

    def _begin(self, action: Action, request: Request) -> None:
        cluster = self.http.clusters[action.cluster]
        self._action = action
        self._cluster = cluster
        gate = cluster.gate
        if gate is not None and gate.limit is not None:
            now = self.ctx.reactor.now
            start = self.established_ns if self._first_request else now
            entry = gate.enter(self, start, start + self.ctx.listener.stale_after_ns)
            if entry is Entry.FULL:
                self._answer(503, EndReason.OVERLOADED, retry_after_s=1)
                return
            self._entered = gate
            if entry is Entry.WAITING:
                self._state = QUEUED
                self._listen()
                return
        self._start_exchange()

    def gate_opened(self) -> None:
        self._start_exchange()

    def gate_closed(self, reason: WaitEnd) -> None:
        self._entered = None
        self._answer(503, EndReason.OVERLOADED, retry_after_s=1)

    def _start_exchange(self) -> None:
        request, parser, http = self._request, self._parser, self.http
        now = self.ctx.reactor.now
        head_ns = self._head_ns
        start = self.established_ns if self._first_request else head_ns
        first = http.site.request_form.head(
            request,
            self._peer,
            self._action.rewrite,
            (start + http.epoch_offset_ns(now)) // 1000,
            (now - start) // 1000,
        )
        if parser.state == BODY:
            # good so far before a byte of it goes anywhere
            try:
                first += parser.receive_body(b"")
            except RequestError as error:
                self._refuse(error)
                return
        cluster = self._cluster
        if cluster.sends_proxy:
            first = self._proxy_header() + first
        self._first = first
        self._first_whole = parser.state == COMPLETE
        self._sent = False
        if self._unusual:
            self._unusual = self._fresh = self._upstream_broken = False
            self._plan = None
        if cluster.plain:
            backend = cluster.state.pick((), None, now)
            if backend is not None:
                self._attempt(backend, now)
                return
        self._pick(now)

    # a backend

    def _pick(self, now: int) -> None:
        cluster = self._cluster
        backend: BackendState | None = None
        if cluster.sticky is not None:
            fields = self._request.fields
            value = read_cookie(fields.block, cluster.cookie) if fields.secret else None
            if value is not None:
                backend = cluster.sticky.find(value, now)
            self._sticky_named = backend
        if backend is None:
            backend = cluster.state.pick((), self._hash_key() if cluster.hashed else None, now)
        if backend is None:
            self._leave_gate(now)
            self._answer(503, EndReason.NO_BACKEND)
            return
        self._attempt(backend, now)

    def _hash_key(self) -> bytes:
        return self._peer.address

    def _attempt(self, backend: BackendState, now: int, full: tuple[BackendState, ...] = ()) -> None:
        """Send it there, or, where no more connections may be opened, to one that is not among `full`."""
        cluster = self._cluster
        self._backend = self._served_by = backend
        self._back_ns = now
        backend.active += 1  # ClusterState.acquired
        if cluster.pooled and not self._fresh:
            # Looked at first where what is sent must not be sent twice.
            twice = self._first_whole and self._request.method in IDEMPOTENT
            conn = cluster.pool.checkout(backend, not twice)
            if conn is not None:
                self._conn = conn
                conn.user = self
                conn.parser.start(self._request)
                self._state = EXCHANGE
                self._reused = True
                self.ctx.words[REUSED] += 1
                first = self._first
                try:
                    sent = conn.sock.send(first)
                except BlockingIOError:
                    sent = 0
                except OSError:
                    self._closed_untouched(now)
                    return
                if sent == len(first) and self._first_whole:
                    self._sent = True
                else:
                    self._first_sent(sent)
                return
        if not cluster.pool.may_open(backend):
            cluster.state.released(backend)
            self._backend = None
            full = (*full, backend)
            other = cluster.state.pick(full, self._hash_key() if cluster.hashed else None, now)
            if other is not None:
                self._attempt(other, now, full)
                return
            self._leave_gate(now)
            self._answer(503, EndReason.OVERLOADED, retry_after_s=1)
            return
        self._connect(backend, now)

    def _connect(self, backend: BackendState, now: int) -> None:
        cluster, ctx = self._cluster, self.ctx
        self._reused = False
        conn = cluster.connection()
        conn.parser.start(self._request)
        ctx.words[ATTEMPTS] += 1
        cluster.state.connect_started(backend)
        cluster.pool.opened(backend)
        self._state = CONNECTING
        self._conn = conn
        self._connect_started_ns = monotonic_ns()  # not the batch's time: it may be over within the batch
        try:
            sent = conn.connect(backend, self, cluster.state.config.tcp_keepalive, self._first)
        except OSError:  # EMFILE, ENFILE, ENOBUFS: ours, not the backend's
            self._drop_back()
            self._leave_gate(now)
            self._answer(503, EndReason.FD_EXHAUSTED, retry_after_s=1)
            return
        if sent < 0:
            self._connect_failed(now)
        elif sent:
            self._connected(now, monotonic_ns())
            self._first_sent(sent)
        else:
            self._wake_ns = now + cluster.state.config.connect_timeout_ns
            deadline = self._wake_ns
            if self._front_watch == -1:
                deadline = min(deadline, now + WATCH_CLIENT_AFTER_NS)
            ctx.reactor.timers.arm(self._timer, deadline)

    def _proxy_header(self) -> bytes:
        source, destination = self._addresses()
        if self._cluster.state.config.send_proxy is ProxyProtocol.V1:
            return encode_v1(source, destination)
        return encode_v2(source, destination)

    def _connected(self, now: int, connected_ns: int) -> None:
        """`now` is the loop's time, `connected_ns` when it was seen that the connection stands."""
        backend = self._backend
        assert backend is not None
        self._cluster.state.connect_ended(backend, established=True)
        self._connect_ns = max(0, connected_ns - self._connect_started_ns)
        observe(self.ctx.words, CONNECT_TIME, self._connect_ns)
        self._state = EXCHANGE
        self._back_ns = now

    def _first_sent(self, sent: int) -> None:
        """Of what the request begins with, this much is with the kernel."""
        if sent:
            self._sent = True
        if sent < len(self._first):
            self._back_out = self._first[sent:]
            self._update_back()
        elif self._parser.state == BODY and self._front_watch != WATCHED:
            self._listen()

    # connecting takes its time, or fails

    def _on_connect_event(self, mask: int) -> None:
        now = self.ctx.reactor.now
        if mask & (EPOLLERR | EPOLLHUP):
            self._connect_failed(now)
            return
        self._connected(now, now)
        self._back_out = self._first
        self._flush_back()

    def _connect_failed(self, now: int, status: int = 502) -> None:
        backend = self._backend
        assert backend is not None
        self.ctx.words[FAILURES] += 1
        self._drop_back()
        self._cluster.state.connect_failed(backend, now)
        self._try_again(backend, now, status, EndReason.CONNECT_FAILED)

    def _try_again(self, failed: BackendState, now: int, status: int, reason: EndReason) -> None:
        """On another backend, perhaps later; or answer `status`."""
        plan = self._plan
        if plan is None:
            self._unusual = True
            cluster = self._cluster
            plan = self._plan = RetryPlan(cluster.state, self._hash_key() if cluster.hashed else None)
            plan.attempts = 1
            plan.tried.append(failed)
        delay = plan.failed(now)
        if delay is None:
            self._leave_gate(now)
            self._answer(status, reason)
        elif delay:
            self._state = BACKOFF
            self._wake_ns = now + delay
            self.ctx.reactor.timers.arm(self._timer, self._wake_ns)
            self._quiet(EPOLLRDHUP)
        else:
            self._next_attempt(now)

    def _next_attempt(self, now: int) -> None:
        assert self._plan is not None
        backend = self._plan.next(now)
        if backend is None:
            self._leave_gate(now)
            self._answer(503, EndReason.NO_BACKEND)
            return
        self.ctx.words[RETRIES] += 1
        self._retries += 1
        self._attempt(backend, now)

    def _closed_untouched(self, now: int) -> None:
        """The backend closed or reset without a byte of a response."""
        backend = self._backend
        assert backend is not None
        stale = self._reused
        again = not self._sent or (self._first_whole and self._request.method in IDEMPOTENT)
        self._drop_back()
        if again and stale:
            # It had been closed while idle: not the backend's fault, and no attempt is used up by it.
            self._fresh = self._unusual = True
            self._sent = False
            self.ctx.words[RETRIES] += 1
            self._retries += 1
            self._attempt(backend, now)
            return
        if not stale:
            self._cluster.state.failed(backend, now)
        if again:
            self._sent = False
            self._try_again(backend, now, 502, EndReason.BACKEND_CLOSED)
        else:
            self._leave_gate(now)
            self._answer(502, EndReason.BACKEND_CLOSED)

    # the request's way

    def _to_back(self, payload: bytes) -> None:
        conn = self._conn
        assert conn is not None
        if self._parser.state == COMPLETE:
            self._back_ns = self._front_ns  # from now on it is the backend's turn
        try:
            sent = conn.sock.send(payload)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._upstream_lost()
            return
        if sent:
            self._back_ns = self.ctx.reactor.now
        if sent < len(payload):
            self._back_out = payload[sent:]
            self._update_back()

    def _flush_back(self) -> None:
        out, conn = self._back_out, self._conn
        if not out or conn is None:
            return
        try:
            sent = conn.sock.send(out)
        except BlockingIOError:
            self._update_back()
            return
        except OSError:
            if self._sent:
                self._upstream_lost()
            else:
                self._closed_untouched(self.ctx.reactor.now)
            return
        self._sent = True
        self._back_ns = self.ctx.reactor.now
        self._back_out = out[sent:]
        self._update_back()
        if not self._back_out and self._parser.state == BODY and self._front_watch != WATCHED:
            self._listen()

    def _upstream_lost(self) -> None:
        """The backend takes no more, but it may have answered before it closed: read on."""
        self._upstream_broken = self._unusual = True
        self._back_out = b""
        self._update_back()

    def _update_back(self) -> None:
        """Read the backend while the client takes what comes; wait for room where something waits."""
        conn = self._conn
        if conn is not None and self._state == EXCHANGE:
            conn.watch((0 if self._out else EPOLLIN) | (EPOLLOUT if self._back_out else 0))

    # letting go

    def _drop_back(self) -> None:
        """Close the connection in use, if there is one, and let go of the backend."""
        if self.splice is not None:
            self.splice.close()
        self._back_out = b""
        conn, self._conn = self._conn, None
        backend, self._backend = self._backend, None
        if backend is None:
            return
        if conn is not None:
            if self._state == CONNECTING:
                self._cluster.state.connect_ended(backend, established=False)
            self._cluster.pool.closed(backend)
            conn.close()
        self._cluster.state.released(backend)

    def _leave_gate(self, now: int) -> None:
        gate, self._entered = self._entered, None
        if gate is not None:
            gate.leave(now)
