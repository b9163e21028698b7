"""The estimate by TCP_INFO, who counts as gone, and the choice of the source: no root needed."""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from tidegate.config.model import QueueAgeSource
from tidegate.errors import OperatorError
from tidegate.kernel import queue_age, tcp_info
from tidegate.kernel.queue_age import GONE, HALF_CLOSED, QueueAge
from tidegate.kernel.records import NO_SLOT

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture(params=["127.0.0.1", "::1"])
def listener(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    with socket.create_server((request.param, 0), family=family) as sock:
        yield sock


@pytest.fixture
def pair(listener: socket.socket) -> Iterator[Pair]:
    with socket.create_connection(listener.getsockname()[:2]) as client:
        server, _ = listener.accept()
        with server:
            yield client, server


def _readable(sock: socket.socket) -> None:
    assert select.select([sock], [], [], 5)[0]


def test_the_estimate_is_a_lower_bound(listener: socket.socket) -> None:
    before = time.monotonic_ns()
    with socket.create_connection(listener.getsockname()[:2]):
        time.sleep(0.15)
        server, _ = listener.accept()
        with server:
            age = queue_age.read_tcp_info(server)
            after = time.monotonic_ns()
    assert age.established_ns >= before, "never older than it is"
    assert 50_000_000 < age.age_ns <= after - before
    assert (age.source, age.slot, age.cookie, age.flags) == (queue_age.TCP_INFO, NO_SLOT, 0, 0)


def test_data_makes_it_look_younger_never_older(pair: Pair) -> None:
    client, server = pair
    start = time.monotonic_ns()
    time.sleep(0.1)
    client.sendall(b"x")
    _readable(server)
    assert queue_age.read_tcp_info(server).age_ns <= time.monotonic_ns() - start


def test_flags_by_tcp_state(pair: Pair) -> None:
    client, server = pair
    client.shutdown(socket.SHUT_WR)
    _readable(server)
    age = queue_age.read_tcp_info(server)
    assert (age.half_closed, age.gone) == (True, False)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    deadline = time.monotonic() + 5
    while not queue_age.read_tcp_info(server).gone and time.monotonic() < deadline:
        time.sleep(0.001)
    assert queue_age.read_tcp_info(server).gone


def test_read_bpf_on_a_foreign_socket_is_the_estimate(pair: Pair) -> None:
    assert queue_age.read_bpf(pair[1]).source == queue_age.TCP_INFO


def test_read_bpf_raises_what_is_a_mistake() -> None:
    sock = socket.socket()
    sock.close()
    with pytest.raises(OSError):
        queue_age.read_bpf(sock)


def _age(flags: int) -> QueueAge:
    return QueueAge(established_ns=0, cookie=1, age_ns=0, flags=flags, slot=0)


def test_client_left(pair: Pair) -> None:
    client, server = pair
    assert not queue_age.client_left(server, _age(0))
    assert queue_age.client_left(server, _age(GONE))
    assert queue_age.client_left(server, _age(GONE | HALF_CLOSED))
    assert not queue_age.client_left(server, _age(HALF_CLOSED)), "its FIN is not here"
    client.sendall(b"GET")
    client.shutdown(socket.SHUT_WR)
    _readable(server)
    assert not queue_age.client_left(server, _age(HALF_CLOSED))
    assert server.recv(10) == b"GET"


def test_client_left_with_nothing_said(pair: Pair) -> None:
    client, server = pair
    client.shutdown(socket.SHUT_WR)
    _readable(server)
    assert queue_age.client_left(server, _age(HALF_CLOSED))


def test_client_left_reset_after_the_reading(pair: Pair) -> None:
    client, server = pair
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    _readable(server)
    assert queue_age.client_left(server, _age(HALF_CLOSED))


def test_choose() -> None:
    failure = OperatorError("no BPF here", "do something")
    auto, bpf, plain = QueueAgeSource.AUTO, QueueAgeSource.BPF, QueueAgeSource.TCP_INFO
    assert queue_age.choose(auto, None) == (queue_age.read_bpf, "bpf", "")
    assert queue_age.choose(bpf, None).source == "bpf"
    assert queue_age.choose(auto, failure) == (queue_age.read_tcp_info, "tcp_info", "no BPF here")
    assert queue_age.choose(plain, None)[:2] == (queue_age.read_tcp_info, "tcp_info")
    with pytest.raises(OperatorError, match="no BPF here"):
        queue_age.choose(bpf, failure)


def test_accept_backlog(listener: socket.socket) -> None:
    listener.listen(7)
    clients = [socket.create_connection(listener.getsockname()[:2]) for _ in range(3)]
    assert tcp_info.accept_backlog(listener) == (3, 7)
    with pytest.raises(ValueError):
        tcp_info.accept_backlog(clients[0])
    for client in clients:
        client.close()
