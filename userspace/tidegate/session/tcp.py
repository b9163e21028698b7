"""One TCP session: connect to a backend, relay both ways with bounded memory, end with a reason.

States: CONNECTING (an attempt is under way, or the next one waits for its back-off), RELAYING, DRAINING (the
backend is gone by a reset, what it sent before is still on its way to the client), CLOSED.
The front (client) and the back (backend) socket lead to the same object through two callbacks.
"""

from __future__ import annotations

import errno
import logging
import socket
from typing import TYPE_CHECKING, Any, Final

from tidegate import logs
from tidegate.cluster.retry import RetryPlan
from tidegate.config.model import Balance
from tidegate.loop.reactor import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP
from tidegate.loop.timers import Timer, nothing
from tidegate.metrics.names import LISTENER, EndReason
from tidegate.metrics.segment import observe
from tidegate.session.context import Context, has_unread_bytes, reset, show_token, unsent_bytes
from tidegate.session.plain_sockets import stream
from tidegate.session.spliced import Spliced, hand_over

if TYPE_CHECKING:
    from tidegate.cluster.backend import BackendState
    from tidegate.cluster.balance import ClusterState

CONNECTING, RELAYING, DRAINING, CLOSED = range(4)
STATE_NAMES = ("connecting", "relaying", "draining", "closed")

# A connect that takes longer than this is worth watching the client for: most finish within the
# same millisecond, and for those two epoll_ctl calls would be waste.
WATCH_CLIENT_AFTER_NS = 20_000_000
# A reset throws away what the kernel has not sent yet, so a backend's reset is passed on when its last
# bytes are acknowledged, looked at this often, and within a second in any case.
DRAIN_TICK_NS = 5_000_000
DRAIN_LIMIT_NS = 900_000_000
NEVER = 1 << 62  # bytes: no session moves so many

_BYTES_IN: Final = LISTENER.index("received_bytes_total")
_BYTES_OUT: Final = LISTENER.index("sent_bytes_total")
_ATTEMPTS: Final = LISTENER.index("connect_attempts_total")
_FAILURES: Final = LISTENER.index("connect_failures_total")
_RETRIES: Final = LISTENER.index("connect_retries_total")
_CONNECT_TIME: Final = LISTENER.index("connect_duration_ns")

_CLIENTS_CHOICE = frozenset({EndReason.CLIENT_GONE, EndReason.CLIENT_RESET, EndReason.FRONT_TIMEOUT})

_log = logging.getLogger("tidegate.session")
_abnormal = logs.RateLimited(_log, per_second=10)


class Flow:
    """One direction: what was read from its source and not yet taken by its destination."""

    __slots__ = ("bytes", "eof", "finished", "pending", "sent_word")

    def __init__(self, sent_word: int) -> None:
        self.pending: memoryview | None = None  # reading is paused while there is some
        self.eof = False  # the source sent FIN
        self.finished = False  # and the destination was told, or nothing more can be delivered
        self.bytes = 0  # read from the source
        self.sent_word = sent_word


