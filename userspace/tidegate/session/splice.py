"""One direction of a spliced session: what userspace does beside the kernel, without any I/O of its own.

The kernel (bpf/splice.c) redirects what arrives while nothing that it passed to us is still ours and the
target has credit; else it passes. What it passed we copy, but only when everything redirected before has
reached the target's TCP, and we say so by `consume`: when all is consumed the kernel goes on by itself.

    R redirected, P passed, C consumed of P    it redirects while P == C and R + C - acknowledged <= limit
    W written: reached the target's TCP        ours may follow when W == R + C

Rules that data loss has taught:
- recv() == b"" is the end only when the source's TCP received R + what we read, and the target W == R + C.
- A source stays in the map until it is closed. The kernel drops, silently, what arrives in the moment in
  which a socket is taken out, and what was passed and not yet read: copying is done in the map.
- Where in its stream an skb begins is for the kernel's side to look at: skbs repeat bytes.
"""

from __future__ import annotations

from enum import IntFlag
from typing import Protocol

# Reads in one go before others get their turn.
BURST = 16
NEVER = 1 << 62  # bytes: nothing moves so many
# What could not be handed over is looked at again after so many bytes more.
LATER = 16 << 20


class Wait(IntFlag):
    """What a direction waits for."""

    SOURCE = 1  # its source to be readable
    TARGET = 2  # its target to be writable
    TICK = 4  # a moment: nothing tells when the kernel's backlog is empty
    END = 8  # nothing: everything up to the source's FIN is in the target's TCP
    BELL = 16  # the kernel to pass something, or the source's FIN
    AGAIN = 32  # nothing: only that others get their turn


class Port(Protocol):
    """A direction's record and sockets; kernel/splicing.KernelFlow, or a model of it."""

    @property
    def redirected(self) -> int: ...
    @property
    def passed(self) -> int: ...
    @property
    def broken(self) -> bool: ...
    def begin(self, read: int, consumed: int) -> None: ...
    def set_budget(self, redirected: int) -> None: ...
    def hold(self) -> None: ...
    def consume(self, total: int) -> None: ...
    def written(self) -> int: ...
    def ended(self, moved: int) -> bool: ...
    def taken(self) -> int: ...


class Ends(Protocol):
    """The sockets at a direction's two ends, non-blocking, and the map that its source is in."""

    def read(self, most: int = NEVER) -> memoryview:
        """Empty at the source's FIN. BlockingIOError, or OSError when it is broken."""
        ...

    def at_end(self) -> bool:
        """Whether the source sent FIN and nothing is to be read before it. OSError as `read`."""
        ...

    def write(self, data: memoryview) -> int:
        """BlockingIOError, or OSError when the target is broken."""
        ...

    def enter(self) -> bool:
        """Put the source into the map; False: not now. OSError when it is closing."""
        ...

    def leave(self) -> None:
        """Take it out again."""
        ...


class SourceError(Exception):
    """The source is broken."""


class TargetError(Exception):
    """The target is broken."""


class LostError(Exception):
    """Bytes are missing in the stream: both ends must learn of it."""


class Direction:
    """See the module. `step` is called whenever something it waited for may have happened."""

    __slots__ = (
        "_drained_at",
        "_ends",
        "_port",
        "consumed",
        "ended",
        "enter_at",
        "eof",
        "joined",
        "pending",
        "read",
    )

    def __init__(self, port: Port, ends: Ends, enter_at: int = NEVER) -> None:
        """`enter_at`: the kernel gets it when so many bytes were copied."""
        self._port = port
        self._ends = ends
        self.pending: memoryview | None = None
        self.read = 0  # bytes that we read since it began
        self.consumed = 0  # bytes of those that we wrote
        self.enter_at = enter_at
        self.joined = False  # the source is in the map; else all is copied
        self.eof = False
        self.ended = False
        self._drained_at = 0  # what had been redirected when the backlog was last seen empty

    def step(self) -> Wait:
        """Copies what may be copied. SourceError, TargetError, LostError."""
        if self.ended:
            return Wait.END
        for _turn in range(BURST):
            if self.pending is not None:
                if not self._drained():
                    self._own()
                    return Wait.TICK
                if not self._flush(self.pending):
                    return Wait.TARGET
            if self.read >= self.enter_at:
                self.enter()
            try:
                data = self._ends.read()
            except BlockingIOError:
                return self._all_read()
            except OSError as error:
                raise SourceError from error
            if not data:
                return self._at_eof()
            self.read += len(data)
            self.pending = data
        self._own()
        return Wait.AGAIN

    def _all_read(self) -> Wait:
        if not self.joined:
            return Wait.SOURCE
        if self._port.broken:
            raise LostError
        # what is passed behind something redirected the other way is not to be read at once
        return Wait.BELL if self._port.passed == self.read else Wait.TICK

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
        if port.broken:
            raise LostError
        # what is counted here cannot grow any more once it equals all that TCP took in
        if not port.ended(self.moved) or not self._drained():
            return Wait.TICK
        self.ended = True
        return Wait.END

    @property
    def behind(self) -> bool:
        """Whether something that we read, or that was passed to us, is not in the target yet."""
        return self.pending is not None or (self.joined and self._port.passed != self.consumed)

    @property
    def drained(self) -> bool:
        """For who must not close the target too early."""
        return self.pending is None and self._drained()

    @property
    def moved(self) -> int:
        """Bytes taken from the source since the direction began."""
        return self._port.redirected + self.read

    def enter(self) -> None:
        """Let the kernel have what comes from here on, if it will: not when the source is closing."""
        self._port.begin(self.read, self.consumed)
        try:
            self.joined = self._ends.enter()
        except OSError:
            self.enter_at = NEVER
        else:
            self.enter_at = NEVER if self.joined else self.read + LATER
