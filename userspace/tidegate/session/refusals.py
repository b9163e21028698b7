"""The last messages that were refused, with the bytes around the offending one: for `tidegate errors`.

One ring per process, written by whoever parses; nothing is sent anywhere until somebody asks.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Final

from tidegate.http.errors import PeerError

CAPACITY: Final = 64
# Bytes kept before and after the offending one.
AROUND: Final = 48


@dataclass(frozen=True, slots=True)
class Refusal:
    """One refused message.

    Positions count from the first byte of the head, of the chunked body or of the PROXY header; `position`
    is -1 when no single byte is to blame.
    """

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
        index = self.position - self.excerpt_starts
        byte = self.excerpt[index] if self.position >= 0 and 0 <= index < len(self.excerpt) else None
        before = _printed(self.excerpt[:index]) if byte is not None else ""
        return {
            "time": round(self.at_s, 6),  # one worker's and the next one's are put in order by it
            "listener": self.listener,
            "client": self.client,
            "side": self.side,
            "fault": self.fault,
            "message": self.message,
            "position": self.position,
            "byte": byte,
            "excerpt": _printed(self.excerpt),
            "excerpt_starts": self.excerpt_starts,
            "mark": None if byte is None else [len(before), len(before + _printed(bytes((byte,))))],
        }


class Refusals:
    """The ring."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.total = 0
        self._ring: deque[Refusal] = deque(maxlen=capacity)

    def note(self, error: PeerError, *, listener: str, client: str, side: str = "client") -> None:
        """Keep one; of its bytes only those around the one to blame."""
        self.total += 1
        data, at, base = error.data, error.at, error.base
        start = max(0, min(at, len(data)) - AROUND)
        excerpt = bytes(data[start : start + 2 * AROUND + 1])
        position = base + at if at >= 0 else -1
        self._ring.append(
            Refusal(
                time.time(),
                listener,
                client,
                side,
                error.fault,
                error.message,
                position,
                excerpt,
                base + start,
            )
        )

    def last(self, count: int) -> list[Refusal]:
        """Newest first."""
        return list(self._ring)[::-1][:count]


def _printed(data: bytes) -> str:
    return data.decode("latin-1").encode("unicode_escape").decode("ascii")


RING: Final = Refusals()
