"""A hashed timing wheel: deadlines of tens of thousands of sessions, each kept by an attribute store.

After G. Varghese and T. Lauck, "Hashed and Hierarchical Timing Wheels" (SOSP 1987), scheme 6: a timer hangs
in the slot of its deadline modulo the size of the wheel and is looked at once per round. On top of it,
re-arming is lazy: a deadline moved later is only noticed when the slot of the former one comes round.

All times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import attrgetter

UNFILED = -1
DUE = -2  # taken out of its slot by advance(), which decides about it when its turn comes

SOON = 32  # ticks

_by_deadline = attrgetter("deadline_ns")


def nothing(_now_ns: int) -> None:
    """Where the timer of something that has ended leads."""


class Timer:
    """One deadline and what to call when it has passed.

    `deadline_ns` is 0 when not armed. While armed, storing a later time in it moves the deadline and storing
    0 cancels it: no call is needed, and none is made by the wheel. Earlier times, and timers that are not
    armed, go through `TimerWheel.arm`.

    `callback(now_ns)` may be replaced at any time; a session that ends puts `nothing` there: with its own
    bound method the two would keep each other alive until a collection.
    """

    __slots__ = ("_index", "callback", "deadline_ns")

    def __init__(self, callback: Callable[[int], None]) -> None:
        self.callback = callback
        self.deadline_ns = 0
        self._index = UNFILED

    @property
    def armed(self) -> bool:
        return self.deadline_ns != 0


class TimerWheel:
    """Fires timers within one tick after their deadline, never before it.

    arm and cancel are O(1); advance costs what it fires plus one look per slot in use that went by. Call
    advance() after the events of a batch were handled: what arrived while the process was stopped or busy has
    then moved its deadlines, and only sessions that really were idle are timed out.
    """

    __slots__ = ("_cursor", "_occupied", "_size", "_slots", "tick_ns")

    def __init__(self, now_ns: int, tick_ns: int = 1_000_000, slots: int = 8192) -> None:
        if tick_ns < 1 or slots < 2:
            raise ValueError("a wheel needs a tick of at least 1 ns and two slots")
        self.tick_ns = tick_ns
        self._size = slots
        self._cursor = now_ns // tick_ns  # the last tick that was looked at
        self._slots: list[dict[Timer, None] | None] = [None] * slots
        self._occupied = bytearray(
            slots
        )  # 1 where the slot is not None: find() skips the rest at memchr speed

    def arm(self, timer: Timer, deadline_ns: int) -> None:
        """(Re-)arm: earlier, later, from within callbacks, whatever state the timer is in.

        A deadline that has passed already fires with the next tick. Raises ValueError for one below 1.
        """
        if deadline_ns < 1:
            raise ValueError("a deadline is a positive time; cancel() disarms")
        timer.deadline_ns = deadline_ns
        index = timer._index
        if index == DUE:
            return
        tick = -(-deadline_ns // self.tick_ns)
        if tick <= self._cursor:
            tick = self._cursor + 1
        if index >= 0:
            if self._next_visit(index) <= tick:
                return
            self._unfile(timer)
        self._file(timer, tick)

    def cancel(self, timer: Timer) -> None:
        """Disarm and forget at once; harmless when it is not armed.

        Storing 0 in `deadline_ns` does too, but the wheel then refers to the timer for up to a round.
        """
        timer.deadline_ns = 0
        if timer._index >= 0:
            self._unfile(timer)

    def abandon(self, timer: Timer) -> None:
        """`cancel` for one that is thrown away: if its slot is looked at soon, it is left there until then.

        Most sessions end before their timer's turn, and to leave it costs them nothing.
        """
        timer.deadline_ns = 0
        index = timer._index
        if index >= 0 and (index - self._cursor) % self._size > SOON:
            self._unfile(timer)

    def advance(self, now_ns: int) -> int:
        """Fire everything due at `now_ns`, the earliest deadline first; returns how many fired.

        What a callback arms for a time that has passed waits for the next tick, so this always ends. When a
        callback raises, the timers it kept from firing are due at the next tick. Time that stands still or
        goes back fires nothing; a jump of any length costs one look at each slot in use.
        """
        now_tick = now_ns // self.tick_ns
        if now_tick <= self._cursor:
            return 0
        due: list[Timer] = []
        passed = list(self._passed(now_tick))
        self._cursor = now_tick  # before filing: nothing may land in a slot that was already looked at
        for index in passed:
            self._sift(index, now_ns, due)
        if not due:
            return 0
        if len(due) > 1:
            due.sort(key=_by_deadline)
        return self._fire(due, now_ns)

    def next_due(self, now_ns: int) -> int | None:
        """Nanoseconds until advance() has something to do; None when nothing is armed.

        0 only when advance(now_ns) would fire. Otherwise it may be shorter than the time to the first
        deadline (one that was moved later, one more than a round away): once per slot in use and round.
        """
        now_tick = max(now_ns // self.tick_ns, self._cursor)
        earliest: int | None = None
        if now_tick > self._cursor:
            for index in self._passed(now_tick):
                for timer in self._slots[index] or ():
                    deadline_ns = timer.deadline_ns
                    if deadline_ns and (earliest is None or deadline_ns < earliest):
                        earliest = deadline_ns
            if earliest is not None:
                if earliest <= now_ns:
                    return 0
                earliest = -(-earliest // self.tick_ns)
        start = (now_tick + 1) % self._size
        index = self._occupied.find(1, start)
        if index < 0:
            index = self._occupied.find(1, 0, start)
        if index >= 0:
            visit = now_tick + 1 + (index - start) % self._size
            if earliest is None or visit < earliest:
                earliest = visit
        return None if earliest is None else earliest * self.tick_ns - now_ns

    def __len__(self) -> int:
        """Timers held, those cancelled by storing 0 included; walks the wheel."""
        return sum(len(slot) for slot in self._slots if slot)

    def __bool__(self) -> bool:
        """True even when empty: a wheel is not a value."""
        return True

    def _next_visit(self, index: int) -> int:
        """The tick at which advance() will next look at this slot."""
        following = self._cursor + 1
        return following + (index - following) % self._size

    def _file(self, timer: Timer, tick: int) -> None:
        index = tick % self._size
        timer._index = index
        slot = self._slots[index]
        if slot is None:
            self._slots[index] = {timer: None}
            self._occupied[index] = 1
        else:
            slot[timer] = None

    def _unfile(self, timer: Timer) -> None:
        index = timer._index
        timer._index = UNFILED
        slot = self._slots[index]
        if slot is not None:
            del slot[timer]
            if not slot:
                self._slots[index] = None
                self._occupied[index] = 0

    def _passed(self, now_tick: int) -> Iterator[int]:
        """The slots in use whose tick lies in (cursor, now_tick], each once, in order of time."""
        count = min(now_tick - self._cursor, self._size)
        start = (self._cursor + 1) % self._size
        find = self._occupied.find
        for low, high in ((start, min(start + count, self._size)), (0, start + count - self._size)):
            index = find(1, low, high) if low < high else -1
            while index >= 0:
                yield index
                index = find(1, index + 1, high)

    def _sift(self, index: int, now_ns: int, due: list[Timer]) -> None:
        """Empty one slot: what is due goes to `due`, the rest (back) to where its deadline belongs."""
        slot = self._slots[index]
        if slot is None:
            return
        self._slots[index] = None
        self._occupied[index] = 0
        for timer in slot:
            deadline_ns = timer.deadline_ns
            if deadline_ns == 0:
                timer._index = UNFILED
            elif deadline_ns <= now_ns:
                timer._index = DUE
                due.append(timer)
            else:
                self._file(timer, -(-deadline_ns // self.tick_ns))

    def _fire(self, due: list[Timer], now_ns: int) -> int:
        """Call what is still due when its turn comes: callbacks before it may have cancelled or moved it."""
        fired = 0
        turn = 0
        try:
            for turn, timer in enumerate(due, 1):  # noqa: B007 - the rest is counted from it after an exception
                timer._index = UNFILED
                deadline_ns = timer.deadline_ns
                if deadline_ns == 0:
                    continue
                if deadline_ns > now_ns:
                    self._file(timer, -(-deadline_ns // self.tick_ns))
                    continue
                timer.deadline_ns = 0
                fired += 1
                timer.callback(now_ns)
        finally:
            for timer in due[turn:]:
                timer._index = UNFILED
                if timer.deadline_ns:
                    self._file(timer, max(-(-timer.deadline_ns // self.tick_ns), self._cursor + 1))
        return fired
