"""The cap on what a cluster carries at once in one worker, and the queue in front of it. No I/O.

The queue is kept where it can be seen: an entry brings its age along (the kernel's stamp of the connection
for its first request, the arrival of the head for later ones) and it goes on counting here. Places go to
the newest entry, as in the accept queue and for the same reason: under overload somebody must wait too
long, and it had better be those who already have. What has passed its deadline is refused, by a timer,
whether or not a place comes free.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Hashable
from enum import Enum, StrEnum
from typing import Generic, TypeVar

from tidegate.loop.timers import Timer, TimerWheel

T = TypeVar("T", bound=Hashable)


class Entry(Enum):
    """What became of a request at the gate."""

    ENTERED = 1  # it holds a place: call `leave` once
    WAITING = 2  # `serve` or `refuse` will be called, unless it is cancelled
    FULL = 3  # refused: max_waiting are waiting already


class WaitEnd(StrEnum):
    """How waiting ended; `FULL` never waited."""

    SERVED = "served"
    STALE = "stale"  # its deadline passed, or admission refused it
    FULL = "full"
    GONE = "gone"  # cancelled: the client left
    SHUTDOWN = "shutdown"


class Gate(Generic[T]):
    """At most `limit` items inside (None: any number), at most `max_waiting` in front, newest first.

    `serve(item)` hands over a place (in flight, already counted), `refuse(item, reason)` an end.
    `admit(item, now)` is asked immediately before a place is handed over. Callbacks may call anything here.
    """

    __slots__ = (
        "_admit",
        "_keys",
        "_refuse",
        "_sequence",
        "_serve",
        "_serving",
        "_timer",
        "_timers",
        "_waiting",
        "ended",
        "in_flight",
        "limit",
        "max_waiting",
    )

    def __init__(
        self,
        limit: int | None,
        max_waiting: int,
        timers: TimerWheel,
        serve: Callable[[T], None],
        refuse: Callable[[T, WaitEnd], None],
        admit: Callable[[T, int], bool] | None = None,
    ) -> None:
        self.limit = limit
        self.max_waiting = max_waiting
        self.in_flight = 0
        self.ended = dict.fromkeys(WaitEnd, 0)
        self._serve = serve
        self._refuse = refuse
        self._admit = admit
        self._timers = timers
        self._timer = Timer(self._sweep)
        self._waiting: list[tuple[int, int, T]] = []  # (established_ns, sequence, item), oldest first
        self._keys: dict[T, tuple[int, int, int]] = {}  # item -> (established_ns, sequence, deadline_ns)
        self._sequence = 0  # breaks ties, so that items are never compared
        self._serving = False

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def oldest_ns(self) -> int | None:
        """`established_ns` of the oldest entry that waits."""
        return self._waiting[0][0] if self._waiting else None

    def enter(self, item: T, established_ns: int, deadline_ns: int) -> Entry:
        """Take a place, or wait for one until `deadline_ns`.

        Raises ValueError when the item waits already.
        """
        if self.limit is None or self.in_flight < self.limit:
            self.in_flight += 1
            return Entry.ENTERED
        if item in self._keys:
            raise ValueError("this item is waiting already")
        if len(self._waiting) >= self.max_waiting:
            self.ended[WaitEnd.FULL] += 1
            return Entry.FULL
        self._sequence += 1
        self._keys[item] = (established_ns, self._sequence, deadline_ns)
        insort(self._waiting, (established_ns, self._sequence, item))
        if not self._timer.armed or deadline_ns < self._timer.deadline_ns:
            self._timers.arm(self._timer, max(deadline_ns, 1))
        return Entry.WAITING

    def leave(self, now_ns: int) -> None:
        """What held a place has ended; the newest that may still be served gets it.

        Raises ValueError when nothing holds a place.
        """
        if self.in_flight < 1:
            raise ValueError("more left than entered")
        self.in_flight -= 1
        if self._waiting:
            self._hand_over(now_ns)

    def cancel(self, item: T) -> bool:
        """The client left while waiting: forget it without a callback. False when it was not waiting."""
        if not self._take(item):
            return False
        self.ended[WaitEnd.GONE] += 1
        return True

    def set_limit(self, limit: int | None, max_waiting: int, now_ns: int) -> None:
        """New limits: more room is used at once; less is reached as items leave, nobody is thrown out."""
        self.limit = limit
        self.max_waiting = max_waiting
        if self._waiting:
            self._hand_over(now_ns)

    def close(self) -> None:
        """The worker is leaving: refuse all that wait."""
        while self._waiting:
            self._end(self._waiting[0][2], WaitEnd.SHUTDOWN)
        self._timers.cancel(self._timer)

    def _hand_over(self, now_ns: int) -> None:
        # serve() may fail at once and call leave(): the loop that runs already goes on with that place,
        # instead of a call within a call for each of a thousand that wait.
        if self._serving:
            return
        self._serving = True
        try:
            while self._waiting and (self.limit is None or self.in_flight < self.limit):
                item = self._waiting[-1][2]
                deadline_ns = self._keys[item][2]
                if now_ns >= deadline_ns or (self._admit is not None and not self._admit(item, now_ns)):
                    self._end(item, WaitEnd.STALE)
                    continue
                self._take(item)
                self.in_flight += 1
                self.ended[WaitEnd.SERVED] += 1
                self._serve(item)
        finally:
            self._serving = False

    def _sweep(self, now_ns: int) -> None:
        """Refuse whatever has passed its deadline; deadlines need not follow ages, so all are looked at."""
        for item in [item for item, key in self._keys.items() if key[2] <= now_ns]:
            if item in self._keys:  # a callback may have cancelled it
                self._end(item, WaitEnd.STALE)
        if self._keys:
            self._timers.arm(self._timer, max(min(key[2] for key in self._keys.values()), now_ns + 1))
        else:
            self._timers.cancel(self._timer)

    def _take(self, item: T) -> bool:
        key = self._keys.pop(item, None)
        if key is None:
            return False
        established_ns, sequence, _ = key
        del self._waiting[bisect_left(self._waiting, (established_ns, sequence))]
        return True

    def _end(self, item: T, reason: WaitEnd) -> None:
        self._take(item)
        self.ended[reason] += 1
        self._refuse(item, reason)
