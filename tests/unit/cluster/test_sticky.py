from __future__ import annotations

import re
from random import Random

import pytest
from unit.cluster.building import Clock, cluster

from tidegate.cluster.balance import ClusterState
from tidegate.cluster.sticky import Sticky, sticky_id


def made(*weights: int) -> tuple[ClusterState, Sticky, Clock]:
    clock = Clock()
    state = ClusterState(cluster(*weights), Random(1), clock)
    return state, Sticky(state), clock


def test_a_cookie_leads_back_to_its_backend() -> None:
    state, sticky, clock = made(1, 1, 1)
    for backend in state.backends:
        value = sticky.value(backend)
        assert {sticky.pick(value, clock())[0] for _ in range(10)} == {backend}
        assert sticky.pick(value, clock())[1] is False


def test_ids_are_opaque_distinct_and_always_the_same() -> None:
    state, sticky, _ = made(1, 1, 1)
    values = [sticky.value(backend) for backend in state.backends]
    assert len(set(values)) == 3
    assert all(re.fullmatch(b"[0-9a-f]{16}", value) for value in values)
    assert values == [sticky_id("app", backend.name) for backend in state.backends]
    # Clients hold these across restarts and upgrades.
    assert sticky_id("app", "127.0.0.1:9000") == b"7fd78164fd534859"
    assert sticky_id("app", "127.0.0.1:9000", b"secret") != sticky_id("app", "127.0.0.1:9000")
    assert sticky_id("other", "127.0.0.1:9000") != sticky_id("app", "127.0.0.1:9000")


@pytest.mark.parametrize("value", [None, b"", b"0" * 16, b"127.0.0.1:9000", b"\xe9"])
def test_without_a_known_id_balancing_decides_and_a_cookie_is_sent(value: bytes | None) -> None:
    state, sticky, clock = made(1, 1)
    picks = [sticky.pick(value, clock()) for _ in range(10)]
    assert {backend for backend, _ in picks} == set(state.backends)
    assert all(fresh for _, fresh in picks)


def test_a_backend_that_cannot_be_picked_is_replaced() -> None:
    state, sticky, clock = made(1, 1)
    first, second = state.backends
    value = sticky.value(first)
    state.set_health(first, False)
    assert sticky.pick(value, clock()) == (second, True)
    state.set_health(second, False)  # fail-open: now it may be picked again
    assert sticky.pick(value, clock()) == (first, False)
    state.set_health(first, True)
    assert sticky.pick(value, clock(), exclude=[first]) == (None, False)
    state.set_health(second, True)
    assert sticky.pick(value, clock(), exclude=[first]) == (second, True)


def test_a_removed_backend_loses_its_clients_and_a_kept_one_keeps_them() -> None:
    state, sticky, clock = made(1, 1)
    first, second = state.backends
    values = [sticky.value(first), sticky.value(second)]
    state.acquired(second)
    state.reconfigure(cluster(1))
    assert sticky.pick(values[0], clock()) == (first, False)
    assert sticky.pick(values[1], clock()) == (first, True)
    assert sticky.value(second) == values[1]
    assert sticky.pick(None, clock(), exclude=[first]) == (None, False)


def test_a_backend_that_was_added_has_a_cookie_too() -> None:
    state, sticky, clock = made(1)
    state.reconfigure(cluster(1, 1, 1))
    for backend in state.backends:
        assert {sticky.pick(sticky.value(backend), clock()) for _ in range(9)} == {(backend, False)}
