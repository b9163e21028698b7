"""Long streams: every byte, in order, with bounded memory, whatever the two ends do."""

from __future__ import annotations

import socket
import time

import pytest
from harness.backends import Backend
from harness.line_client import LineClient
from harness.pattern import Pattern, digest
from harness.proc import Tidegate, tcp_config
from harness.processes import stat
from harness.streams import Exchange, Stream, assert_intact, mixed
from harness.waiting import wait_until

MIB = 1024 * 1024
# What a worker may grow by while it relays: buffers of the sessions at hand, and what the allocator keeps.
GROWTH = 16 * MIB
# A backend that never reads holds its receive buffer, ours, and the kernel's send buffers on the way; the
# sizes are those that the kernel tunes to (tcp_rmem, tcp_wmem).
HELD_AT_MOST = 48 * MIB


def rss(gate: Tidegate) -> int:
    total = 0
    for pid in gate.worker_pids():
        seen = stat(pid)
        assert seen is not None
        total += seen.rss_bytes
    return total


def assert_idle(gate: Tidegate) -> None:
    wait_until(lambda: gate.listener()["sessions"] == 0, 5, "every session to end")


def exchange(size: int, streams: int, timeout_s: float) -> None:
    """`size` bytes each way in plain streams, after a first small round that warms the worker up."""
    with Backend("exchange") as backend, Tidegate(tcp_config([backend.address])) as gate:
        address = ("127.0.0.1", gate.port())
        Exchange(address, [Stream(f"warm{n}", up=MIB, down=MIB) for n in range(streams)]).run(30)
        before = rss(gate)
        orders = [Stream(f"s{n}", up=size // streams, down=size // streams, seed=n) for n in range(streams)]
        work = Exchange(address, orders)
        work.start()
        grown = 0
        while any(not record.took_s for record in work.done):
            grown = max(grown, rss(gate) - before)
            time.sleep(0.1)
        assert_intact(work.join(timeout_s), backend)
        assert grown < GROWTH, f"the worker grew by {grown / MIB:.1f} MiB"
        assert_idle(gate)


def test_64_mib_each_way_arrive_intact() -> None:
    exchange(64 * MIB, streams=2, timeout_s=60)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("streams", [1, 40])
def test_a_gigabyte_each_way_arrives_intact(streams: int) -> None:
    exchange(1024 * MIB, streams=streams, timeout_s=800)


def test_slow_readers_slow_writers_half_closes_and_resets_side_by_side() -> None:
    with Backend("exchange") as backend, Tidegate(tcp_config([backend.address])) as gate:
        done = Exchange(("127.0.0.1", gate.port()), mixed(24, 4 * MIB, seed=11)).run(60)
        assert_intact(done, backend)
        reset = [record for record in done if record.stream.reset_after]
        assert reset
        assert_idle(gate)
        # the backend learns that a client was reset; it does not take a cut stream for a whole one
        seen = backend.stats()["done"]
        for record in reset:
            theirs = seen.get(record.stream.id)
            assert theirs is None or theirs["up"] < record.stream.up or not theirs["eof"], theirs


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_soak_of_mixed_streams() -> None:
    with Backend("exchange") as backend, Tidegate(tcp_config([backend.address])) as gate:
        for seed in range(20):
            done = Exchange(("127.0.0.1", gate.port()), mixed(40, 8 * MIB, seed=seed)).run(200)
            assert_intact([record for record in done if not record.stream.reset_after], backend)
            assert_idle(gate)


def test_small_buffers_and_long_pauses() -> None:
    streams = [
        Stream("small", up=2 * MIB, down=2 * MIB, seed=1, rcvbuf=4096, sndbuf=4096),
        Stream("rests", up=100_000, down=6 * MIB, seed=3, rest_ms=1000),
        Stream("backend first", up=3 * MIB, down=10, seed=5, fin_first="backend", write_pause_ms=20),
        Stream("nothing up", up=0, down=MIB, seed=7),
        Stream("nothing down", up=MIB, down=0, seed=9),
        Stream("nothing at all", up=0, down=0, seed=11),
    ]
    with Backend("exchange") as backend, Tidegate(tcp_config([backend.address])) as gate:
        done = Exchange(("127.0.0.1", gate.port()), streams).run(60)
        assert_intact(done, backend)
        assert_idle(gate)


def test_a_backend_that_never_reads_stops_the_client_and_gets_everything_later() -> None:
    with Backend("never_reads") as backend, Tidegate(tcp_config([backend.address])) as gate:
        before = rss(gate)
        with socket.create_connection(("127.0.0.1", gate.port())) as client:
            client.settimeout(1.5)
            total = 256 * MIB
            sent = 0
            pieces = Pattern(3).chunks(total)
            rest = b""
            try:
                for piece in pieces:
                    rest = bytes(piece)
                    while rest:
                        size = client.send(rest)
                        sent += size
                        rest = rest[size:]
            except TimeoutError:
                pass
            assert 0 < sent < HELD_AT_MOST, f"{sent / MIB:.1f} MiB were taken for a backend that never reads"
            assert rss(gate) - before < GROWTH
            backend.ask("read")
            client.settimeout(20)
            client.sendall(rest)
            sent += len(rest)
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
        stats = backend.stats()
        assert (stats["read"], stats["digest"]) == (sent, digest(3, sent))


def test_a_backend_that_dies_mid_stream_ends_just_its_sessions() -> None:
    with Backend("source", seed=1, pause_ms=2) as mortal, Backend("source", seed=1, pause_ms=2) as other:
        config = tcp_config([mortal.address, other.address], cluster={"balance": "round_robin"})
        with Tidegate(config) as gate:
            clients = [LineClient(gate.port()) for _ in range(8)]
            wait_until(lambda: mortal.stats()["accepted"] == other.stats()["accepted"] == 4, 5, "4 and 4")
            for client in clients:
                assert client.sock.recv(1000)
            mortal.kill()
            cut = 0
            for client in clients:
                # those that live go on for ever: enough bytes to have passed every buffer on the way
                received = 0
                try:
                    while received < 8 * MIB and (data := client.sock.recv(MIB)):
                        received += len(data)
                except ConnectionResetError:
                    pass
                if received < 8 * MIB:
                    cut += 1
                    client.sock.close()
            assert cut == 4
            wait_until(lambda: gate.listener()["sessions"] == 4, 5, "four sessions to end")
            assert sum(gate.listener()["ended"].values()) == 4
            for client in clients:
                client.sock.close()


def test_idle_timeouts_end_a_session_and_say_so() -> None:
    with Backend("echo") as backend:
        config = tcp_config(
            [backend.address], front_timeout="300ms", cluster={"back_timeout": "60s"}, stale_after="10s"
        )
        with Tidegate(config) as gate, LineClient(gate.port()) as idle:
            assert idle.ask("one") == "one"
            assert idle.end() in ("eof", "reset")
            assert_idle(gate)
            assert sum(n for reason, n in gate.listener()["ended"].items() if "timeout" in reason) == 1
