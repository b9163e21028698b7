"""A TCP session between real sockets, the test driving the loop: ends, resets, retries, timeouts, zombies."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random

import pytest

from tidegate import config
from tidegate.cluster.balance import ClusterState
from tidegate.loop.reactor import Reactor
from tidegate.loop.slab import Slab
from tidegate.metrics.names import LISTENER, EndReason
from tidegate.session import zombies
from tidegate.session.context import BUFFER_SIZE, Context
from tidegate.session.tcp import TcpSession

SECOND = 1_000_000_000
RESET = struct.pack("ii", 1, 0)


class Clock:
    """CLOCK_MONOTONIC, movable."""

    def __init__(self) -> None:
        self.ahead_ns = 0

    def __call__(self) -> int:
        return time.monotonic_ns() + self.ahead_ns


class Bench:
    """One context, a client pair, and as many backends as asked for."""

    def __init__(self, listener: str = "", cluster: str = "", backends: int = 1) -> None:
        self.listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(backends)]
        ports = [sock.getsockname()[1] for sock in self.listening]
        entries = ", ".join(f'"127.0.0.1:{port}"' for port in ports)
        text = (
            f'[[listener]]\naddress = "127.0.0.1:1"\nprotocol = "tcp"\ncluster = "app"\n{listener}\n'
            f"[cluster.app]\nbackends = [{entries}]\n{cluster}\n"
        )
        self.config = config.parse(text)
        self.clock = Clock()
        self.reactor = Reactor(self.clock)
        self.ended: list[EndReason] = []
        buffer = bytearray(BUFFER_SIZE)
        self.ctx = Context(
            reactor=self.reactor,
            slab=Slab(8),
            buffer=buffer,
            view=memoryview(buffer),
            listener=self.config.listeners[0],
            cluster=ClusterState(self.config.clusters[0], rng=Random(7), now=self.clock),
            words=memoryview(bytearray(LISTENER.words * 8)).cast("Q"),
            on_end=lambda session, reason: self.ended.append(reason),
        )
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.client = socket.create_connection(server.getsockname())
            self.front, self.peer = server.accept()
        self.front.setblocking(False)
        self.client.settimeout(5)
        self.accepted: list[socket.socket] = []

    def start(self) -> TcpSession:
        session = TcpSession(self.ctx, self.front, self.peer, self.clock())
        session.start()
        return session

    def backend(self, index: int = 0) -> socket.socket:
        self.listening[index].settimeout(5)
        sock, _ = self.listening[index].accept()
        sock.settimeout(5)
        self.accepted.append(sock)
        return sock

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < deadline, "deadline"
            self.reactor.run_once(2_000_000)

    def relay(self, seconds: float = 0.05) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.reactor.run_once(2_000_000)

    def pass_time(self, ns: int) -> None:
        self.clock.ahead_ns += ns
        self.relay(0.01)

    def close(self) -> None:
        for _, session in list(self.ctx.slab):
            session.end(EndReason.SHUTDOWN)
        self.reactor.close()
        for sock in (self.client, self.front, *self.listening, *self.accepted):
            sock.close()


@pytest.fixture
def make() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def build(**options: object) -> Bench:
        made.append(Bench(**options))  # type: ignore[arg-type]
        return made[-1]

    yield build
    for bench in made:
        bench.close()


def connected(bench: Bench) -> tuple[TcpSession, socket.socket]:
    session = bench.start()
    bench.until(lambda: session.describe()["state"] == "relaying")
    return session, bench.backend()


def test_half_close_is_honoured_both_ways_and_ends_done(make: Callable[..., Bench]) -> None:
    bench = make()
    _, backend = connected(bench)
    bench.client.sendall(b"ask")
    bench.client.shutdown(socket.SHUT_WR)
    bench.relay()
    assert backend.recv(10) == b"ask" and backend.recv(10) == b""
    backend.sendall(b"answer")
    bench.relay()
    assert bench.client.recv(10) == b"answer" and not bench.ended
    backend.close()
    bench.until(lambda: bench.ended)
    assert bench.client.recv(10) == b"" and bench.ended == [EndReason.DONE]
    assert len(bench.ctx.slab) == 0 and bench.ctx.cluster.active == 0


def test_a_stopped_reader_stops_the_writer_and_memory_holds_one_buffer(make: Callable[..., Bench]) -> None:
    bench = make()
    session, backend = connected(bench)
    backend.setblocking(False)
    sent = 0
    quiet_since = time.monotonic()
    while time.monotonic() - quiet_since < 0.3:
        try:
            sent += backend.send(b"x" * 65536)
            quiet_since = time.monotonic()
        except BlockingIOError:
            pass
        bench.reactor.run_once(1_000_000)
    assert 0 < session.describe()["pending_out"] <= BUFFER_SIZE
    before = bench.reactor.iterations
    bench.relay(0.2)
    assert bench.reactor.iterations - before < 150  # paused, not spinning
    got = 0
    bench.client.setblocking(False)
    while got < sent:
        try:
            got += len(bench.client.recv(1 << 20))
        except BlockingIOError:
            bench.reactor.run_once(1_000_000)
    assert got == sent and not bench.ended


def test_a_clients_reset_resets_the_backend(make: Callable[..., Bench]) -> None:
    bench = make()
    _, backend = connected(bench)
    bench.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    bench.client.close()
    bench.until(lambda: bench.ended)
    assert bench.ended == [EndReason.CLIENT_RESET]
    with pytest.raises(ConnectionResetError):
        backend.recv(1)


def test_what_a_backend_sent_before_its_reset_arrives_before_the_reset(make: Callable[..., Bench]) -> None:
    """An early refusal of a large upload: answer, then close with unread bytes, which resets."""
    bench = make()
    _, backend = connected(bench)
    bench.client.sendall(b"upload" * 1000)
    bench.relay()
    backend.sendall(b"413 too large")
    backend.close()  # unread bytes: a reset
    bench.until(lambda: bench.ended)
    assert bench.ended == [EndReason.BACKEND_RESET]
    assert bench.client.recv(100) == b"413 too large"
    with pytest.raises(ConnectionResetError):
        bench.client.recv(1)


def test_the_next_backend_is_tried_at_once(make: Callable[..., Bench]) -> None:
    bench = make(backends=2, cluster='balance = "round_robin"')
    first = ClusterState(bench.config.clusters[0], rng=Random(7), now=bench.clock).pick()
    assert first is not None
    bench.listening[first.index].close()
    session = bench.start()
    bench.until(lambda: session.describe()["state"] == "relaying")
    assert bench.backend(1 - first.index)
    assert bench.ctx.words[LISTENER.index("connect_attempts_total")] == 2
    assert bench.ctx.words[LISTENER.index("connect_failures_total")] == 1


def test_when_all_attempts_fail_the_client_is_reset(make: Callable[..., Bench]) -> None:
    bench = make(cluster="retries = 1")
    bench.listening[0].close()
    bench.start()
    bench.until(lambda: bench.ended)
    assert bench.ended == [EndReason.CONNECT_FAILED]
    assert bench.ctx.words[LISTENER.index("connect_attempts_total")] == 2
    assert bench.ctx.words[LISTENER.index("connect_retries_total")] == 1
    with pytest.raises(ConnectionResetError):
        bench.client.recv(1)


def test_a_client_that_leaves_during_the_back_off_costs_no_further_attempt(
    make: Callable[..., Bench],
) -> None:
    bench = make(cluster="retries = 5")
    bench.listening[0].close()
    bench.start()
    bench.relay(0.01)
    attempts = bench.ctx.words[LISTENER.index("connect_attempts_total")]
    bench.client.close()
    bench.until(lambda: bench.ended)
    assert bench.ended == [EndReason.CLIENT_GONE]
    assert bench.ctx.words[LISTENER.index("connect_attempts_total")] == attempts


def test_back_timeout_runs_only_while_the_backend_owes(make: Callable[..., Bench]) -> None:
    bench = make(listener='front_timeout = "60s"', cluster='back_timeout = "5s"')
    _, backend = connected(bench)
    bench.pass_time(20 * SECOND)
    assert not bench.ended  # nobody asked anything
    bench.client.sendall(b"ask")
    bench.relay()
    assert backend.recv(3) == b"ask"
    bench.pass_time(4 * SECOND)
    assert not bench.ended
    bench.pass_time(2 * SECOND)
    assert bench.ended == [EndReason.BACK_TIMEOUT]


def test_front_timeout_ends_silence(make: Callable[..., Bench]) -> None:
    bench = make(listener='front_timeout = "10s"')
    _, backend = connected(bench)
    bench.pass_time(9 * SECOND)
    backend.sendall(b"still here")
    bench.relay()
    bench.pass_time(9 * SECOND)
    assert not bench.ended
    bench.pass_time(2 * SECOND)
    assert bench.ended == [EndReason.FRONT_TIMEOUT]


def test_the_zombie_checker_judges_progress_and_age(make: Callable[..., Bench]) -> None:
    bench = make()
    session, _ = connected(bench)
    bench.ctx.listener = replace(bench.ctx.listener, zombie_after_ns=30 * SECOND)
    now = session.last_progress_ns
    assert zombies.verdict(session, now + 30 * SECOND, None) is None
    assert zombies.verdict(session, now + 30 * SECOND + 1, None) is EndReason.ZOMBIE
    assert zombies.verdict(session, now + SECOND, max_age_ns=SECOND // 2) is EndReason.MAX_AGE
    found: list[EndReason] = []
    count = zombies.check(bench.ctx.slab, now + 31 * SECOND, None, lambda one, reason: found.append(reason))
    assert count == 1 and found == bench.ended == [EndReason.ZOMBIE] and len(bench.ctx.slab) == 0


def test_a_session_ends_once(make: Callable[..., Bench]) -> None:
    bench = make()
    session, _ = connected(bench)
    session.end(EndReason.SHUTDOWN)
    session.end(EndReason.ZOMBIE)
    assert bench.ended == [EndReason.SHUTDOWN]
    assert bench.ctx.cluster.active == 0 and bench.ctx.cluster.backends[0].connecting == 0
