"""One epoll loop: fd to callback, timers, and closing only after the batch."""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Callable
from typing import Protocol

from tidegate.loop.timers import TimerWheel

EPOLLIN = select.EPOLLIN
EPOLLOUT = select.EPOLLOUT
EPOLLRDHUP = select.EPOLLRDHUP
EPOLLHUP = select.EPOLLHUP
EPOLLERR = select.EPOLLERR
EPOLLEXCLUSIVE = select.EPOLLEXCLUSIVE

# Events taken from the kernel at once. Small, so that heartbeat and timers are looked at every few
# milliseconds even when each event is dear.
BATCH = 64
# The longest sleep with nothing armed; a lost wake-up costs no more than this.
MAX_WAIT_NS = 1_000_000_000
# A turn that comes later than it should by this much: the process stood still, and what happened
# meanwhile (the data that moves a deadline) is looked at before the deadlines that passed.
LATE_NS = 100_000_000

_log = logging.getLogger("tidegate.loop")


class Closable(Protocol):
    def close(self) -> None: ...


class Reactor:
    """Dispatches readiness and time to callbacks, one thread, level-triggered.

    After the process stood still (stopped, starved) what is ready goes first, then the timers: nobody is
    timed out for a silence that was ours.

    An fd handed to `close_after_batch` stays open, and its number taken, until every event of the
    current batch is dispatched, so a later event of the batch never reaches a stranger.
    An exception in a callback is logged, its fd is unwatched and `on_failure(callback)` is called, so
    that one broken session does not take the worker with it.
    """

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._epoll = select.epoll()
        self._clock = clock
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._closing: list[Closable] = []
        self._after: list[Callable[[], None]] = []
        self._stopped = False
        self._behind = 0  # batches that may still go before the timers, after the process stood still
        self.now = clock()  # ns, CLOCK_MONOTONIC, of the start of this batch
        self.timers = TimerWheel(self.now)
        self.iterations = 0
        self.busy_ns = 0  # time spent outside epoll_wait
        self.on_failure: Callable[[Callable[[int], None]], None] | None = None
        self.each_batch: Callable[[int], None] | None = None  # the worker's heartbeat

    def add(self, fd: int, interest: int, callback: Callable[[int], None]) -> None:
        """Watch `fd`; raises OSError as epoll_ctl does (EEXIST, ENOSPC)."""
        self._epoll.register(fd, interest)
        self._callbacks[fd] = callback

    def modify(self, fd: int, interest: int) -> None:
        self._epoll.modify(fd, interest)

    def redirect(self, fd: int, callback: Callable[[int], None]) -> None:
        """Hand the events of a watched `fd` to another callback; no syscall."""
        self._callbacks[fd] = callback

    def remove(self, fd: int) -> None:
        """Stop watching; nothing of the current batch reaches its callback any more. Unknown: no-op."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def forget(self, fd: int) -> None:
        """As `remove` without the syscall: for an fd whose last copy is about to be closed."""
        self._callbacks.pop(fd, None)

    def watches(self, fd: int) -> bool:
        return fd in self._callbacks

    def close_after_batch(self, resource: Closable) -> None:
        self._closing.append(resource)

    def call_after_batch(self, function: Callable[[], None]) -> None:
        """Run once when the current batch is done, or, between batches, without waiting for an event."""
        self._after.append(function)

    def stop(self) -> None:
        self._stopped = True

    @property
    def stopped(self) -> bool:
        return self._stopped

    def run(self) -> None:
        """Dispatch until `stop`."""
        while not self._stopped:
            self.run_once()

    def run_once(self, max_wait_ns: int = MAX_WAIT_NS) -> int:
        """Wait for one batch and dispatch it; returns the number of events."""
        if self._after:
            wait_ns = 0
        else:
            due = self.timers.next_due(self._clock())
            wait_ns = max_wait_ns if due is None else min(due, max_wait_ns)
        # select.epoll rounds the seconds up to the next millisecond: never early, so never spinning
        events = self._epoll.poll(wait_ns / 1e9, BATCH)
        started = self._clock()
        if started - self.now > wait_ns + LATE_NS and not self._behind:
            # a full round of all that is watched: a level-triggered epoll tells each once in it
            self._behind = len(self._callbacks) // BATCH + 1
            if not events:  # a stopped epoll_wait ends by its timeout, with nothing
                events = self._epoll.poll(0, BATCH)
        self.now = started
        self.iterations += 1
        if self.each_batch is not None:
            self.each_batch(started)
        callbacks = self._callbacks
        for fd, mask in events:
            callback = callbacks.get(fd)
            if callback is None:
                continue
            try:
                callback(mask)
            except Exception:
                self._failed(fd, callback)
        if self._behind and len(events) == BATCH:
            self._behind -= 1
        else:
            self._behind = 0
            self._run_timers()
        if self._after:
            self._run_after()
        if self._closing:
            closing, self._closing = self._closing, []
            for resource in closing:
                resource.close()
        self.busy_ns += self._clock() - started
        return len(events)

    def close(self) -> None:
        self._callbacks.clear()
        for resource in self._closing:
            resource.close()
        self._closing.clear()
        self._epoll.close()

    def _run_timers(self) -> None:
        try:
            self.timers.advance(self.now)
        except Exception:
            _log.error("timer_callback_failed", exc_info=True)

    def _run_after(self) -> None:
        # what a callback schedules runs in the next round, so that a chain cannot starve the events
        after, self._after = self._after, []
        for function in after:
            try:
                function()
            except Exception:
                _log.error("deferred_call_failed", exc_info=True)

    def _failed(self, fd: int, callback: Callable[[int], None]) -> None:
        _log.error(
            "callback_failed", exc_info=True, extra={"kv": {"fd": fd, "callback": callback.__qualname__}}
        )
        self.remove(fd)
        if self.on_failure is not None:
            self.on_failure(callback)
