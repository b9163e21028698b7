"""A model of a spliced session: two kernel sockets, the verdict, the backlog, and what may come between.

The real session/splice.Direction drives it. Whatever Direction asks of the kernel, the model first lets
something happen of its own: bytes arrive, the backlog moves, the peer acknowledges, a FIN comes. What happens
is drawn from a script.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import NamedTuple

from tidegate.session.splice import NEVER, Direction, LostError, Wait

SEND_BUFFER = 120
RECEIVE_BUFFER = 150
LARGEST = 60  # bytes in one skb
PATIENCE = 4000  # turns with nobody in the way: more is a stall


class Broken(AssertionError):
    """A rule did not hold."""


def stream(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


class Sock:
    """One of our two sockets, as the kernel sees it."""

    def __init__(self, sending: bytes) -> None:
        self.peer_sends = sending
        self.arrived = 0  # of it
        self.fin_in = False
        self.fin_out = False
        self.queue: list[Skb] = []  # the ordinary receive queue
        self.read = 0  # of the stream, from that queue
        self.passed = bytearray()  # the psock's
        self.mapped = False
        self.backlog: list[bytes] = []  # redirected to us, not in our TCP yet
        self.out = bytearray()  # all that got into our TCP
        self.acked = 0

    @property
    def room(self) -> int:
        return SEND_BUFFER - (len(self.out) - self.acked)

    @property
    def window(self) -> int:
        waiting = 0 if self.mapped else self.arrived - self.read
        return RECEIVE_BUFFER - waiting - len(self.passed)

    def shut(self) -> None:
        self.backlog.clear()  # what is still there never gets into TCP
        self.fin_out = True


class Skb(NamedTuple):
    """A piece of the stream, and where in it the piece begins: it may repeat what came before."""

    at: int
    data: bytes


class Port:
    """The record of one direction and the verdict on its source: bpf/splice.c in Python."""

    def __init__(self, world: World, source: Sock, target: Sock, limit: int) -> None:
        self._world = world
        self.source = source
        self.target = target
        self.limit = limit
        self._redirected = 0
        self._passed = 0
        self._broken = False
        self.rung = False
        self.published = 0  # consumed
        self.budget = NEVER
        self.base = len(target.out)
        self.read_before = source.read

    # the kernel's side

    def held(self) -> int:
        return self._redirected + self.published + self.base - self.acked()

    def acked(self) -> int:
        return self.target.acked

    def may_redirect(self, size: int) -> bool:
        return (
            self._passed == self.published
            and self._redirected + size <= self.budget
            and self.held() + size <= self.limit
        )

    def repeated(self, skb: Skb) -> int:
        return self.read_before + self._redirected + self._passed - skb.at

    def verdict(self, skb: Skb) -> None:
        if not skb.data:
            return
        again = self.repeated(skb)
        if again < 0:
            self._broken = self.rung = True
            return
        data = skb.data[again:]
        if not data:
            return
        if self.may_redirect(len(data)):
            self._redirected += len(data)
            self.target.backlog.append(data)
            self.used_up()
        else:
            self.ring()
            self._passed += len(data)
            self.source.passed += data

    def used_up(self) -> None:
        if self._redirected == self.budget:
            self.rung = True

    def ring(self) -> None:
        if self._passed == self.published:
            self.rung = True

    # Direction's side

    @property
    def redirected(self) -> int:
        self._world.something()
        return self._redirected

    @property
    def passed(self) -> int:
        self._world.something()
        return self._passed

    @property
    def broken(self) -> bool:
        return self._broken

    def aim(self, target: Sock, done: int) -> None:
        self.budget = 0
        self.target = target
        self.base = len(target.out) - self._redirected - done
        self.published = done

    def set_budget(self, redirected: int) -> None:
        self._world.something()
        self.budget = redirected

    def begin(self, read: int, consumed: int) -> None:
        self._passed = read
        self.published = consumed

    def consume(self, total: int) -> None:
        self._world.something()
        self.published = total

    def hold(self) -> None:
        self._world.something()
        self.budget = 0

    def written(self) -> int:
        self._world.something()
        return len(self.target.out) - self.base

    def ended(self, moved: int) -> bool:
        self._world.something()
        return self.source.arrived - self.read_before == moved

    def taken(self) -> int:
        self._world.something()
        return self.source.arrived - self.read_before + self.source.fin_in


class Ends:
    """The two sockets of a direction."""

    def __init__(self, world: World, port: Port) -> None:
        self._world = world
        self._port = port

    def read(self, most: int = NEVER) -> memoryview:
        self._world.something()
        source = self._port.source
        size = min(most, self._world.buffer)
        if source.passed:
            data = bytes(source.passed[:size])
            del source.passed[: len(data)]
            return memoryview(bytearray(data))
        if source.queue:  # recv() knows where it is in each skb
            skb = source.queue[0]
            data = skb.data[source.read - skb.at :][:size]
            source.read += len(data)
            while source.queue and source.queue[0].at + len(source.queue[0].data) <= source.read:
                del source.queue[0]
            return memoryview(bytearray(data))
        if source.fin_in:
            return memoryview(b"")
        raise BlockingIOError

    def at_end(self) -> bool:
        self._world.something()
        source = self._port.source
        return source.fin_in and not source.passed and not source.queue

    def write(self, data: memoryview) -> int:
        self._world.something()
        target = self._port.target
        size = min(target.room, len(data))
        if size <= 0:
            raise BlockingIOError
        target.out += data[:size]
        return size

    def enter(self) -> bool:
        self._world.something()
        source = self._port.source
        if source.fin_in or source.fin_out:
            raise OSError("not established")
        source.mapped = True
        # SO_RCVLOWAT: what came meanwhile goes through the verdict, skb by skb, read in part or not
        waiting, source.queue = source.queue, []
        for skb in waiting:
            self._port.verdict(skb)
        return True

    def leave(self) -> None:
        source = self._port.source
        source.mapped = False
        source.read = source.arrived  # all of it was, or redirected


class World:
    """One session, from its hand-over to its end."""

    port_type: type[Port] = Port
    direction_type: type[Direction] = Direction

    def __init__(
        self, script: Iterable[int], up: int, down: int, limit: int, enter_at: tuple[int, int], buffer: int
    ) -> None:
        """`script`: one number per event; bytes up and down; bytes copied before each is handed over."""
        self._script = iter(script)
        self.buffer = buffer
        self.limit = limit
        self._busy = False
        self.socks = (Sock(stream(1, up)), Sock(stream(2, down)))
        front, back = self.socks
        self.ports = (self.port_type(self, front, back, limit), self.port_type(self, back, front, limit))
        self.directions = tuple(
            self.direction_type(port, Ends(self, port), at)
            for port, at in zip(self.ports, enter_at, strict=True)
        )
        self._waits = [Wait.AGAIN, Wait.AGAIN]
        self.over = False  # the script is: from here on the kernel does everything at once

    # what happens by itself

    def something(self) -> None:
        if self._busy:
            return
        event = next(self._script, None)
        if event is None:
            self.over = True
            return
        which, kind, size = event & 1, (event >> 1) & 7, 1 + (event >> 4) % LARGEST
        if kind in (0, 1, 2):
            self._arrive(which, size)
        elif kind == 3:
            self._work(which, size)
        elif kind in (4, 5):
            self._ack(which, size)
        elif kind == 6:
            self._fin(which)

    def everything(self) -> None:
        for which in (0, 1):
            self._arrive(which, LARGEST)
            self._work(which, SEND_BUFFER)
            self._ack(which, SEND_BUFFER)
            self._fin(which)

    def _arrive(self, which: int, size: int) -> None:
        sock, port = self.socks[which], self.ports[which]
        data = sock.peer_sends[sock.arrived : sock.arrived + max(0, min(size, sock.window))]
        if not data or sock.fin_in:
            return
        # sent again with something new behind it: every third
        again = min(sock.arrived, size) if size % 3 == 0 else 0
        skb = Skb(sock.arrived - again, sock.peer_sends[sock.arrived - again : sock.arrived] + data)
        sock.arrived += len(data)
        if sock.mapped:
            port.verdict(skb)
            held = sum(map(len, port.target.backlog)) + len(port.target.out) - port.target.acked
            if held > max(self.limit, SEND_BUFFER):
                raise Broken(f"the target holds {held} of {self.limit}")
        else:
            sock.queue.append(skb)

    def _work(self, which: int, size: int) -> None:
        sock = self.socks[which]
        while sock.backlog and size > 0 and sock.room > 0:
            piece = sock.backlog[0][: min(size, sock.room)]
            sock.out += piece
            size -= len(piece)
            sock.backlog[0] = sock.backlog[0][len(piece) :]
            if not sock.backlog[0]:
                del sock.backlog[0]

    def _ack(self, which: int, size: int) -> None:
        sock = self.socks[which]
        sock.acked = min(len(sock.out), sock.acked + size)

    def _fin(self, which: int) -> None:
        sock = self.socks[which]
        if sock.arrived == len(sock.peer_sends) and not sock.fin_in:
            sock.fin_in = True
            if sock.mapped:
                self.ports[which].verdict(Skb(sock.arrived, b""))

    # what the engine does

    def turn(self) -> None:
        self.something()
        for which, direction in enumerate(self.directions):
            if not self._due(which):
                continue
            try:
                wait = self._waits[which] = direction.step()
            except LostError:
                raise Broken("missing bytes") from None
            if wait & Wait.END:
                self.ports[which].target.shut()

    def _due(self, which: int) -> bool:
        """Whether the engine would call: it is told of little once the kernel has the source."""
        wait, port = self._waits[which], self.ports[which]
        if wait is Wait.BELL:
            rung, port.rung = port.rung, False
            return rung or port.source.fin_in
        return wait is not Wait.END

    @property
    def finished(self) -> bool:
        return all(wait is Wait.END for wait in self._waits)

    def run(self) -> None:
        """Raises Broken when anything is lost, out of order, unbounded, stalled, or credit is missing."""
        turns = 0
        while not self.finished:
            self.turn()
            if self.over:
                self._busy = True
                self.everything()
                self._busy = False
                turns += 1
                if turns > PATIENCE:
                    raise Broken(f"stalled: {[(len(s.out), s.arrived) for s in self.socks]}")
        for port, direction in zip(self.ports, self.directions, strict=True):
            if bytes(port.target.out) != port.source.peer_sends:
                raise Broken("lost, doubled or out of order")
            port.target.acked = len(port.target.out)
            if port.held() != 0 or port.published != direction.consumed:
                raise Broken(f"{port.held()} bytes of credit leaked, {port._passed - port.published} passed")
            if direction.moved != len(port.source.peer_sends):
                raise Broken("counted wrong")
