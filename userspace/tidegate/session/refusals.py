"""The last messages that were refused, with the bytes around the offending one: for `tidegate ctl errors`.

One ring per process, written by whoever parses; nothing is sent anywhere until somebody asks.
"""

from __future__ import annotations

import re
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Final

CAPACITY: Final = 64
# Bytes kept before and after the offending one.
AROUND: Final = 48
# What no HTTP/1 head may hold (RFC 9112, 2.2 and 5): control bytes, a bare CR or LF, a folded line, a space
# before the colon of a field.
_SUSPECT: Final = re.compile(
    rb"(?P<byte>[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?=[^\n])|(?<!\r)\n)"
    rb"|(?<=\n)(?P<fold>[ \t])|(?<=\n)[^:\r\n]*?(?P<space>[ \t]):"
)
_OF_HEADS: Final = frozenset({"header", "request_line", "status_line"})


@dataclass(frozen=True, slots=True)
class Refusal:
    """One refused message. `position` counts from its first byte; -1 when no single byte is to blame."""

    at_s: float  # wall clock
    listener: str
    client: str
    side: str  # "client" | "backend": who sent it
    fault: str
    message: str
    position: int
    excerpt: bytes
    excerpt_starts: int  # position of the excerpt's first byte

    def describe(self) -> dict[str, Any]:
        """JSON-able; bytes that do not print as \\xNN."""
        return {
            "time": round(self.at_s, 3),
            "listener": self.listener,
            "client": self.client,
            "side": self.side,
            "fault": self.fault,
            "message": self.message,
            "position": self.position,
            "byte": self.offending,
            "excerpt": self.excerpt.decode("latin-1").encode("unicode_escape").decode("ascii"),
            "excerpt_starts": self.excerpt_starts,
        }

    @property
    def offending(self) -> int | None:
        """The value of the byte to blame."""
        index = self.position - self.excerpt_starts
        return self.excerpt[index] if self.position >= 0 and 0 <= index < len(self.excerpt) else None


class Refusals:
    """The ring."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.total = 0
        self._ring: deque[Refusal] = deque(maxlen=capacity)

    def note(
        self,
        *,
        listener: str,
        client: str,
        fault: str,
        message: str,
        data: bytes | bytearray | memoryview = b"",
        position: int = -1,
        side: str = "client",
    ) -> None:
        """Keep one; of `data` (the message as far as it was read) only what is around `position`.

        Where the parser does not name a position, the first byte that no head may hold is taken for it.
        """
        self.total += 1
        if position < 0 and fault in _OF_HEADS:
            position = first_suspect(data)
        start = max(0, min(position, len(data)) - AROUND)
        excerpt = bytes(data[start : start + 2 * AROUND + 1])
        self._ring.append(
            Refusal(time.time(), listener, client, side, fault, message, position, excerpt, start)
        )

    def last(self, count: int) -> list[Refusal]:
        """Newest first."""
        return list(self._ring)[::-1][:count]


def first_suspect(data: bytes | bytearray | memoryview) -> int:
    """Position of the first byte of a message head that is out of place wherever it stands; -1 for none."""
    head, _, _ = bytes(data).partition(b"\r\n\r\n")
    found = _SUSPECT.search(head)
    if found is None:
        return -1
    return max(found.start(name) for name in ("byte", "fold", "space"))


RING: Final = Refusals()
