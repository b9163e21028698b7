"""Which queue a connection waits in, and what is said of each."""

from __future__ import annotations

import ctypes
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.kernel.records import Stamp, StampFlag
from tidegate.kernel.sock_diag import HalfOpenSocket, ListenSocket, QueuedSocket
from tidegate_tools.queues import QueueTable, Source, address_text, collect, settle, waiter

V4, V6 = socket.AF_INET, socket.AF_INET6


def listener(
    host: str = "127.0.0.1", port: int = 80, *, waiting: int = 0, cookie: int = 1, ifindex: int = 0,
    v6only: bool = False, drops: int = 0,
) -> ListenSocket:  # fmt: skip
    family = V6 if ":" in host else V4
    return ListenSocket(family, host, port, ifindex, waiting, 128, 0, 500 + cookie, cookie, 1, v6only, drops)


def queued(
    host: str = "127.0.0.1", port: int = 80, *, family: int = V4, ifindex: int = 0, age_ms: int = 5,
    half_closed: bool = False, received: int = 0, storages: dict[int, bytes] | None = None,
) -> QueuedSocket:  # fmt: skip
    return QueuedSocket(
        family=family, host=host, port=port, peer_host="10.0.0.1", peer_port=4000, ifindex=ifindex,
        half_closed=half_closed, received=received, cookie=7, seen_ns=1_000_000_000,
        info_age_ns=age_ms * 1_000_000, storages=storages or {},
    )  # fmt: skip


def stamp(established_ns: int, flags: int = 0) -> bytes:
    return bytes(Stamp(established_ns=established_ns, cookie=7, flags=flags, slot=0))


@pytest.mark.parametrize(
    ("family", "host", "ifindex", "expected"),
    [
        (V4, "127.0.0.1", 0, "127.0.0.1:80"),
        (V4, "127.0.0.2", 0, "0.0.0.0:80"),
        (V4, "127.0.0.2", 3, "0.0.0.0:80 on 3"),
        (V6, "::1", 0, "[::1]:80"),
        (V6, "::2", 0, "[::]:80"),
        (V6, "::ffff:127.0.0.9", 0, "[::]:80"),
    ],
)
def test_the_most_exact_listener_has_it(family: int, host: str, ifindex: int, expected: str) -> None:
    table = QueueTable(
        [
            listener("0.0.0.0", cookie=1),
            listener("127.0.0.1", cookie=2),
            listener("0.0.0.0", cookie=3, ifindex=3),
            listener("::", cookie=4),
            listener("::1", cookie=5),
            listener("::1", port=81, cookie=6),
        ]
    )
    queue = table.find(family, host, 80, ifindex)
    assert queue is not None
    assert queue.address + (f" on {queue.ifindex}" if queue.ifindex else "") == expected


def test_v6only_wildcard_does_not_cover_ipv4() -> None:
    both, only = QueueTable([listener("::")]), QueueTable([listener("::", v6only=True)])
    assert both.find(V6, "::ffff:127.0.0.1", 80, 0) is not None
    assert only.find(V6, "::ffff:127.0.0.1", 80, 0) is None
    assert only.find(V6, "::1", 80, 0) is not None


def test_a_connection_without_listener_is_left_out() -> None:
    assert QueueTable([listener(port=81)]).find(V4, "127.0.0.1", 80, 0) is None
    assert QueueTable([listener("127.0.0.1")]).find(V4, "127.0.0.2", 80, 0) is None


def test_reuseport_group_is_one_queue() -> None:
    group = [listener(cookie=1, waiting=2, drops=1), listener(cookie=2, waiting=1, drops=4)]
    table = QueueTable(group)
    collect(table, [queued(), queued(), queued()], [HalfOpenSocket(V4, "127.0.0.1", 80, 0)], group, {})
    (queue,) = table.queues()
    assert (queue.waiting, queue.backlog, queue.half_open, queue.dead, queue.drops) == (3, 256, 1, 0, 5)


def test_gone_are_the_reset_and_those_that_left_without_a_byte() -> None:
    one = [listener(waiting=5)]
    table = QueueTable(one)
    entries = [queued(), queued(half_closed=True), queued(half_closed=True, received=10)]
    collect(table, entries, [], one, {})
    (queue,) = table.queues()
    assert (queue.dead, queue.left, queue.gone, queue.waiting) == (2, 1, 3, 5)
    assert [one.state for one in queue.waiters] == ["open", "left", "half-closed"]


@settings(deadline=None)
@given(before=st.integers(0, 20), after=st.integers(0, 20), listed=st.integers(0, 20))
def test_churn_makes_no_dead(before: int, after: int, listed: int) -> None:
    table = QueueTable([listener(waiting=before)])
    collect(table, [queued()] * listed, [], [listener(waiting=after)], {})
    (queue,) = table.queues()
    assert queue.dead == max(0, min(before, after) - listed)


def test_a_second_look_settles_the_dead() -> None:
    first, second = QueueTable([listener(waiting=5)]), QueueTable([listener(waiting=2)])
    collect(first, [], [], [listener(waiting=5)], {})
    collect(second, [], [], [listener(waiting=2)], {})
    settle(first.queues(), second.queues())
    assert first.queues()[0].dead == 2


def test_stamp_beats_attached_beats_tcp_info() -> None:
    maps = {3: Source.ATTACHED, 9: Source.STAMP}
    ours, traced = stamp(400_000_000), stamp(700_000_000)
    for storages, age_ns, source in [
        ({}, 5_000_000, Source.TCP_INFO),
        ({5: ours}, 5_000_000, Source.TCP_INFO),  # somebody else's map
        ({3: traced}, 300_000_000, Source.ATTACHED),
        ({3: traced, 9: ours}, 600_000_000, Source.STAMP),
        ({9: ours, 3: traced}, 600_000_000, Source.STAMP),
        ({9: stamp(0)}, 5_000_000, Source.TCP_INFO),
        ({9: stamp(4, StampFlag.LISTENER)}, 5_000_000, Source.TCP_INFO),
        ({9: b"short"}, 5_000_000, Source.TCP_INFO),
    ]:
        got = waiter(queued(storages=storages), maps)
        assert (got.age_ns, got.source) == (age_ns, source)


def test_source_of_a_queue_is_its_least_exact() -> None:
    table = QueueTable([listener()])
    entries = [queued(storages={9: stamp(400_000_000)}), queued()]
    collect(table, entries, [], [], {9: Source.STAMP})
    (queue,) = table.queues()
    assert queue.source is Source.TCP_INFO
    assert queue.oldest_ns == 600_000_000
    assert queue.percentile_ns(0.5) == 5_000_000


@pytest.mark.parametrize(
    ("host", "text"),
    [
        ("127.0.0.1", "127.0.0.1:80"),
        ("::1", "[::1]:80"),
        ("::ffff:1.2.3.4", "1.2.3.4:80"),
        ("::", "[::]:80"),
    ],
)
def test_address_text(host: str, text: str) -> None:
    assert address_text(host, 80) == text


def test_stamp_is_as_long_as_assumed() -> None:
    assert ctypes.sizeof(Stamp) == 24
