"""How a worker's file descriptors are shared out among listeners."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate import config
from tidegate.config.model import Listener
from tidegate.supervisor.plan import RESERVED_FDS, ListenerGroup, max_connections, session_capacity

TEXT = """
[[listener]]
name = "a"
address = "127.0.0.1:8080"
protocol = "tcp"
cluster = "app"
[cluster.app]
backends = ["127.0.0.1:9000"]
"""
LISTENER = config.parse(TEXT).listeners[0]


def listeners(*limits: int | None, queue: int = 100) -> list[Listener]:
    return [
        replace(LISTENER, name=str(number), max_connections=limit, accept_queue=queue)
        for number, limit in enumerate(limits)
    ]


def test_auto_shares_what_the_queues_leave() -> None:
    assert max_connections(listeners(None, None), 1024 + RESERVED_FDS) == {"0": 206, "1": 206}


def test_a_number_stands_as_long_as_it_fits() -> None:
    assert max_connections(listeners(7, 100_000), 1024) == {"0": 7, "1": session_capacity(1024)}


@pytest.mark.parametrize("nofile", [0, 1, RESERVED_FDS, RESERVED_FDS + 1])
def test_however_few_fds_one_session_is_possible(nofile: int) -> None:
    assert session_capacity(nofile) == 1
    assert set(max_connections(listeners(None, 5), nofile).values()) == {1}


@given(
    st.lists(st.none() | st.integers(1, 10**7), min_size=1, max_size=20),
    st.integers(1, 10**5),
    st.integers(256, 10**6),
)
def test_it_always_fits(limits: list[int | None], queue: int, nofile: int) -> None:
    shares = max_connections(listeners(*limits, queue=queue), nofile)
    most = session_capacity(nofile)
    assert 2 * most + RESERVED_FDS <= nofile
    for limit, share in zip(limits, shares.values(), strict=True):
        assert 1 <= share <= most
        if limit is not None:
            assert share == min(limit, most)
    automatic = [share for limit, share in zip(limits, shares.values(), strict=True) if limit is None]
    assert 2 * sum(automatic) <= max(nofile - RESERVED_FDS, 2 * len(automatic))


def test_a_shared_socket_is_everybodys() -> None:
    class Sock:
        closed = False

        def close(self) -> None:
            self.closed = True

    one, two = Sock(), Sock()
    group = ListenerGroup(LISTENER, 0, [one, two], [4, 5])  # type: ignore[list-item]
    assert (group.sock(0), group.sock(1), group.name) == (one, two, "a")
    assert ListenerGroup(LISTENER, 0, [one], [4, 5], shared=True).sock(1) is one  # type: ignore[list-item,comparison-overlap]
    group.close()
    assert one.closed
    assert two.closed
