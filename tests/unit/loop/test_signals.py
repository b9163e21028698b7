"""Signals through the loop."""

from __future__ import annotations

import os
import signal

from tidegate.loop.reactor import Reactor
from tidegate.loop.signals import Signals


def test_a_handler_that_fails_leaves_the_others_and_later_signals_heard() -> None:
    heard = []

    def fails() -> None:
        heard.append("failing")
        raise RuntimeError("a reload went wrong")

    reactor = Reactor()
    signals = Signals(reactor, {signal.SIGUSR1: fails, signal.SIGUSR2: lambda: heard.append("other")})
    try:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR2)
            reactor.run_once(0)
        assert heard == ["failing", "other"] * 2
    finally:
        signals.close()
        reactor.close()
