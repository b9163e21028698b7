"""Values made anew per request or second: request ids and dates."""

from __future__ import annotations

import os
from collections.abc import Callable
from email.utils import formatdate
from typing import Final

_HEX: Final = [b"%02x" % number for number in range(256)]


class RequestIds:
    """X-Request-Id values: 16 random hex digits per worker, then 16 of a counter.

    Unique without a random read per request. They name requests in logs and are no secret. Make one after
    fork(): two workers with one prefix would make the same ids.
    """

    __slots__ = ("_count", "_prefix", "_stem")

    def __init__(self, prefix: bytes | None = None) -> None:
        self._prefix = prefix if prefix is not None else os.urandom(8).hex().encode()
        self._count = 0
        self._stem = b"%b%014x" % (self._prefix, 0)

    def make(self) -> bytes:
        count = self._count = self._count + 1
        low = count & 0xFF
        if not low:  # formatting a number takes ten times what putting two pieces together does
            self._stem = b"%b%014x" % (self._prefix, count >> 8)
        return self._stem + _HEX[low]


class DateField:
    """b"\\r\\nDate: ..." in the form of RFC 9110 5.6.7, formatted once a second."""

    __slots__ = ("_clock", "_line", "_second")

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: seconds since the epoch, like time.time."""
        self._clock = clock
        self._second = -1
        self._line = b""

    def line(self) -> bytes:
        second = int(self._clock())
        if second != self._second:
            self._second = second
            self._line = b"\r\nDate: " + formatdate(second, usegmt=True).encode("ascii")
        return self._line
