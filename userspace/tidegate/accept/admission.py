"""Who is served: the rule that looks at a connection's true age. No I/O, the clock is passed in."""

from __future__ import annotations

from typing import Protocol


class Admission(Protocol):
    """Decides over one connection at a time; every time is CLOCK_MONOTONIC in ns."""

    def stale(self, established_ns: int, now_ns: int) -> bool:
        """Whether a connection whose handshake finished at `established_ns` is to be refused now."""
        ...

    def expires_ns(self, established_ns: int) -> int:
        """When a connection that only waits becomes stale."""
        ...


class Deadline:
    """Refuse what is older than a fixed age: the client is taken to have given up by then."""

    __slots__ = ("stale_after_ns",)

    def __init__(self, stale_after_ns: int) -> None:
        self.stale_after_ns = stale_after_ns

    def stale(self, established_ns: int, now_ns: int) -> bool:
        return now_ns - established_ns > self.stale_after_ns

    def expires_ns(self, established_ns: int) -> int:
        return established_ns + self.stale_after_ns + 1
