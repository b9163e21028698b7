"""Large bodies of known length: the kernel moves them to their end, then the session goes on as before.

    BodySplice.begin(session, conn, down=True)    # None: it goes on being copied

One direction at a time. While it lasts, the events of both sockets come here; a response that begins while a
request's body is under way ends it at once, and both are copied.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from tidegate.kernel.splicing import CannotSplice, KernelFlow
from tidegate.loop.reactor import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP
from tidegate.loop.timers import Timer
from tidegate.metrics.names import LISTENER, EndReason
from tidegate.session.splice import LATER, LostError, SourceError, TargetError, Wait
from tidegate.session.splice_body import BodySource, ShortError
from tidegate.session.splice_ends import SocketEnds, Taken
from tidegate.session.spliced import SLOWEST_TICK_NS, SYNC_NS, TICK_NS

if TYPE_CHECKING:
    import socket

    from tidegate.session.context import Context
    from tidegate.session.http_back import BackConnection
    from tidegate.session.http_state import HttpState
    from tidegate.session.splicer import Splicer

# What is left of a body must be more than this to be looked at at all; the setting is splice_after.
SPLICE_LEAST = 64 * 1024

_SPLICED = LISTENER.index("spliced_total")
_BYTES = LISTENER.index("spliced_bytes_total")
_BYTES_IN = LISTENER.index("received_bytes_total")
_BYTES_OUT = LISTENER.index("sent_bytes_total")
_log = logging.getLogger("tidegate.splice")


class Lane:
    """What the kernel knows of one socket as a source of bodies, for as long as that lives."""

    __slots__ = ("_splicer", "body", "flow")

    def __init__(self, splicer: Splicer, ctx: Context, sock: socket.socket) -> None:
        """CannotSplice."""
        self._splicer = splicer
        self.flow: KernelFlow = splicer.source(sock)
        self.body = BodySource(self.flow, SocketEnds(ctx.buffer, ctx.view, splicer.kernel, self.flow))

    def close(self) -> None:
        """The socket is about to be closed."""
        self._splicer.release((self.flow,))


class BodySplice:
    """One body on its way; see the module."""

    __slots__ = (
        "_conn",
        "_deaf",
        "_down",
        "_held",
        "_lane",
        "_moved",
        "_redirected",
        "_sync_timer",
        "_taken",
        "_tick_ns",
        "_tick_timer",
        "_wait",
        "session",
        "splicer",
    )

    def __init__(
        self, session: HttpState, conn: BackConnection, splicer: Splicer, lane: Lane, down: bool
    ) -> None:
        self.session = session
        self.splicer = splicer
        self._conn = conn
        self._lane = lane
        self._down = down
        self._deaf = False  # the backend is gone, and what it sent not read to the end
        self._wait = Wait.BELL
        self._moved = lane.body.moved
        self._redirected = lane.flow.redirected
        self._taken = Taken()
        self._held = 0
        self._tick_ns = TICK_NS
        self._tick_timer = Timer(self._on_tick)
        self._sync_timer = Timer(self._on_sync)

    @classmethod
    def begin(cls, session: HttpState, conn: BackConnection, *, down: bool) -> None:
        """Let the kernel have the rest of the response's body, or else of the request's, if it will."""
        ctx = session.ctx
        splicer = ctx.splicer
        left = conn.parser.left if down else session._parser.left
        if splicer is None or left < splicer.threshold(ctx) or left > session.splice_below:
            return
        source, target = (conn.sock, session.front) if down else (session.front, conn.sock)
        before = conn.lane if down else session.lane
        if before is not None and not before.body.welcome:
            return
        share = splicer.share(1) if splicer.possible(source, target) else 0
        if not share:
            return
        try:
            # both, before either becomes a target: what was read of one is not to be learned from then on
            if session.lane is None:
                session.lane = Lane(splicer, ctx, session.front)
            if conn.lane is None:
                conn.lane = Lane(splicer, ctx, conn.sock)
            lane = conn.lane if down else session.lane
            lane.flow.aim(target, splicer.kernel.add_target(target), share, lane.body.read)
        except CannotSplice as refusal:
            splicer.stop()
            session.splice_below = left - LATER
            _log.debug("not_spliced", extra={"kv": {"token": session.token, "reason": str(refusal)}})
            return
        splice = cls(session, conn, splicer, lane, down)
        if not lane.body.start(left):
            splicer.stop()
            return
        splicer.begin((lane.flow,), splice)
        ctx.words[_SPLICED] += 1
        session.splice = splice
        conn.user = splice
        session.listen_for(splice.on_front)
        ctx.reactor.timers.arm(splice._sync_timer, ctx.reactor.now + SYNC_NS)
        splice._advance()

    # what the session asks

    @property
    def deadline(self) -> tuple[int, EndReason]:
        """When silence ends it, ns, and as what: whose turn it is shows in what the target still holds."""
        session = self.session
        waits_for_target = self._lane.body.behind or self._lane.flow.in_flight() > 0
        if waits_for_target == self._down:
            return session.front_deadline_ns, EndReason.FRONT_TIMEOUT
        return session.back_deadline_ns, EndReason.BACK_TIMEOUT

    def sync(self) -> None:
        """Bring the session's counters and times up to date."""
        session, flow = self.session, self._lane.flow
        words = session.ctx.words
        moved, redirected = self._lane.body.moved, flow.redirected
        words[_BYTES] += redirected - self._redirected
        delta = moved - self._moved
        self._redirected, self._moved = redirected, moved
        target_ns = max(flow.redirected_ns, self._taken.ns(flow, session.ctx.reactor.now))
        if self._down:
            words[_BYTES_OUT] += delta
            self._conn.parser.moved(delta)
            session.body_moved(0, delta, target_ns, flow.received_ns)
        else:
            words[_BYTES_IN] += delta
            session._parser.moved(delta)
            session.body_moved(delta, 0, flow.received_ns, target_ns)

    def close(self) -> None:
        """The session, or its use of the backend, ends, or goes on by copying. Once."""
        session = self.session
        timers = session.ctx.reactor.timers
        timers.cancel(self._tick_timer)
        timers.cancel(self._sync_timer)
        self._lane.body.stop()
        self.sync()
        self.splicer.stop((self._lane.flow,))
        session.splice = None
        self._conn.user = session
        session.listen_for(session._on_front)

    # events

    def end(self, reason: EndReason) -> None:
        self.session.end(reason)

    def on_passed(self, _flow: KernelFlow) -> None:
        if self._wait is Wait.BELL:
            self._advance()

    def on_front(self, mask: int) -> None:
        if mask & (EPOLLERR | EPOLLHUP):
            self.session._front_broken()
        elif mask & EPOLLOUT if self._down else mask & (EPOLLIN | EPOLLRDHUP):
            self._advance()

    def on_back(self, mask: int) -> None:
        if self._down:
            self._advance()
            if mask & (EPOLLHUP | EPOLLERR) and self.session.splice is self:
                self._deaf = True  # told for ever otherwise; the rest is read when the client has room
                self._conn.park()
        elif mask & (EPOLLIN | EPOLLHUP | EPOLLERR):
            self._answered(mask)
        elif mask & EPOLLOUT:
            self._advance()

    def _on_tick(self, _now: int) -> None:
        held = self._lane.flow.in_flight()
        # a target that takes nothing is asked less and less often
        self._tick_ns = TICK_NS if held != self._held else min(2 * self._tick_ns, SLOWEST_TICK_NS)
        self._held = held
        self._advance()

    def _on_sync(self, now: int) -> None:
        self.sync()
        self.session.ctx.reactor.timers.arm(self._sync_timer, now + SYNC_NS)

    def _again(self) -> None:
        if self.session.splice is self and self._wait is Wait.AGAIN:
            self._advance()

    def _advance(self) -> None:
        session, conn = self.session, self._conn
        try:
            wait = self._wait = self._lane.body.step()
        except LostError:
            session.end(EndReason.INTERNAL_ERROR)
        except (SourceError, ShortError) as error:
            self.close()
            if self._down:
                session.response_cut(isinstance(error, ShortError))
            else:
                session.request_cut(isinstance(error, ShortError))
        except TargetError:
            self.close()
            if self._down:
                session._front_broken()
            else:
                session._upstream_lost()
        else:
            if wait is Wait.END:
                self.close()
                session.body_over(conn, self._down)
            else:
                self._watch(wait)

    def _answered(self, mask: int) -> None:
        """The backend speaks, or leaves, before it has the whole request: go on by copying.

        What was redirected comes first: until it is in the target's TCP, the backend waits to be heard. What
        we hold does not: a backend that takes no more of the request may have said why.
        """
        body = self._lane.body
        body.stop()
        if not body.settled and not mask & (EPOLLHUP | EPOLLERR):
            self._wait = Wait.TICK
            self._watch(Wait.TICK)
            return
        rest = body.take()
        self.close()
        self.session.copy_on(rest)
        self.session.on_back(mask)

    def _watch(self, wait: Wait) -> None:
        source = EPOLLRDHUP if wait is Wait.BELL else 0
        target = EPOLLOUT if wait is Wait.TARGET else 0
        if self._down:
            self.session._watch(target)
            if not self._deaf:
                self._conn.watch(source)
        else:
            self.session._watch(source)
            self._conn.watch(target if wait is Wait.TICK else EPOLLIN | target)
        reactor = self.session.ctx.reactor
        if wait is Wait.TICK:
            reactor.timers.arm(self._tick_timer, reactor.now + self._tick_ns)
        elif wait is Wait.AGAIN:
            reactor.call_after_batch(self._again)
