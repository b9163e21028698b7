"""One direction of a spliced session: what userspace does beside the kernel, without any I/O of its own.

The kernel (bpf/splice.c) redirects what arrives while nothing that it passed to us is still ours and the
target has credit; else it passes. What it passed we copy, but only when everything redirected before has
reached the target's TCP, and we say so by `consume`: when all is consumed the kernel goes on by itself.

    R redirected, P passed, C consumed of P    it redirects while P == C and R + C - acknowledged <= limit
    W written: reached the target's TCP        ours may follow when W == R + C

Rules that data loss has taught:
- recv() == b"" is the end only when the source's TCP received R + what we read, and the target W == R + C.
- What was read in part would be redirected whole. So before a source enters, it is read to its end, and not
  touched again: what comes from there on may wait in its receive queue, for as long as we like.
- A source stays in the map until it is closed. The kernel drops, silently, what arrives in the moment in
  which a socket is taken out, and what was passed and not yet read: copying is done in the map.
"""

from __future__ import annotations

from enum import IntFlag
from typing import Protocol

# Reads in one go before others get their turn.
BURST = 16


class Wait(IntFlag):
    """What a direction waits for."""

    SOURCE = 1  # its source to be readable
    TARGET = 2  # its target to be writable
    TICK = 4  # a moment: nothing tells when the kernel's backlog is empty
    END = 8  # nothing: everything up to the source's FIN is in the target's TCP


class Port(Protocol):
    """A direction's record and sockets; kernel/splicing.KernelFlow, or a model of it."""

    @property
    def redirected(self) -> int: ...
    @property
    def passed(self) -> int: ...
    def expect(self, total: int) -> None: ...
    def consume(self, total: int) -> None: ...
    def written(self) -> int: ...
    def received(self) -> int: ...


class Ends(Protocol):
    """The sockets at a direction's two ends, non-blocking, and the map that its source is in."""

    def read(self) -> memoryview:
        """Empty at the source's FIN. BlockingIOError, or OSError when it is broken."""
        ...

    def write(self, data: memoryview) -> int:
        """BlockingIOError, or OSError when the target is broken."""
        ...

    def drain(self) -> tuple[bytes, bool]:
        """All that is there, and whether that is all: what comes next begins an skb."""
        ...

    def enter(self) -> None:
        """Put the source into the map. OSError when it is closing."""
        ...


class SourceError(Exception):
    """The source is broken."""


class TargetError(Exception):
    """The target is broken."""


class Direction:
    """See the module. `step` is called whenever something it waited for may have happened."""

    __slots__ = (
        "_broken",
        "_drained_at",
        "_ends",
        "_port",
        "consumed",
        "ended",
        "eof",
        "joined",
        "limit",
        "paused",
        "pending",
        "read",
    )

    def __init__(self, port: Port, ends: Ends, limit: int) -> None:
        """`limit` is the port's; bytes."""
        self._port = port
        self._ends = ends
        self.limit = limit
        self.pending: memoryview | None = None
        self.read = 0  # bytes that we read since it began
        self.consumed = 0  # bytes of those that we wrote
        self.joined = False  # the source is in the map; else all is copied
        self.paused = False  # about to enter: not read any more
        self.eof = False
        self.ended = False
        self._broken: OSError | None = None  # the source is, but what it sent before comes first
        self._drained_at = 0  # what had been redirected when the backlog was last seen empty

    def step(self) -> Wait:
        """Copies what may be copied. SourceError, TargetError."""
        if self.ended:
            return Wait.END
        if self.paused and self.pending is None:
            return Wait.TICK
        for turn in range(BURST + 1):
            if self.pending is not None:
                if not self._drained():
                    self._own()
                    return Wait.TICK
                if not self._flush(self.pending):
                    return Wait.TARGET
            if self.paused:
                return Wait.TICK
            if turn == BURST:
                break
            if self._broken is not None:
                raise SourceError from self._broken
            try:
                data = self._ends.read()
            except BlockingIOError:
                return Wait.SOURCE
            except OSError as error:
                raise SourceError from error
            if not data:
                return self._at_eof()
            self.read += len(data)
            self.pending = data
        return Wait.SOURCE

    def _own(self) -> None:
        """What read() gave is the worker's buffer: keep a copy."""
        if self.pending is not None and not isinstance(self.pending.obj, bytes):
            self.pending = memoryview(bytes(self.pending))

    def _flush(self, pending: memoryview) -> bool:
        try:
            sent = self._ends.write(pending)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise TargetError from error
        if sent:
            self.consumed += sent
            if sent == len(pending):
                self.pending = None
            else:
                self.pending = pending[sent:]
            self._port.consume(self.consumed)
        self._own()
        return self.pending is None

    def _drained(self) -> bool:
        """Whether all that was redirected is in the target's TCP."""
        redirected = self._port.redirected
        if redirected == self._drained_at:
            return True
        if self._port.written() != redirected + self.consumed:
            return False
        self._drained_at = redirected
        return True

    def _at_eof(self) -> Wait:
        port = self._port
        self.eof = True
        # what is counted here cannot grow any more once it equals all that TCP took in
        if port.received() != port.redirected + self.read or not self._drained():
            return Wait.TICK
        self.ended = True
        return Wait.END

    @property
    def behind(self) -> bool:
        """Whether something that we read, or that was passed to us, is not in the target yet."""
        if self.pending is not None or self.paused:
            return True
        return self.joined and self._port.passed != self.consumed

    @property
    def drained(self) -> bool:
        """For who must not close the target too early."""
        return self.pending is None and self._drained()

    @property
    def moved(self) -> int:
        """Bytes taken from the source since the direction began."""
        return self._port.redirected + self.read

    def enter(self) -> bool:
        """Read the source to its present end, and pause: when what was read is written, it may be resumed.

        False when that is not possible, and it goes on being copied: the source is closing, or sends so fast
        that its end is not found.
        """
        if self.joined or self.eof or self.paused or self._broken is not None:
            return False
        try:
            data, whole = self._ends.drain()
        except OSError as error:
            self._broken = error
            return False
        # from here on nobody reads: what comes now is whole when it is redirected
        self.paused = whole
        self.read += len(data)
        if data:
            self.pending = memoryview(bytes(self.pending or b"") + data)
        return self.paused

    def resume(self) -> None:
        """Let the kernel have what has come since enter(). Call it with nothing pending."""
        self.paused = False
        self._port.expect(self.consumed)
        self._port.consume(self.consumed)
        try:
            self._ends.enter()
        except OSError:
            return  # it is closing: the rest is copied
        self.joined = True
