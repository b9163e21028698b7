"""Spliced sessions: handing a relay's two directions to the kernel, and driving what is left to do.

A session is handed over as a whole, both directions at once: a backend's early answer to a long upload is
then in the client's send queue before the reset that follows it can throw it away.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from tidegate.kernel.splicing import CannotSplice, KernelFlow
from tidegate.loop.reactor import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP
from tidegate.loop.timers import Timer
from tidegate.metrics.names import LISTENER, EndReason
from tidegate.session.splice import LATER, NEVER, Direction, LostError, SourceError, TargetError, Wait
from tidegate.session.splice_ends import SocketEnds, Taken

if TYPE_CHECKING:
    from tidegate.session.splicer import Splicer
    from tidegate.session.tcp import TcpSession
    from tidegate.session.tcp_state import Flow

# Nothing tells when the kernel's backlog is empty: look again this often.
TICK_NS = 1_000_000
# Counters of a spliced session are brought up to date this often, and when somebody asks.
SLOWEST_TICK_NS = 64_000_000
SYNC_NS = 1_000_000_000
# What a source is watched for. One that the kernel has is not: each skb would wake us.
_INTEREST = {Wait.SOURCE: EPOLLIN, Wait.BELL: EPOLLRDHUP}

_SPLICED = LISTENER.index("spliced_total")
_BYTES = LISTENER.index("spliced_bytes_total")
_log = logging.getLogger("tidegate.splice")


def hand_over(splicer: Splicer, session: TcpSession) -> int:
    """Tries to; else the bytes that the session has to have moved before the next attempt."""
    back = session.back
    if back is None or not splicer.possible(session.front, back):
        return NEVER
    if session._up.eof or session._down.eof:
        return NEVER
    share = splicer.share(2)
    if not share:
        return max(session._up.bytes, session._down.bytes) + LATER
    try:
        flows = splicer.join(session.front, back, share)
    except CannotSplice as refusal:
        splicer.stop()
        _log.debug("not_spliced", extra={"kv": {"token": session.token, "reason": str(refusal)}})
        return NEVER
    session.ctx.words[_SPLICED] += 1
    session.splice = spliced = Spliced(session, splicer, flows)
    splicer.begin(flows, spliced)
    spliced.start()
    return NEVER


class _Side:
    """One direction of a spliced session, with the relay's own record of it."""

    __slots__ = (
        "counted",
        "direction",
        "flow",
        "held",
        "port",
        "redirected",
        "taken",
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
        self.taken = Taken()
        self.held = 0  # by the target, at the last tick
        self.tick_ns = TICK_NS


class Spliced:
    """One session whose bytes the kernel moves."""

    __slots__ = (
        "_back_dead",
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
        self._back_dead = False
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
        for sock, callback in ((session.front, self.on_front), (session.back, self.on_back)):
            if reactor.watches(sock.fileno()):  # else it will be, when there is something to wait for
                reactor.redirect(sock.fileno(), callback)
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
            max(self._up.port.redirected_ns, self._up.taken.ns(self._up.port, now)),
            self._down.port.received_ns,
            max(self._down.port.redirected_ns, self._down.taken.ns(self._down.port, now)),
        )

    def stop(self) -> None:
        """Nothing more is copied, and no bell heard; the records stay."""
        timers = self.session.ctx.reactor.timers
        timers.cancel(self._tick_timer)
        timers.cancel(self._sync_timer)
        self.splicer.stop(self.flows)

    def close(self) -> None:
        """Once, before the sockets are closed."""
        self.stop()
        self.sync()
        self.splicer.release(self.flows)

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
        self._back_dead = self._back_dead or dead != 0
        sides = []
        if mask & (EPOLLIN | EPOLLRDHUP) or dead:
            sides.append(self._down)
        if mask & EPOLLOUT:
            sides.append(self._up)
        self._advance(*sides)
        if dead and session.relaying and session._back_interest == 0:
            session._park_back()

    def on_passed(self, flow: KernelFlow) -> None:
        side = self._up if flow is self._up.port else self._down
        if side.wait is Wait.BELL:
            self._advance(side)

    def end(self, reason: EndReason) -> None:
        self.session.end(reason)

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
        # all that it sent is delivered, and it takes nothing: what waits for it would do so for ever
        if self._back_dead and self._down.flow.finished and not self._up.flow.finished:
            session._target_broken(self._up.flow)
            self._up.wait = Wait.END
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
