"""Signals as events of the loop."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Mapping
from types import FrameType

from tidegate.loop.reactor import EPOLLIN, Reactor

_log = logging.getLogger("tidegate.loop")


class Signals:
    """Runs a callback from the loop, never inside other code, for each signal that arrived.

    Several arrivals of one signal between two batches may be told as one, as the kernel does.
    """

    def __init__(self, reactor: Reactor, handlers: Mapping[int, Callable[[], None]]) -> None:
        self._handlers = dict(handlers)
        self._reactor = reactor
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._previous_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in self._handlers:
            signal.signal(number, _ignore_here)
        reactor.add(self._read, EPOLLIN, self._on_readable)

    def close(self) -> None:
        """Give the signals their default action back."""
        signal.set_wakeup_fd(self._previous_fd)
        for number in self._handlers:
            signal.signal(number, signal.SIG_DFL)
        self._reactor.remove(self._read)
        os.close(self._read)
        os.close(self._write)

    def _on_readable(self, mask: int) -> None:
        try:
            numbers = os.read(self._read, 512)
        except BlockingIOError:
            return
        for number in numbers:
            handler = self._handlers.get(number)
            if handler is None:
                continue
            try:
                handler()
            except Exception:
                # to the reactor it would be this fd that failed: a process deaf to SIGTERM from then on
                _log.error("signal_handler_failed", exc_info=True, extra={"kv": {"signal": number}})


def _ignore_here(number: int, frame: FrameType | None) -> None:
    """The wake-up fd carries the number; the interpreter only needs something to call."""
