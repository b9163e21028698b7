"""The slab against a dict that never forgets a token."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tidegate.loop.slab import INDEX_MASK, Slab, SlabFull

CAPACITY = 5


class SlabMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.slab: Slab[object] = Slab(CAPACITY)
        self.alive: dict[int, object] = {}
        self.stale: set[int] = set()
        self.freed: list[int] = []  # places, in the order they were freed

    @rule()
    def insert(self) -> None:
        obj = object()
        if len(self.alive) == CAPACITY:
            with pytest.raises(SlabFull):
                self.slab.insert(obj)
            return
        token = self.slab.insert(obj)
        assert token not in self.alive and token not in self.stale and token > 0
        assert token & INDEX_MASK < CAPACITY
        if self.freed:
            assert token & INDEX_MASK == self.freed.pop()
        self.alive[token] = obj

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        if self.alive:
            token = data.draw(st.sampled_from(sorted(self.alive)))
            assert self.slab.remove(token) is self.alive.pop(token)
            self.stale.add(token)
            self.freed.append(token & INDEX_MASK)

    @rule(data=st.data())
    def stale_tokens_lead_nowhere(self, data: st.DataObject) -> None:
        if self.stale:
            token = data.draw(st.sampled_from(sorted(self.stale)))
            assert self.slab.remove(token) is None

    @rule(token=st.integers(-(2**40), 2**70))
    def foreign_tokens_lead_nowhere(self, token: int) -> None:
        if token not in self.alive:
            assert self.slab.get(token) is None
            assert self.slab.remove(token) is None

    @rule(data=st.data())
    def iterate_while_removing(self, data: st.DataObject) -> None:
        doomed = data.draw(st.sets(st.sampled_from(sorted(self.alive)))) if self.alive else set()
        before = dict(self.alive)
        seen: list[int] = []
        for token, obj in self.slab:
            assert self.alive[token] is obj  # never one that was removed before its turn
            seen.append(token)
            for victim in sorted(doomed):
                doomed.discard(victim)
                assert self.slab.remove(victim) is self.alive.pop(victim)
                self.stale.add(victim)
                self.freed.append(victim & INDEX_MASK)
        assert len(seen) == len(set(seen))
        assert set(self.alive) <= set(seen) <= set(before)

    @rule()
    def replace_all_while_iterating(self) -> None:
        """Each object's handler ends it and a new one takes its place at once."""
        seen = set()
        for token, _ in self.slab:
            assert token not in seen
            seen.add(token)
            assert self.slab.remove(token) is self.alive.pop(token)
            self.stale.add(token)
            obj = object()
            self.alive[self.slab.insert(obj)] = obj

    @invariant()
    def agrees_with_the_model(self) -> None:
        assert len(self.slab) == len(self.alive)
        assert self.slab.full == (len(self.alive) == CAPACITY)
        assert dict(self.slab) == self.alive
        for token, obj in self.alive.items():
            assert self.slab.get(token) is obj
        for token in self.stale:
            assert self.slab.get(token) is None


TestSlab = SlabMachine.TestCase
TestSlab.settings = settings(max_examples=500, stateful_step_count=30, deadline=None)


def test_the_token_of_a_free_place_does_not_resolve_before_it_is_given_out() -> None:
    slab: Slab[str] = Slab(1)
    first = slab.insert("a")
    slab.remove(first)
    second = first + (1 << 32)
    assert slab.get(second) is None
    assert slab.remove(second) is None
    assert slab.insert("b") == second


def test_generations_wrap_within_64_bits_and_never_to_token_zero() -> None:
    slab: Slab[str] = Slab(2)
    slab.insert("other")
    token = slab.insert("a")
    slab._tokens[1] = last = ((1 << 32) - 1) << 32 | 1  # as after 2^32 - 2 uses of the place
    assert slab.get(token) is None
    assert slab.remove(last) == "a"
    wrapped = slab.insert("b")
    assert wrapped == 1 << 32 | 1
    assert last < 1 << 64
    assert slab.get(last) is None


@pytest.mark.parametrize("capacity", [0, -1, 1 << 32])
def test_impossible_capacities_are_refused(capacity: int) -> None:
    with pytest.raises(ValueError, match="capacity"):
        Slab(capacity)


def test_memory_follows_use_not_capacity() -> None:
    slab: Slab[int] = Slab(1 << 30)
    for number in range(1000):
        slab.remove(slab.insert(number))
    assert len(slab._objects) == 1


def test_an_empty_slab_is_true() -> None:
    assert Slab(1)
