"""The stamp and the socket option: true ages, counted once, and nobody else's getsockopt harmed."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.kernel_sockets import (
    V4,
    V6,
    accept,
    connect,
    connect_timed,
    in_netns,
    listen,
    reset,
    wait_arrived,
)
from harness.waiting import wait_until

from tidegate.kernel import bpf, cgroup, queue_age, tcp_info
from tidegate.kernel.half import KernelHalf, socket_cookie
from tidegate.kernel.records import (
    NO_SLOT,
    QUEUE_AGE,
    QUEUE_AGE_SIZE,
    SOL_TIDEGATE,
    StampFlag,
)

pytestmark = pytest.mark.bpf

Marked = tuple[socket.socket, int]


@pytest.fixture(params=[V4, V6])
def marked(half: KernelHalf, request: pytest.FixtureRequest) -> Iterator[Marked]:
    listener = listen(request.param)
    slot = half.allocate_slot()
    half.mark_listener(listener, slot, 128)
    yield listener, slot
    half.unmark_listener(listener)
    listener.close()
    half.reset_slot(slot)


def test_age_lies_between_the_client_s_clock_readings(half: KernelHalf, marked: Marked) -> None:
    listener, slot = marked
    client, before, after = connect_timed(half, listener, slot)
    time.sleep(0.03)
    with client, accept(listener) as server:
        first = time.monotonic_ns()
        age = queue_age.read_bpf(server)
        last = time.monotonic_ns()
        cookie = socket_cookie(server)
    assert before <= age.established_ns <= after
    assert first - age.established_ns <= age.age_ns <= last - age.established_ns
    assert (age.source, age.slot, age.flags, age.cookie) == (queue_age.BPF, slot, 0, cookie)


def test_age_of_a_syn_cookie_child(half: KernelHalf) -> None:
    def measure() -> tuple[bool, int]:
        results = 0
        for host in (V4, V6):
            listener = listen(host)
            slot = half.allocate_slot()
            half.mark_listener(listener, slot, 128)
            client, before, after = connect_timed(half, listener, slot)
            server = accept(listener)
            age = queue_age.read_bpf(server)
            assert before <= age.established_ns <= after, (host, before, age, after)
            assert age.source == queue_age.BPF and age.slot == slot
            assert half.slots.arrived(slot) == half.slots.taken(slot) == 1
            for sock in (client, server, listener):
                sock.close()
            half.reset_slot(slot)
            results += 1
        names, values = (
            line.split()[1:]
            for line in Path("/proc/self/net/netstat").read_text().splitlines()
            if line.startswith("TcpExt:")
        )
        received = int(dict(zip(names, values, strict=True))["SyncookiesRecv"])
        return results == 2, received

    assert in_netns(measure, {"net.ipv4.tcp_syncookies": "2"}) == (True, 2)


def test_taken_once(half: KernelHalf, marked: Marked) -> None:
    listener, slot = marked
    with connect(listener):
        wait_arrived(half, [slot], 1)
        assert half.slots.waiting(slot) == 1
        with accept(listener) as server:
            assert half.slots.waiting(slot) == 1, "accept() alone is not seen"
            ages = [queue_age.read_bpf(server) for _ in range(3)]
    assert [age.taken for age in ages] == [False, True, True]
    assert len({(age.established_ns, age.cookie) for age in ages}) == 1
    assert [age.age_ns for age in ages] == sorted(age.age_ns for age in ages)
    counts = half.slots.read(slot)
    assert (counts.arrived, counts.taken, counts.waiting) == (1, 1, 0)
    assert half.age_histogram(slot).count == 1


def test_histogram(half: KernelHalf, marked: Marked) -> None:
    listener, slot = marked
    expected = []
    for pause_s in (0.0, 0.0, 0.02, 0.05):
        with connect(listener):
            time.sleep(pause_s)
            with accept(listener) as server:
                expected.append(queue_age.read_bpf(server).age_ns)
    histogram = half.age_histogram(slot)
    buckets = [0] * 40
    for age in expected:
        buckets[age.bit_length() - 1] += 1
    assert histogram == (4, sum(expected), max(expected), tuple(buckets))


def test_a_listener_answers_without_counting(half: KernelHalf, marked: Marked) -> None:
    listener, slot = marked
    age = queue_age.read_bpf(listener)
    assert (age.flags, age.slot, age.age_ns, age.established_ns) == (StampFlag.LISTENER, slot, 0, 0)
    with connect(listener):
        wait_arrived(half, [slot], 1)
        queue_age.read_bpf(listener)
        assert half.slots.waiting(slot) == 1
        accept(listener).close()
    assert half.age_histogram(slot).count == 0


def test_fin_and_reset_while_waiting(half: KernelHalf, marked: Marked) -> None:
    listener, slot = marked
    stays, half_closes, leaves, resets = (connect(listener) for _ in range(4))
    half_closes.sendall(b"request")
    half_closes.shutdown(socket.SHUT_WR)
    leaves.close()
    reset(resets)
    wait_until(lambda: half.slots.read(slot).gone == 1, 2, "the reset")
    wait_until(lambda: half.slots.read(slot).half_closed == 2, 2, "both FINs")
    assert half.slots.waiting(slot) == tcp_info.accept_backlog(listener)[0] == 4, "the dead still wait"
    servers = [accept(listener) for _ in range(4)]
    ages = [queue_age.read_bpf(server) for server in servers]
    assert [(age.half_closed, age.gone) for age in ages] == [
        (False, False),
        (True, False),
        (True, False),
        (False, True),
    ]
    left = [queue_age.client_left(server, age) for server, age in zip(servers, ages, strict=True)]
    assert left == [False, False, True, True]
    assert servers[1].recv(100) == b"request", "asking took nothing away"
    for sock in (*servers, stays, half_closes):
        sock.close()
    assert half.slots.read(slot)[8:10] == (2, 1), "ends after the reading are not counted"


def test_other_options_are_as_without_us(half: KernelHalf, marked: Marked) -> None:
    listener, _ = marked
    with connect(listener) as client, accept(listener) as server:
        server.settimeout(1)
        assert server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        assert server.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 0
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        assert server.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
        info = server.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512)
        assert len(info) >= 200 and info[tcp_info.TCPI_STATE] == 1
        with pytest.raises(OSError) as unknown:
            server.getsockopt(SOL_TIDEGATE, QUEUE_AGE + 1, QUEUE_AGE_SIZE)
        assert unknown.value.errno in (errno.EOPNOTSUPP, errno.ENOPROTOOPT)
        with pytest.raises(OSError) as short:
            server.getsockopt(SOL_TIDEGATE, QUEUE_AGE, QUEUE_AGE_SIZE - 1)
        assert short.value.errno in (errno.EOPNOTSUPP, errno.ENOPROTOOPT)
        # the client's end of it is in our cgroup too, but came from no marked listener
        assert queue_age.read_bpf(client).source == queue_age.TCP_INFO


def test_an_unmarked_listener_is_left_alone(half: KernelHalf) -> None:
    before = [half.slots.read(slot) for slot in range(8)]
    with listen() as listener, connect(listener), accept(listener) as server:
        age = queue_age.read_bpf(server)
    assert (age.source, age.slot) == (queue_age.TCP_INFO, NO_SLOT)
    assert [half.slots.read(slot) for slot in range(8)] == before


def test_a_listener_of_another_cgroup_is_answered_by_tcp_info(half: KernelHalf) -> None:
    cgroup.move(0, half.cgroup.origin)
    try:
        listener = listen()
    finally:
        half.cgroup.join()
    slot = half.allocate_slot()
    half.mark_listener(listener, slot, 128)
    with listener, connect(listener), accept(listener) as server:
        assert queue_age.read_bpf(server).source == queue_age.TCP_INFO
        assert half.slots.arrived(slot) == 0
    half.reset_slot(slot)


def test_map_ids_are_the_kernel_s(half: KernelHalf) -> None:
    ids = half.map_ids()
    assert {"stamps", "slots", "ages"} <= set(ids)
    for name, number in half.map_fds.items():
        found = bpf.map_info(number)
        assert found.id == ids[name.name.lower()]
        assert found.name == f"tg_{name.name.lower()}"
