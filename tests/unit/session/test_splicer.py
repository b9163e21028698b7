"""What the spliced sessions of a worker share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, cast

import pytest

from tidegate.kernel.splicing import KernelFlow, Splicing
from tidegate.loop.reactor import Reactor
from tidegate.session.splicer import FULL_NS, Mover, Splicer

MIB = 1 << 20


class Bell:
    def __init__(self, fd: int) -> None:
        self.fileno = lambda: fd


class Kernel:
    def __init__(self, fd: int) -> None:
        self.bell = Bell(fd)


class Flow:
    """One that holds all that it may; how often it was asked is the price of a look."""

    asked = 0

    def __init__(self, index: int) -> None:
        self.index = index

    @property
    def held(self) -> int:
        Flow.asked += 1
        return MIB

    def in_flight(self) -> int:
        return MIB

    def set_limit(self, limit: int) -> None:
        pass


@pytest.fixture
def splicer() -> Iterator[Splicer]:
    fd, reactor = os.eventfd(0), Reactor()
    made = Splicer(cast("Splicing", Kernel(fd)), reactor, MIB, 4 * MIB)
    yield made
    reactor.close()
    os.close(fd)


def test_without_credit_for_newcomers_nobody_is_asked_for_a_while(splicer: Splicer) -> None:
    flows: list[Any] = [Flow(number) for number in range(4)]
    splicer.begin(cast("list[KernelFlow]", flows), cast("Mover", None))
    assert splicer.share(1) == 0
    asked = Flow.asked
    assert asked > 0
    assert splicer.share(1) == 0
    assert Flow.asked == asked
    splicer.stop(cast("list[KernelFlow]", flows[:2]))
    assert splicer.share(1) == 0
    splicer._reactor.now += FULL_NS
    assert splicer.share(1) == MIB
