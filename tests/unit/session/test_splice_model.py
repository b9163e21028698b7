"""The credit protocol against a model of the kernel, over interleavings nobody would think of.

And the other way round: seeded faults of each kind are found by it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from harness.splice_model import LARGEST, Broken, Port, Skb, World
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.session.splice import Direction, Wait

EVENT = st.integers(0, 16 * LARGEST - 1)
SESSION = st.tuples(
    st.lists(EVENT, max_size=400),
    st.integers(0, 1500),  # bytes up
    st.integers(0, 1500),  # and down
    st.sampled_from([30, 100, 400]),  # credit
    st.tuples(st.sampled_from([0, 1, 200]), st.sampled_from([0, 1, 200])),  # bytes copied first
    st.sampled_from([1, 37, 64]),  # of the worker's buffer
)
Session = tuple[list[int], int, int, int, tuple[int, int], int]


@given(SESSION)
@settings(max_examples=1500, deadline=None)
def test_order_no_loss_bounded_and_to_the_end(session: Session) -> None:
    World(*session).run()


@pytest.mark.soak
@pytest.mark.timeout(1800)
@given(SESSION)
@settings(max_examples=10_000, deadline=None)
def test_the_same_at_length(session: Session) -> None:
    World(*session).run()


# -- faults that it must find ----------------------------------------------------------------------


class CopiesBeforeTheBacklogIsEmpty(Direction):
    __slots__ = ()

    def _drained(self) -> bool:
        return True


class EndsAtTheFirstEof(Direction):
    __slots__ = ()

    def _at_eof(self) -> Wait:
        self.eof = self.ended = True
        return Wait.END


class EndsBeforeTheBacklogIsEmpty(Direction):
    __slots__ = ()

    def _at_eof(self) -> Wait:
        self.eof = True
        if not self._port.ended(self.moved):
            return Wait.TICK
        self.ended = True
        return Wait.END


class ForgetsWhatItPublished(Port):
    def consume(self, total: int) -> None:
        super().consume(total - 1 if total > 200 else total)


class OvertakesWhatWasPassed(Port):
    def may_redirect(self, size: int) -> bool:
        return self.held() + size <= self.limit


class LeavesWhatComesTwice(Port):
    def repeated(self, skb: Skb) -> int:
        return 0


class CountsFromTheWrongByte(Port):
    def begin(self, read: int, consumed: int) -> None:
        super().begin(read, consumed)
        self.read_before -= self.read_before > 0 or read > 0


class RingsOnlyOnce(Port):
    def ring(self) -> None:
        self.rung = self.rung or self._passed == 0


class IgnoresTheLimit(Port):
    def may_redirect(self, size: int) -> bool:
        return self._passed == self.published


class MissesAcks(Port):
    def acked(self) -> int:
        return min(self.target.acked, 300)


@dataclass(frozen=True)
class Fault:
    kind: type[Direction] | type[Port]
    shows: str


FAULTS = (
    Fault(CopiesBeforeTheBacklogIsEmpty, "out of order"),
    Fault(OvertakesWhatWasPassed, "out of order"),
    Fault(EndsAtTheFirstEof, "lost"),
    Fault(EndsBeforeTheBacklogIsEmpty, "lost"),
    Fault(LeavesWhatComesTwice, "doubled|stalled"),
    Fault(CountsFromTheWrongByte, "lost|stalled|missing"),
    Fault(RingsOnlyOnce, "stalled"),
    Fault(ForgetsWhatItPublished, "leaked"),
    Fault(MissesAcks, "leaked"),
    Fault(IgnoresTheLimit, "holds"),
)


def drawn(draw: random.Random) -> Session:
    script = [draw.randrange(16 * LARGEST) for _ in range(draw.randrange(400))]
    enter = (draw.choice([0, 1, 200]), draw.choice([0, 1, 200]))
    sizes = draw.randrange(1500), draw.randrange(1500)
    return script, *sizes, draw.choice([30, 100, 400]), enter, draw.choice([1, 37, 64])


def failure(world: type[World], words: str = "", attempts: int = 400) -> str:
    """The first failure that shows in one of these words ("a|b"; "": in any), else ""."""
    draw = random.Random(7)
    for _ in range(attempts):
        try:
            world(*drawn(draw)).run()
        except Broken as found:
            text = str(found) or "lost"
            if any(word in text for word in words.split("|")):
                return text
    return ""


def test_without_a_fault_nothing_fails() -> None:
    assert failure(World) == ""


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.kind.__name__)
def test_a_seeded_fault_is_found(fault: Fault) -> None:
    class Faulty(World):
        pass

    if issubclass(fault.kind, Port):
        Faulty.port_type = fault.kind
    else:
        Faulty.direction_type = fault.kind
    assert failure(Faulty, fault.shows)
