"""A source of message bodies: the kernel moves each up to its end, and what follows is its reader's again.

Between bodies the source stays in the map with a budget of 0: all that comes is passed, and read by whoever
reads heads; `skip` tells how much. One that nothing can come from, a backend that was asked nothing, may
`leave`: what is in its receive queue when it enters again need not be copied then.
"""

from __future__ import annotations

from tidegate.session.splice import BURST, Direction, Ends, LostError, Port, SourceError, Wait


class ShortError(Exception):
    """The source ended before the body did."""


class BodySource(Direction):
    """See the module."""

    __slots__ = ("until",)

    def __init__(self, port: Port, ends: Ends) -> None:
        super().__init__(port, ends, enter_at=0)
        self.until = 0  # as `moved`: where the body under way ends

    @property
    def welcome(self) -> bool:
        """Whether it is worth trying: not right after the kernel would not have it."""
        return self.joined or self.read >= self.enter_at

    @property
    def unread(self) -> bool:
        """Whether something waits to be read: TCP does not know of it, and would close without a reset."""
        return self.joined and self._port.passed != self.read

    def skip(self, count: int) -> None:
        """So many bytes were read by others."""
        self.read += count
        self.consumed = self.read

    def start(self, size: int) -> bool:
        """A body of so many bytes comes next. False: the kernel will not have the source now."""
        self.eof = self.ended = False
        self._drained_at = self._port.redirected
        self.until = self.moved + size
        self._port.set_budget(self.until - self.read)
        if not self.joined:
            self.enter()  # what has come already goes to the kernel at once
            if not self.joined:
                self.stop()
        return self.joined

    def leave(self) -> bool:
        """Only when nothing can come: what waits to be read is lost then, and what arrives meanwhile.

        False: something came all the same, or its FIN. It can only be closed: TCP's counts are not what the
        next reader of it would expect.
        """
        port = self._port
        if not self.joined:
            return True
        if port.passed != self.read:
            return False
        self.joined = False
        self.enter_at = 0
        self._ends.leave()
        return port.taken() == port.redirected + self.read

    def stop(self) -> None:
        """All that comes is passed from now on, wherever the body stands."""
        self._port.hold()

    @property
    def settled(self) -> bool:
        """Whether all that was redirected is in the target's TCP, so that others may write to it."""
        return self._drained()

    def take(self) -> bytes:
        """What was read and is not written yet: it is the caller's to write."""
        rest, self.pending = bytes(self.pending or b""), None
        self.consumed = self.read
        return rest

    def step(self) -> Wait:
        """Copies what is passed of the body. SourceError, TargetError, LostError, ShortError."""
        port = self._port
        for _turn in range(BURST):
            if self.pending is not None:
                if not self._drained():
                    self._own()
                    return Wait.TICK
                if not self._flush(self.pending):
                    return Wait.TARGET
            # only while something passed waits do both counts stand still: a byte read by mistake is the
            # next message's
            if port.passed == self.read:
                return self._nothing_passed()
            left = self.until - self.moved
            if left <= 0:
                return self._at_end()
            try:
                data = self._ends.read(min(left, port.passed - self.read))
            except BlockingIOError:
                return Wait.TICK  # behind something redirected the other way
            except OSError as error:
                raise SourceError from error
            if not data:  # its FIN is told before what is passed behind something
                return Wait.TICK
            self.read += len(data)
            self.pending = data
            port.set_budget(self.until - self.read)
        self._own()
        return Wait.AGAIN

    def _at_end(self) -> Wait:
        if not self._drained():
            return Wait.TICK
        self.ended = True
        return Wait.END

    def _nothing_passed(self) -> Wait:
        port = self._port
        if port.broken:
            raise LostError
        if self.moved >= self.until:
            return self._at_end()
        try:
            ended = self._ends.at_end()
        except OSError as error:
            raise SourceError from error
        if port.passed != self.read:
            return Wait.AGAIN
        if not ended:
            return Wait.BELL
        if not port.ended(self.moved):
            return Wait.TICK
        if self.moved >= self.until:  # its last bytes came before the FIN, and after the first look
            return self._at_end()
        raise ShortError
