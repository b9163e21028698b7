"""Bytes into lines, bounded in memory and in work however they arrive. No I/O."""

from __future__ import annotations


class LineTooLong(Exception):
    """More than the limit came without a line end."""


class LineSplitter:
    """Feed it what a stream brings, take the lines out one by one."""

    __slots__ = ("_buffer", "_scanned", "_start", "limit")

    def __init__(self, limit: int) -> None:
        """`limit`: bytes of the longest line, its end not counted."""
        self.limit = limit
        self._buffer = bytearray()
        self._start = 0  # what is before was taken
        self._scanned = 0  # no line end between start and here

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next(self) -> bytes | None:
        """The next whole line without its end; None when there is none yet. Raises LineTooLong."""
        at = self._buffer.find(b"\n", self._scanned)
        if at < 0:
            self._scanned = len(self._buffer)
            self._compact()
            if len(self._buffer) > self.limit:
                raise LineTooLong
            return None
        if at - self._start > self.limit:
            raise LineTooLong
        line = bytes(self._buffer[self._start : at])
        self._start = self._scanned = at + 1
        if self._start > len(self._buffer) // 2:  # each byte is moved once on average, not once per line
            self._compact()
        return line

    def has_line(self) -> bool:
        """Whether `next` would return one, or raise."""
        return self._buffer.find(b"\n", self._scanned) >= 0 or len(self) > self.limit

    def clear(self) -> None:
        self._buffer.clear()
        self._start = self._scanned = 0

    def __len__(self) -> int:
        """Bytes held and not yet taken."""
        return len(self._buffer) - self._start

    def _compact(self) -> None:
        if self._start:
            del self._buffer[: self._start]
            self._scanned -= self._start
            self._start = 0
