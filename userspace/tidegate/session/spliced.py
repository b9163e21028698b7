"""Spliced sessions: handing a relay's two directions to the kernel, and driving what is left to do.

A session is handed over as a whole, both directions at once: a backend's early answer to a long upload is
then in the client's send queue before the reset that follows it can throw it away.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from tidegate import logs
from tidegate.config.model import Splice
from tidegate.kernel.splicing import CannotSplice, KernelFlow, Splicing
from tidegate.loop.reactor import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP, Reactor
from tidegate.loop.timers import Timer
from tidegate.metrics.names import LISTENER, EndReason
from tidegate.session.splice import LATER, NEVER, Direction, LostError, SourceError, TargetError, Wait
from tidegate.session.splice_budget import Budget
from tidegate.session.splice_ends import SocketEnds

if TYPE_CHECKING:
    from tidegate.session.context import Context
    from tidegate.session.tcp import Flow, TcpSession

# Nothing tells when the kernel's backlog is empty: look again this often.
TICK_NS = 1_000_000
# Counters of a spliced session are brought up to date this often, and when somebody asks.
SLOWEST_TICK_NS = 64_000_000
SYNC_NS = 1_000_000_000
# What a source is watched for. One that the kernel has is not: each skb would wake us.
_INTEREST = {Wait.SOURCE: EPOLLIN, Wait.BELL: EPOLLRDHUP}

_SPLICED = LISTENER.index("spliced_total")
_BYTES = LISTENER.index("spliced_bytes_total")
_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_log = logging.getLogger("tidegate.splice")
_limited = logs.RateLimited(_log, per_second=1)


class Splicer:
    """What the spliced sessions of one worker share."""

    def __init__(
        self, kernel: Splicing, reactor: Reactor, limit: int, total: int, *, trusted: bool = True
    ) -> None:
        """`limit` and `total` as splice_limit and splice_total; not `trusted`: for splice = "on" alone."""
        self.kernel = kernel
        self.budget = Budget(limit, total)
        self.trusted = trusted
        self.active: dict[int, Spliced] = {}  # by token
        self._passing: dict[int, Callable[[], None]] = {}  # by index of a direction
        reactor.add(kernel.bell.fileno(), EPOLLIN, self._on_bell)

    def _on_bell(self, _mask: int) -> None:
        for index in self.kernel.bell.take():
            passing = self._passing.get(index)
            if passing is not None:
                passing()

    def threshold(self, ctx: Context) -> int:
        """After how many bytes of one direction a session of this listener is handed over."""
        listener = ctx.listener
        if listener.splice is Splice.OFF or (listener.splice is Splice.AUTO and not self.trusted):
            return NEVER
        return listener.splice_after

    def hand_over(self, session: TcpSession) -> int:
        """Tries to; else the bytes that it has to have moved before the next attempt."""
        back = session.back
        if back is None or session.front.family not in _FAMILIES or back.family not in _FAMILIES:
            return NEVER
        if session._up.eof or session._down.eof:
            return NEVER
        moved = max(session._up.bytes, session._down.bytes)
        share = self.budget.admit([flow for one in self.active.values() for flow in one.flows])
        if not share:
            return moved + LATER
        try:
            flows = self.kernel.join(session.front, back, share)
        except CannotSplice as refusal:
            _log.debug("not_spliced", extra={"kv": {"token": session.token, "reason": str(refusal)}})
            return NEVER
        for one in self.active.values():
            one.set_limit(share)
        session.ctx.words[_SPLICED] += 1
        session.splice = self.active[session.token] = spliced = Spliced(session, self, flows)
        self._passing[flows[0].index] = spliced.on_up_passed
        self._passing[flows[1].index] = spliced.on_down_passed
        spliced.start()
        return NEVER

    def left(self, spliced: Spliced) -> None:
        self.active.pop(spliced.session.token, None)
        for flow in spliced.flows:
            self._passing.pop(flow.index, None)
        self.kernel.release(spliced.flows)
        share = self.budget.raised([flow for one in self.active.values() for flow in one.flows])
        if share:
            for one in self.active.values():
                one.set_limit(share)

    def reap(self) -> int:
        """Compare the kernel's maps with the sessions at hand; entries of nobody, which are deleted."""
        mine = {flow.cookie for one in self.active.values() for flow in one.flows}
        strays = self.kernel.cookies() - mine
        if strays:
            _limited.event(logging.ERROR, "splice_strays", count=len(strays))
            self.kernel.forget(strays)
        return len(strays)


