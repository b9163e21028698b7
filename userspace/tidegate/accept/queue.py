"""The accept queue: connections accepted and waiting for a session, ordered by their true age. No I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from tidegate.accept.admission import Admission


class Aged(Protocol):
    established_ns: int  # when the kernel finished the handshake


T = TypeVar("T", bound=Aged)


class AcceptQueue(Generic[T]):
    """Bounded; served from the newest end, swept from the oldest.

    Entries come nearly in order, because the kernel's queue is first in, first out; one taken over from
    another worker's listener can be older than what is here, and is filed where its age belongs.
    """

    __slots__ = ("capacity", "entries")

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError("an accept queue holds at least one connection")
        self.capacity = capacity
        self.entries: deque[T] = deque()  # oldest first; whoever takes from it takes from an end

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[T]:
        """Oldest first."""
        return iter(self.entries)

    @property
    def full(self) -> bool:
        return len(self.entries) >= self.capacity

    def push(self, entry: T) -> None:
        """File `entry` by its age; raises OverflowError when full (the caller chooses whom to drop)."""
        if not self.offer(entry):
            raise OverflowError("accept queue full")

    def offer(self, entry: T) -> bool:
        """As `push`, but False when it is full."""
        entries = self.entries
        if len(entries) >= self.capacity:
            return False
        if not entries or entry.established_ns >= entries[-1].established_ns:
            entries.append(entry)
            return True
        at = len(entries) - 1
        while at > 0 and entries[at - 1].established_ns > entry.established_ns:
            at -= 1
        entries.insert(at, entry)
        return True

    def pop_newest(self) -> T | None:
        return self.entries.pop() if self.entries else None

    def pop_oldest(self) -> T | None:
        return self.entries.popleft() if self.entries else None

    def sweep(self, admission: Admission, now_ns: int) -> list[T]:
        """Take out everything gone stale, oldest first; the rest is younger and stays."""
        swept: list[T] = []
        entries = self.entries
        while entries and admission.stale(entries[0].established_ns, now_ns):
            swept.append(entries.popleft())
        return swept

    def next_expiry_ns(self, admission: Admission) -> int | None:
        """When the oldest entry goes stale, if nobody serves it before."""
        return admission.expires_ns(self.entries[0].established_ns) if self.entries else None
