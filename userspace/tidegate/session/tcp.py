"""One TCP session: connect to a backend, relay both ways with bounded memory, end with a reason.

States: CONNECTING (an attempt is under way, or the next one waits for its back-off), RELAYING, DRAINING (the
backend is gone by a reset, what it sent before is still on its way to the client), CLOSED.
The front (client) and the back (backend) socket lead to the same object through two callbacks. Its parts are
classes on top of each other: tcp_state has the fields and the end, tcp_connect the way to a backend.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

from tidegate.loop.reactor import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT
from tidegate.metrics.names import LISTENER, EndReason
from tidegate.metrics.segment import observe
from tidegate.session.context import unsent_bytes
from tidegate.session.spliced import hand_over
from tidegate.session.tcp_connect import Connecting
from tidegate.session.tcp_state import CONNECTING, DRAINING, RELAYING, Flow

if TYPE_CHECKING:
    from tidegate.cluster.backend import BackendState

# A reset throws away what the kernel has not sent yet, so a backend's reset is passed on when its last
# bytes are acknowledged, looked at this often, and within a second in any case.
DRAIN_TICK_NS = 5_000_000
DRAIN_LIMIT_NS = 900_000_000

_CONNECT_TIME: Final = LISTENER.index("connect_duration_ns")


class TcpSession(Connecting):
    """Relays one client connection to one backend of the listener's cluster."""

    __slots__ = ()

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