class _Side:
    """One direction of a spliced session, with the relay's own record of it."""

    __slots__ = (
        "acked",
        "counted",
        "direction",
        "flow",
        "held",
        "port",
        "redirected",
        "tick_ns",
        "wait",
    )

    def __init__(self, port: KernelFlow, direction: Direction, flow: Flow) -> None:
        self.port = port
        self.direction = direction
        self.flow = flow
        self.wait = Wait.SOURCE
        self.counted = 0
        self.redirected = 0
        self.acked = 0
        self.held = 0  # by the target, at the last tick
        self.tick_ns = TICK_NS


class Spliced:
    """One session whose bytes the kernel moves."""

    __slots__ = (
        "_down",
        "_sync_timer",
        "_tick_timer",
        "_up",
        "flows",
        "session",
        "splicer",
    )

    def __init__(
        self,
        session: TcpSession,
        splicer: Splicer,
        flows: tuple[KernelFlow, KernelFlow],
    ) -> None:
        self.session = session
        self.splicer = splicer
        self.flows = flows
        self._up = self._side(flows[0], session._up)
        self._down = self._side(flows[1], session._down)
        self._tick_timer = Timer(self._on_tick)
        self._sync_timer = Timer(self._on_sync)

    def _side(self, port: KernelFlow, flow: Flow) -> _Side:
        ctx = self.session.ctx
        ends = SocketEnds(ctx.buffer, ctx.view, self.splicer.kernel, port)
        threshold = self.splicer.threshold(ctx)
        return _Side(port, Direction(port, ends, threshold - flow.bytes), flow)

    def start(self) -> None:
        session = self.session
        reactor = session.ctx.reactor
        assert session.back is not None
        reactor.redirect(session.front.fileno(), self.on_front)
        reactor.redirect(session.back.fileno(), self.on_back)
        reactor.timers.arm(self._sync_timer, reactor.now + SYNC_NS)
        self._advance(self._up, self._down)

    # what the session and the splicer ask

    @property
    def behind(self) -> bool:
        """Whether the backend does not take what waits for it."""
        return self._up.direction.behind

    @property
    def undelivered(self) -> bool:
        """Whether something of the backend's has not reached the client's TCP yet."""
        return not self._down.direction.drained

    def set_limit(self, limit: int) -> None:
        for flow in self.flows:
            flow.set_limit(limit)

    def sync(self) -> None:
        """Bring the session's counters up to date."""
        words = self.session.ctx.words
        for side in (self._up, self._down):
            redirected = side.port.redirected
            words[_BYTES] += redirected - side.redirected
            side.redirected = redirected
            moved = side.direction.moved
            flow, delta = side.flow, moved - side.counted
            if delta:
                side.counted = moved
                flow.bytes += delta
                words[flow.sent_word] += delta

    def last_moves(self, now: int) -> tuple[int, int, int, int]:
        """(bytes from the client, to the backend, from the backend, to the client): when the last moved, ns.

        Those that left a send queue count as moving: they are as old as the ACK that said so.
        """
        return (
            self._up.port.received_ns,
            max(self._up.port.redirected_ns, self._taken(self._up, now)),
            self._down.port.received_ns,
            max(self._down.port.redirected_ns, self._taken(self._down, now)),
        )

    @staticmethod
    def _taken(side: _Side, now: int) -> int:
        try:
            progress = side.port.acknowledged()
        except OSError:  # closed meanwhile
            return 0
        if progress.acked == side.acked:
            return 0
        side.acked = progress.acked
        return now - progress.last_ack_ms * 1_000_000

    def stop(self) -> None:
        """Nothing more is copied; the records stay."""
        timers = self.session.ctx.reactor.timers
        timers.cancel(self._tick_timer)
        timers.cancel(self._sync_timer)

    def close(self) -> None:
        """Once, before the sockets are closed."""
        self.stop()
        self.sync()
        self.splicer.left(self)

    # events

    def on_front(self, mask: int) -> None:
        session = self.session
        if mask & EPOLLERR:
            session._end(EndReason.CLIENT_RESET, reset_back=True)
            return
        sides: list[_Side] = []
        if mask & (EPOLLIN | EPOLLRDHUP | EPOLLHUP):
            sides.append(self._up)
        if mask & EPOLLOUT:
            sides.append(self._down)
        self._advance(*sides)
        # hung up, and nothing that would be read or written: it would be reported for ever
        if mask & EPOLLHUP and session.relaying and session._front_interest == 0:
            session._park_front()

    def on_back(self, mask: int) -> None:
        session = self.session
        dead = mask & (EPOLLHUP | EPOLLERR)
        if dead and self._down.flow.finished and not self._up.flow.finished:
            session._target_broken(self._up.flow)
            self._up.wait = Wait.END
            if not session.relaying:
                return
        sides = []
        if mask & (EPOLLIN | EPOLLRDHUP) or dead:
            sides.append(self._down)
        if mask & EPOLLOUT:
            sides.append(self._up)
        self._advance(*sides)
        if dead and session.relaying and session._back_interest == 0:
            session._park_back()

    def on_up_passed(self) -> None:
        self._passed(self._up)

    def on_down_passed(self) -> None:
        self._passed(self._down)

    def _passed(self, side: _Side) -> None:
        if side.wait is Wait.BELL:
            self._advance(side)

    def _again(self) -> None:
        if self.session.relaying and self.session.splice is self:
            self._advance(*(side for side in (self._up, self._down) if side.wait is Wait.AGAIN))

    def _on_tick(self, now: int) -> None:
        sides = [side for side in (self._up, self._down) if side.wait & Wait.TICK]
        for side in sides:
            held = side.port.in_flight()
            # a target that takes nothing is asked less and less often
            side.tick_ns = TICK_NS if held != side.held else min(2 * side.tick_ns, SLOWEST_TICK_NS)
            side.held = held
        self._advance(*sides)

    def _on_sync(self, now: int) -> None:
        self.sync()
        self.session.ctx.reactor.timers.arm(self._sync_timer, now + SYNC_NS)

    def _advance(self, *sides: _Side) -> None:
        session = self.session
        for side in sides:
            if not side.flow.finished:
                side.wait = self._step(side)
            if not session.relaying:
                return
        self._watch()

    def _step(self, side: _Side) -> Wait:
        session, direction = self.session, side.direction
        before = direction.read, direction.consumed
        try:
            wait = direction.step()
            if wait & Wait.END:
                wait = self._end_of(side)
        except SourceError:
            session._source_broken(side.flow)
            return Wait.END
        except TargetError:
            session._target_broken(side.flow)
            return Wait.END
        except LostError:
            session._end(EndReason.INTERNAL_ERROR, reset_front=True, reset_back=True)
            return Wait.END
        if direction.read != before[0]:
            session._received(side.flow, session.ctx.reactor.now)
        if direction.consumed != before[1]:
            session._delivered(side.flow, session.ctx.reactor.now)
        return wait

    def _end_of(self, side: _Side) -> Wait:
        """All is delivered: pass the FIN on."""
        side.flow.eof = True
        self.session._finish(side.flow, side.port.target)
        return Wait.END

    def _watch(self) -> None:
        up, down = self._up, self._down
        front = _INTEREST.get(up.wait, 0)
        if down.wait & Wait.TARGET:
            front |= EPOLLOUT
        back = _INTEREST.get(down.wait, 0)
        if up.wait & Wait.TARGET:
            back |= EPOLLOUT
        self.session._watch(front, back)
        if (up.wait | down.wait) & Wait.TICK:
            reactor = self.session.ctx.reactor
            ticks = [side.tick_ns for side in (up, down) if side.wait & Wait.TICK]
            reactor.timers.arm(self._tick_timer, reactor.now + min(ticks))
        if (up.wait | down.wait) & Wait.AGAIN:
            self.session.ctx.reactor.call_after_batch(self._again)
