from __future__ import annotations

import re
from http.cookies import SimpleCookie
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.cluster.building import Clock, cluster

from tidegate.cluster.balance import ClusterState
from tidegate.cluster.sticky import Sticky, set_cookie, sticky_id, take_cookie


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
    assert all(re.fullmatch("[0-9a-f]{16}", value) for value in values)
    assert values == [sticky_id("app", backend.name) for backend in state.backends]
    # Clients hold these across restarts and upgrades.
    assert sticky_id("app", "127.0.0.1:9000") == "7fd78164fd534859"
    assert sticky_id("app", "127.0.0.1:9000", b"secret") != sticky_id("app", "127.0.0.1:9000")
    assert sticky_id("other", "127.0.0.1:9000") != sticky_id("app", "127.0.0.1:9000")


@pytest.mark.parametrize("value", [None, "", "0" * 16, "127.0.0.1:9000", "é"])
def test_without_a_known_id_balancing_decides_and_a_cookie_is_sent(value: str | None) -> None:
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


@pytest.mark.parametrize(
    ("header", "value", "rest"),
    [
        (b"TIDEGATE=abc", "abc", b""),
        (b"a=1; TIDEGATE=abc; b=2", "abc", b"a=1; b=2"),
        (b'TIDEGATE="abc";b=2', "abc", b"b=2"),
        (b"TIDEGATE=first; x=y; TIDEGATE=second", "first", b"x=y"),
        (b"XTIDEGATE=1; TIDEGATEX=2", None, b"XTIDEGATE=1; TIDEGATEX=2"),
        (b"TIDEGATE", None, b"TIDEGATE"),
        (b"note=TIDEGATE=abc", None, b"note=TIDEGATE=abc"),
        (b"a=1;;  b=2 ; TIDEGATE=", "", b"a=1; b=2"),
        (b"", None, b""),
    ],
)
def test_taking_the_cookie_out(header: bytes, value: str | None, rest: bytes) -> None:
    assert take_cookie(header, b"TIDEGATE") == (value, rest)


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "TIDEGATE"]), st.from_regex(r"[a-z0-9=]{0,4}", fullmatch=True)),
        max_size=6,
    )
)
def test_other_cookies_come_through_unchanged(pairs: list[tuple[str, str]]) -> None:
    header = "; ".join(f"{key}={value}" for key, value in pairs).encode()
    value, rest = take_cookie(header, b"TIDEGATE")
    ours = [value for key, value in pairs if key == "TIDEGATE"]
    assert value == (ours[0] if ours else None)
    assert rest == "; ".join(f"{key}={value}" for key, value in pairs if key != "TIDEGATE").encode()


def test_set_cookie_is_read_by_others_as_meant() -> None:
    cookie: SimpleCookie = SimpleCookie(set_cookie("TIDEGATE", "abc", secure=True).decode())
    morsel = cookie["TIDEGATE"]
    assert (morsel.value, morsel["path"], morsel["samesite"]) == ("abc", "/", "Lax")
    assert morsel["secure"] and morsel["httponly"]
    assert b"Secure" not in set_cookie("TIDEGATE", "abc", secure=False)
