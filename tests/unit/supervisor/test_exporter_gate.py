"""Two segments read as one while counters move from one to the other: no sum ever drops or doubles."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tidegate.metrics.names import LISTENER, Scope
from tidegate.metrics.recovery import carry_over
from tidegate.metrics.segment import RowKey, Segment
from tidegate.metrics.totals import totals
from tidegate.supervisor.exporter import Gate

ACCEPTED = LISTENER.index("accepted_total")
KEY = RowKey(Scope.LISTENER, 0, ("web",))


@pytest.fixture
def segments() -> Iterator[tuple[Segment, Segment]]:
    both = Segment.create(200_000), Segment.create(200_000)
    for segment, count in zip(both, (5, 7), strict=True):
        segment.row(KEY).words[ACCEPTED] = count
    yield both
    for segment in both:
        segment.close()


def accepted(gate: Gate, ours: Segment, predecessor: Segment | None) -> int:
    return sum(total.value("accepted_total") for total in totals(gate.read(ours, predecessor)))


def test_before_and_after(segments: tuple[Segment, Segment]) -> None:
    ours, old = segments
    gate = Gate()
    assert accepted(gate, ours, old) == 12
    with gate.moving():
        carry_over(ours, old.snapshot())
    assert accepted(gate, ours, old) == 12, "the old one counts no more itself"
    assert accepted(gate, ours, None) == 12


def test_a_reader_in_another_process_never_sees_a_step_of_the_move(segments: tuple[Segment, Segment]) -> None:
    ours, old = segments
    gate = Gate()
    for number in range(200):  # so that moving takes a while
        ours.row(RowKey(Scope.LISTENER, 0, (f"l{number}",)))
        old.row(RowKey(Scope.LISTENER, 0, (f"l{number}",))).words[ACCEPTED] = 1
    ready, begin = os.pipe()
    reader = os.fork()
    if not reader:
        code = 1
        try:
            os.write(begin, b"x")
            sums = {accepted(gate, ours, old) for _ in range(60)}
            code = 0 if sums == {212} else 2
        finally:
            os._exit(code)
    os.read(ready, 1)
    with gate.moving():
        carry_over(ours, old.snapshot())
    _, status = os.waitpid(reader, 0)
    os.close(ready)
    os.close(begin)
    assert os.waitstatus_to_exitcode(status) == 0
    assert accepted(gate, ours, old) == 212