class TcpSession:
    """Relays one client connection to one backend of the listener's cluster."""

    __slots__ = (
        "_back_broken",
        "_back_interest",
        "_back_timeout_ns",
        "_backend",
        "_cluster",
        "_connect_deadline_ns",
        "_connect_started_ns",
        "_down",
        "_front_interest",
        "_last_back_ns",
        "_last_down_ns",
        "_last_front_ns",
        "_last_up_ns",
        "_retry",
        "_splice_at",
        "_state",
        "_timer",
        "_up",
        "_wait_until_ns",
        "back",
        "ctx",
        "established_ns",
        "front",
        "peer",
        "splice",
        "started_ns",
        "token",
    )

    def __init__(
        self,
        ctx: Context,
        front: socket.socket,
        peer: Any,
        established_ns: int,
        cluster: ClusterState | None = None,
    ) -> None:
        """`cluster`: other than the listener's."""
        self.ctx = ctx
        cluster = cluster or ctx.cluster
        assert cluster is not None
        self._cluster = cluster  # a reload may give the listener another
        self.front = front
        self.peer = peer
        self.established_ns = established_ns
        now = ctx.reactor.now
        self.started_ns = now
        self.back: socket.socket | None = None
        self.token = ctx.slab.insert(self)
        self._state = CONNECTING
        self._up: Flow = Flow(_BYTES_IN)
        self._down: Flow = Flow(_BYTES_OUT)
        self._front_interest = -1  # -1: not watched
        self._back_interest = -1
        self._back_broken = False
        self._backend: BackendState | None = None
        hashed = self._cluster.config.balance is Balance.HASH
        self._retry = RetryPlan(self._cluster, client_key(peer) if hashed else None)
        self._wait_until_ns = 0  # CONNECTING: the next attempt; DRAINING: the limit
        self._connect_started_ns = 0
        self._connect_deadline_ns = 0
        self._back_timeout_ns = self._cluster.config.back_timeout_ns
        self._last_front_ns = self._last_back_ns = self._last_up_ns = self._last_down_ns = now
        self._timer = Timer(self._on_timer)
        self.splice: Spliced | None = None  # while the kernel moves the bytes
        self._splice_at = NEVER if ctx.splicer is None else ctx.splicer.threshold(ctx)

    def start(self) -> None:
        self._connect()

    def adopt(self, back: socket.socket, backend: BackendState, up: bytes, down: bytes) -> None:
        """Instead of `start`: relay to a connection that another session made, both sockets unwatched.

        `up` and `down` came before, or were not taken yet: they go first. `backend` is acquired already.
        """
        self.back = back
        self._backend = backend
        self._state = RELAYING
        if up:
            self._up.pending = memoryview(up)
        if down:
            self._down.pending = memoryview(down)
        self.ctx.reactor.timers.arm(self._timer, self._idle_deadline())
        self._update_interest()

    @property
    def relaying(self) -> bool:
        return self._state == RELAYING

    @property
    def last_progress_ns(self) -> int:
        if self.splice is not None:
            self._note_moves(self.splice)
        return max(self._last_front_ns, self._last_back_ns)

    def describe(self) -> dict[str, Any]:
        now = self.ctx.reactor.now
        up, down = self._up, self._down
        if self.splice is not None:
            self.splice.sync()
        return {
            "token": show_token(self.token),
            "protocol": "tcp",
            "listener": self.ctx.listener.name,
            "state": STATE_NAMES[self._state],
            "client": format_peer(self.peer),
            "cluster": self._cluster.config.name,
            "backend": self._backend.name if self._backend else "",
            "age_ms": (now - self.established_ns) // 1_000_000,
            "idle_ms": (now - self.last_progress_ns) // 1_000_000,
            "bytes_in": up.bytes,
            "bytes_out": down.bytes,
            "pending_in": len(up.pending) if up.pending is not None else 0,
            "pending_out": len(down.pending) if down.pending is not None else 0,
            "client_fin": up.eof,
            "backend_fin": down.eof,
            "spliced": self.splice is not None,
        }

    def drain(self) -> None:
        """A TCP session has no point of its own to stop at: it may finish within the drain timeout."""

    def end(self, reason: EndReason) -> None:
        self._end(reason, reset_front=True, reset_back=True)

    # connecting

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
        if backend.family != socket.AF_UNIX:
            back.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._cluster.config.tcp_keepalive:
                back.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        try:
            code = back.connect_ex(backend.sockaddr)
        except OSError as error:  # not an address of this family: a Unix path too long
            code = error.errno or errno.EINVAL
        if code not in (0, errno.EINPROGRESS):
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

    def _connected(self) -> None:
        ctx = self.ctx
        back, backend = self.back, self._backend
        assert back is not None and backend is not None
        now = ctx.reactor.now
        self._state = RELAYING
        self._cluster.connect_ended(backend, established=True)
        self._cluster.succeeded(backend, now)
        observe(ctx.words, _CONNECT_TIME, now - self._connect_started_ns)
        self._last_front_ns = self._last_back_ns = self._last_up_ns = self._last_down_ns = now
        ctx.reactor.redirect(back.fileno(), self._on_back)
        front_fd = self.front.fileno()
        if self._front_interest != -1:
            ctx.reactor.redirect(front_fd, self._on_front)
        ctx.reactor.timers.arm(self._timer, self._idle_deadline())
        if self._up.pending is not None:
            self._flush(self._up, back)  # what goes before the client's own bytes
        else:
            # the client's first bytes are here already more often than not: save a turn of the loop
            self._pump(self._up, self.front, back)
        if self._splice_at == 0 and self._state == RELAYING:
            self._hand_over()
        if self._state == RELAYING:
            self._update_interest()

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

    # relaying

    def _on_front(self, mask: int) -> None:
        back = self.back
        assert back is not None
        if mask & EPOLLERR:
            self._end(EndReason.CLIENT_RESET, reset_back=True)
            return
        if mask & EPOLLOUT:
            self._flush(self._down, self.front)
        up = self._up
        if mask & (EPOLLIN | EPOLLHUP) and self._state == RELAYING:
            if up.pending is None and not up.eof:
                self._pump(up, self.front, back)
            elif mask & EPOLLHUP:
                self._park_front()
        if self._state == RELAYING:
            self._update_interest()

    def _on_back(self, mask: int) -> None:
        back = self.back
        assert back is not None
        if mask & EPOLLOUT:
            self._flush(self._up, back)
        down = self._down
        if mask & (EPOLLIN | EPOLLHUP | EPOLLERR) and self._state == RELAYING:
            if down.pending is None and not down.eof:
                # what it sent before it reset is still there to be read, and comes first
                self._pump(down, back, self.front)
            elif mask & (EPOLLHUP | EPOLLERR):
                self._park_back()
        if self._state == RELAYING:
            self._update_interest()

    def _pump(self, flow: Flow, source: socket.socket, target: socket.socket) -> None:
        """Move what one recv brings; keeps what the target does not take, and stops reading then."""
        ctx = self.ctx
        try:
            n = source.recv_into(ctx.buffer)
        except BlockingIOError:
            return
        except OSError:
            self._source_broken(flow)
            return
        now = ctx.reactor.now
        self._received(flow, now)
        if n == 0:
            flow.eof = True
            self._finish(flow, target)
            return
        flow.bytes += n
        ctx.words[flow.sent_word] += n
        if flow.finished:  # the target is gone: the source is read only to learn how it ends
            return
        try:
            sent = target.send(ctx.view[:n])
        except BlockingIOError:
            sent = 0
        except OSError:
            self._target_broken(flow)
            return
        if sent:
            self._delivered(flow, now)
        if sent < n:
            flow.pending = memoryview(bytes(ctx.view[sent:n]))
            if flow is self._up:
                self._expect_answer(now)
        elif flow.bytes >= self._splice_at:
            self._hand_over()

    def _hand_over(self) -> None:
        """Let the kernel move the bytes from here on, if nothing waits here and it is willing."""
        ctx = self.ctx
        if self._up.pending is None and self._down.pending is None and ctx.splicer is not None:
            self._splice_at = hand_over(ctx.splicer, self)

    def _flush(self, flow: Flow, target: socket.socket) -> None:
        pending = flow.pending
        if pending is None:
            return
        try:
            sent = target.send(pending)
        except BlockingIOError:
            return
        except OSError:
            self._target_broken(flow)
            return
        self._delivered(flow, self.ctx.reactor.now)
        if sent < len(pending):
            flow.pending = pending[sent:]
            return
        flow.pending = None
        if flow.eof:
            self._finish(flow, target)

    def _received(self, flow: Flow, now: int) -> None:
        if flow is self._up:
            self._last_front_ns = now
        else:
            self._last_back_ns = self._last_down_ns = now

    def _delivered(self, flow: Flow, now: int) -> None:
        if flow is self._up:
            self._last_back_ns = self._last_up_ns = now
            self._expect_answer(now)
        else:
            self._last_front_ns = now

    def _finish(self, flow: Flow, target: socket.socket) -> None:
        """The source sent FIN; pass it on once everything before it is delivered."""
        if flow.pending is not None:
            return
        if not flow.finished:
            flow.finished = True
            try:
                target.shutdown(socket.SHUT_WR)
            except OSError:
                self._target_broken(flow)
                return
        if self._up.finished and self._down.finished:
            if self._back_broken:
                self._reset_front_when_delivered()
            else:
                self._end(EndReason.DONE)

    def _source_broken(self, flow: Flow) -> None:
        if flow is self._up:
            self._end(EndReason.CLIENT_RESET, reset_back=True)
        else:
            self._reset_front_when_delivered()

    def _target_broken(self, flow: Flow) -> None:
        if flow is self._down:
            self._end(EndReason.CLIENT_RESET, reset_back=True)
            return
        # The backend takes no more, but may have answered before it closed (an early refusal of a
        # large upload): what it sent still goes to the client, then the reset.
        self._back_broken = True
        flow.pending = None
        flow.eof = flow.finished = True
        if self._down.finished:
            self._reset_front_when_delivered()

    def _reset_front_when_delivered(self) -> None:
        self._drop_back()
        if self.splice is not None:
            self.splice.stop()
        if self._delivered_all():
            self._end(EndReason.BACKEND_RESET, reset_front=True)
            return
        self._state = DRAINING
        self.ctx.reactor.remove(self.front.fileno())
        self._wait_until_ns = self.ctx.reactor.now + DRAIN_LIMIT_NS
        self.ctx.reactor.timers.arm(self._timer, self.ctx.reactor.now + DRAIN_TICK_NS)

    def _delivered_all(self) -> bool:
        """Whether the client has all that the backend sent."""
        if self.splice is not None and self.splice.undelivered:
            return False
        return unsent_bytes(self.front) == 0

    # interest: modify() only on change

    def _update_interest(self) -> None:
        if self.splice is not None:  # it watches by itself
            return
        up, down = self._up, self._down
        front = 0 if up.pending is not None or up.eof else EPOLLIN
        if down.pending is not None:
            front |= EPOLLOUT
        back = 0 if down.pending is not None or down.eof else EPOLLIN
        if up.pending is not None:
            back |= EPOLLOUT
        self._watch(front, back)

    def _watch(self, front: int, back: int) -> None:
        reactor, splice = self.ctx.reactor, self.splice
        if front != self._front_interest and not (front == 0 and self._front_interest == -2):
            if self._front_interest < 0:
                reactor.add(self.front.fileno(), front, splice.on_front if splice else self._on_front)
            else:
                reactor.modify(self.front.fileno(), front)
            self._front_interest = front
        if back != self._back_interest and not (back == 0 and self._back_interest == -2):
            assert self.back is not None
            if self._back_interest < 0:
                reactor.add(self.back.fileno(), back, splice.on_back if splice else self._on_back)
            else:
                reactor.modify(self.back.fileno(), back)
            self._back_interest = back

    def _park_front(self) -> None:
        """Unwatch a side whose HUP cannot be answered now: it is reported for ever otherwise."""
        if self._down.pending is None:
            self.ctx.reactor.remove(self.front.fileno())
            self._front_interest = -2

    def _park_back(self) -> None:
        if self._up.pending is None:
            assert self.back is not None
            self.ctx.reactor.remove(self.back.fileno())
            self._back_interest = -2

    # time

    def _idle_deadline(self) -> int:
        """The next moment at which silence ends the session, ns.

        The client's clock always runs. The backend's runs while it owes something: it was sent
        bytes after its last one, or does not take what waits for it.
        """
        deadline = self.last_progress_ns + self.ctx.listener.front_timeout_ns
        if self._owed():
            deadline = min(deadline, self._last_up_ns + self._back_timeout_ns)
        return deadline

    def _note_moves(self, splice: Spliced) -> None:
        """What the kernel moved counts as what we move does."""
        front_in, back_out, back_in, front_out = splice.last_moves(self.ctx.reactor.now)
        self._last_front_ns = max(self._last_front_ns, front_in, front_out)
        self._last_back_ns = max(self._last_back_ns, back_in, back_out)
        self._last_up_ns = max(self._last_up_ns, back_out)
        self._last_down_ns = max(self._last_down_ns, back_in)

    def _expect_answer(self, now: int) -> None:
        """The backend's clock runs from now: its deadline may come before the one the timer is armed for."""
        deadline = now + self._back_timeout_ns
        if deadline < self._timer.deadline_ns:
            self.ctx.reactor.timers.arm(self._timer, deadline)

    def _owed(self) -> bool:
        if self.splice is not None and self.splice.behind:
            return True
        return self._up.pending is not None or self._last_up_ns > self._last_down_ns

    def _on_timer(self, now: int) -> None:
        if self._state == RELAYING:
            deadline = self._idle_deadline()
            if now < deadline:
                self.ctx.reactor.timers.arm(self._timer, deadline)
            elif self._owed() and now >= self._last_up_ns + self._back_timeout_ns:
                self._end(EndReason.BACK_TIMEOUT, reset_front=True, reset_back=True)
            else:
                self._end(EndReason.FRONT_TIMEOUT, reset_front=True, reset_back=True)
        elif self._state == DRAINING:
            if now >= self._wait_until_ns or self._delivered_all():
                self._end(EndReason.BACKEND_RESET, reset_front=True)
            else:
                self.ctx.reactor.timers.arm(self._timer, now + DRAIN_TICK_NS)
        elif self._backend is None:
            self._connect()
        elif now >= self._connect_deadline_ns:
            self._attempt_failed(now)
        else:
            self._watch_client()
            if self._state == CONNECTING:
                self.ctx.reactor.timers.arm(self._timer, self._connect_deadline_ns)

    # the one place where a session ends

    def _end(self, reason: EndReason, *, reset_front: bool = False, reset_back: bool = False) -> None:
        state, self._state = self._state, CLOSED
        if state == CLOSED:
            return
        ctx = self.ctx
        ctx.reactor.timers.abandon(self._timer)
        self._timer.callback = nothing
        if self.splice is not None:
            self.splice.close()
            self.splice = None
        if reset_front:
            reset(self.front)
        ctx.reactor.forget(self.front.fileno())
        ctx.reactor.close_after_batch(self.front)
        if reset_back and self.back is not None:
            reset(self.back)
        self._drop_back()
        if self._backend is not None:
            if state == CONNECTING:
                self._cluster.connect_ended(self._backend, established=False)
            self._cluster.released(self._backend)
        ctx.slab.remove(self.token)
        if reason is not EndReason.DONE:
            # what clients do of their own accord is no news to the operator
            level = logging.DEBUG if reason in _CLIENTS_CHOICE else logging.INFO
            _abnormal.event(level, "session_ended", reason=reason.value, **self.describe())
        ctx.on_end(self, reason)

    def _drop_back(self) -> None:
        back, self.back = self.back, None
        if back is not None:
            self.ctx.reactor.forget(back.fileno())
            self.ctx.reactor.close_after_batch(back)
        self._back_interest = -1


def client_key(peer: Any) -> bytes | None:
    """What keeps a client on its backend: its address without the port."""
    return None if not peer or isinstance(peer, (str, bytes)) else peer[0].encode()


def format_peer(peer: Any) -> str:
    """A client address as `host:port`, `[v6]:port`, or "unix"."""
    if not peer or isinstance(peer, (str, bytes)):
        return "unix"
    return f"[{peer[0]}]:{peer[1]}" if ":" in peer[0] else f"{peer[0]}:{peer[1]}"
