"""Waiting with a deadline, instead of sleeping and hoping."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

SCALE = float(os.environ.get("TIDEGATE_TIME_SCALE", "1"))
"""How many times longer everything may take: set where the suite runs under emulation."""


class DeadlineError(AssertionError):
    """What was waited for did not come in time."""


def wait_until(probe: Callable[[], T | None], timeout_s: float, what: str, every_s: float = 0.01) -> T:
    """The first true value of `probe`, which is called every `every_s` seconds for `timeout_s` (times SCALE).

    Raises:
        DeadlineError: it stayed false; the message says what was waited for and the last value.
    """
    timeout_s *= SCALE
    deadline = time.monotonic() + timeout_s
    while True:
        value = probe()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise DeadlineError(f"waited {timeout_s:g} s for {what}; last seen: {value!r}")
        time.sleep(every_s)
