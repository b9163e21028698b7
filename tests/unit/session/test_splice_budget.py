"""Shares of the credit: the sum of what may be held never passes the total."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from tidegate.session.splice_budget import LEAST, Budget

MIB = 1 << 20


class Direction:
    def __init__(self, limit: int = 0, held: int = 0) -> None:
        self.limit = limit
        self.held = held

    def set_limit(self, limit: int) -> None:
        self.limit = limit

    def in_flight(self) -> int:
        return self.held


def test_each_may_hold_the_limit_while_there_is_enough() -> None:
    budget = Budget(MIB, 8 * MIB)
    directions = [Direction(MIB) for _ in range(6)]
    assert budget.admit(directions, 2) == MIB
    assert {one.limit for one in directions} == {MIB}


def test_shares_shrink_for_all_when_more_come() -> None:
    budget = Budget(MIB, 8 * MIB)
    directions = [Direction(MIB) for _ in range(14)]
    assert budget.admit(directions, 2) == MIB // 2
    assert {one.limit for one in directions} == {MIB // 2}


def test_nobody_joins_while_others_hold_more_than_would_be_their_share() -> None:
    budget = Budget(MIB, 8 * MIB)
    directions = [Direction(MIB, held=MIB) for _ in range(8)]
    assert budget.admit(directions, 2) == 0
    assert {one.limit for one in directions} == {MIB}  # as before
    for one in directions:
        one.held = 0
    assert budget.admit(directions, 2) == 8 * MIB // 10


def test_who_held_much_and_fell_silent_keeps_nobody_out() -> None:
    class Silent(Direction):
        def in_flight(self) -> int:
            return 0

    budget = Budget(MIB, 8 * MIB)
    assert budget.admit([Silent(MIB, held=MIB) for _ in range(8)], 2) == 8 * MIB // 10


def test_a_share_that_is_too_small_is_none() -> None:
    budget = Budget(MIB, 64 * LEAST)
    assert budget.admit([Direction() for _ in range(62)], 2) == LEAST
    assert budget.admit([Direction() for _ in range(63)], 2) == 0
    assert Budget(1000, MIB).admit([], 2) == 1000  # a limit of that is somebody's wish


def test_who_stays_gets_what_others_leave() -> None:
    budget = Budget(MIB, 4 * MIB)
    directions = [Direction(MIB) for _ in range(6)]
    assert budget.admit(directions, 2) == MIB // 2
    budget.settle(directions[:2])
    assert [one.limit for one in directions] == [MIB] * 2 + [MIB // 2] * 4
    directions[0].held = 4 * MIB
    budget.settle(directions[:3])
    assert directions[2].limit == MIB // 2


def test_a_total_that_is_lowered_holds_at_once_and_after_a_refusal() -> None:
    budget = Budget(MIB, 8 * MIB)
    directions = [Direction(MIB, held=MIB) for _ in range(8)]
    budget.change(MIB, 4 * MIB, directions)  # more is held than that: nobody may add to it
    assert {one.limit for one in directions} == {MIB // 2}
    assert budget.admit(directions, 2) == 0
    assert {one.limit for one in directions} == {MIB // 2}
    for one in directions:
        one.held = 0
    budget.change(MIB, 8 * MIB, directions)
    assert {one.limit for one in directions} == {MIB}


@given(st.integers(0, 1 << 32))
def test_the_sum_never_passes_the_total(seed: int) -> None:
    """Comings, goings and growing in any order: the kernel lets each hold up to its limit of the moment."""
    draw = random.Random(seed)
    budget = Budget(MIB, 6 * MIB)
    directions: list[Direction] = []
    for _ in range(200):
        match draw.randrange(4):
            case 0:
                if share := budget.admit(directions, 2):
                    directions += [Direction(share), Direction(share)]
            case 1 if directions:
                for _ in range(2):
                    directions.pop(draw.randrange(len(directions)))
                budget.settle(directions)
            case _:
                for one in directions:
                    one.held = draw.randint(min(one.held, one.limit), max(one.held, one.limit))
                    if draw.random() < 0.5:
                        one.held = draw.randint(0, one.held)
        assert sum(one.held for one in directions) <= budget.total
