"""Splicing through a running tidegate: every byte to the last, bounded, whatever the two ends do."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time

import pytest
from harness.backends import Backend
from harness.http_wire import HttpClient, ScriptedBackend, Wire
from harness.kernel_sockets import in_netns
from harness.line_client import LineClient
from harness.loss import losing
from harness.pattern import Pattern, digest
from harness.proc import Tidegate, tcp_config
from harness.spliced_http import pattern
from harness.splicing import MIB, address, spliced, spliced_maps
from harness.streams import Exchange, Stream, assert_intact, mixed
from harness.waiting import wait_until

from tidegate.session.context import unsent_bytes

pytestmark = [pytest.mark.bpf, pytest.mark.feature("splice")]

# every socket buffer on the way (tcp_rmem and tcp_wmem may be large), and the credit
HELD_AT_MOST = 48 * MIB


@pytest.mark.parametrize("after", ["0", "256KiB"])
def test_64_mib_each_way_arrive_intact_and_are_counted_to_the_byte(after: str) -> None:
    size = 32 * MIB
    with Backend("exchange") as backend, spliced(backend, splice_after=after) as gate:
        orders = [Stream(f"s{n}", up=size, down=size, seed=n) for n in range(2)]
        assert_intact(Exchange(address(gate), orders).run(60), backend)
        wait_until(lambda: gate.listener()["sessions"] == 0, 5, "the sessions to end")
        seen = gate.listener()
        assert seen["bytes_out"] == 2 * size
        assert seen["bytes_in"] == 2 * size + sum(len(order.order()) for order in orders)
        assert seen["ended"]["done"] == 2


def test_a_hundred_two_way_sessions_with_fins_in_either_order() -> None:
    with Backend("exchange") as backend, spliced(backend) as gate:
        for batch in range(5):
            orders = [
                Stream(
                    f"b{batch}s{n}",
                    up=(n * 37_123) % 600_000,
                    down=(n * 91_331) % 700_000,
                    seed=100 * batch + 2 * n,
                    fin_first=("client", "backend")[n % 2],
                    rest_ms=(0, 0, 300)[n % 3],
                )
                for n in range(20)
            ]
            assert_intact(Exchange(address(gate), orders).run(60), backend)


def test_slow_readers_slow_writers_half_closes_and_resets_side_by_side() -> None:
    with Backend("exchange") as backend, spliced(backend, splice_after="64KiB") as gate:
        done = Exchange(address(gate), mixed(24, 4 * MIB, seed=11)).run(90)
        assert_intact(done, backend)
        seen = backend.stats()["done"]
        for record in done:
            if record.stream.reset_after:
                theirs = seen.get(record.stream.id)
                assert theirs is None or theirs["up"] < record.stream.up or not theirs["eof"], theirs


def test_a_backend_that_never_reads_stops_the_client_and_gets_everything_later() -> None:
    with Backend("never_reads") as backend, spliced(backend) as gate:
        with socket.create_connection(address(gate)) as client:
            client.settimeout(1.5)
            sent = 0
            rest = b""
            try:
                for piece in Pattern(3).chunks(256 * MIB):
                    rest = bytes(piece)
                    while rest:
                        size = client.send(rest)
                        sent += size
                        rest = rest[size:]
            except TimeoutError:
                pass
            assert 0 < sent < HELD_AT_MOST, f"{sent / MIB:.1f} MiB were taken"
            backend.ask("read")
            client.settimeout(30)
            client.sendall(rest)
            sent += len(rest)
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
        stats = backend.stats()
        assert (stats["read"], stats["digest"]) == (sent, digest(3, sent))


def test_a_reset_is_passed_on_as_a_reset_within_a_second() -> None:
    with Backend("source", seed=1, pause_ms=2) as backend, spliced(backend) as gate:
        with LineClient(gate.port()) as client:
            client.sock.sendall(b"never read: the end of its receiver is a reset then")
            assert client.sock.recv(1000)
            wait_until(lambda: gate.listener()["spliced"] == 1, 5, "the hand-over")
            backend.kill()
            begun = time.monotonic()
            assert how_it_ends(client.sock) == "reset"
            assert time.monotonic() - begun < 2
        wait_until(lambda: gate.listener()["ended"]["backend_reset"] == 1, 5, "its end")


def test_an_answer_before_a_reset_arrives_whole_though_the_client_goes_on_sending() -> None:
    """The backend's socket is closed by then, and what the client sends rings for it."""
    answer = pattern(5, MIB)

    def script(wire: Wire) -> None:
        wire.exactly(MIB)
        wire.send(answer)
        wait_until(
            lambda: unsent_bytes(wire.sock) == 0, 5, "the answer to leave: a reset takes the rest along"
        )
        wire.reset()

    with (
        ScriptedBackend(script) as backend,
        Tidegate(tcp_config([backend.address], splice="on", splice_after="0")) as gate,
        HttpClient(gate.port()) as client,
    ):
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)  # less than the answer
        client.sock.setblocking(False)
        until = time.monotonic() + 0.4  # the reset is held back for longer, while the client has not read
        while time.monotonic() < until:
            with contextlib.suppress(BlockingIOError):
                client.sock.send(bytes(100_000))
            time.sleep(0.002)
        client.sock.settimeout(5)
        assert client.rest() == answer
        wait_until(lambda: gate.listener()["ended"]["backend_reset"] == 1, 5, "its end")
        assert gate.listener()["spliced"] == 1


def test_a_backend_that_answers_and_resets_at_once_is_no_error_of_ours() -> None:
    """Some of these resets fall into the hand-over, when the client's socket is not watched yet."""

    def script(wire: Wire) -> None:
        wire.more()
        wire.send(bytes(400_000))
        wire.reset()

    with (
        ScriptedBackend(script) as backend,
        Tidegate(tcp_config([backend.address], splice="on", splice_after="0")) as gate,
    ):
        for _ in range(60):
            with socket.socket() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
                sock.settimeout(5)
                sock.connect(address(gate))
                sock.send(b"go")
                time.sleep(0.01)
                assert how_it_ends(sock) == "reset"
        wait_until(lambda: gate.listener()["ended"]["backend_reset"] == 60, 5, "their ends")


def test_a_backend_that_ends_and_resets_at_once_ends_an_upload_that_waits() -> None:
    """The end of what it sent is seen last, and nothing more is told of its socket."""

    def script(wire: Wire) -> None:
        wire.recording = False
        wire.exactly(300_000)
        time.sleep(0.05)  # the upload goes on, and waits
        wire.sock.shutdown(socket.SHUT_WR)
        wire.reset()

    with ScriptedBackend(script) as backend:
        config = tcp_config([backend.address], splice="on", splice_after="0")
        with Tidegate(config) as gate:
            for _ in range(20):
                with socket.create_connection(address(gate), 3) as client, pytest.raises(ConnectionError):
                    client.sendall(bytes(64 * MIB))
            wait_until(lambda: gate.listener()["sessions"] == 0, 2, "the last session to end")
            assert gate.listener()["spliced"] == 20


def test_a_worker_killed_takes_its_own_sessions_and_leaves_nothing() -> None:
    with Backend("echo") as backend:
        config = tcp_config([backend.address], splice="on", splice_after="0")
        strangers = spliced_maps()
        with Tidegate(config) as gate:
            with LineClient(gate.port()) as client:
                assert client.ask("one") == "one"
                wait_until(lambda: gate.listener()["spliced"] == 1, 5, "the hand-over")
                (pid,) = gate.worker_pids()
                maps = spliced_maps() - strangers
                assert maps
                os.kill(pid, signal.SIGKILL)
                begun = time.monotonic()
                assert client.end() in ("eof", "reset")
                assert time.monotonic() - begun < 1
            wait_until(lambda: gate.worker_pids() not in ([], [pid]), 10, "a new worker")
            wait_until(lambda: not maps & spliced_maps(), 10, "the dead one's maps to go")
            with LineClient(gate.port()) as client:
                assert client.ask("two") == "two"


def test_a_client_that_waits_to_send_learns_of_a_killed_worker() -> None:
    with Backend("never_reads") as backend, spliced(backend) as gate, socket.socket() as client:
        client.settimeout(1)
        client.connect(address(gate))
        with pytest.raises(TimeoutError):
            client.sendall(bytes(256 * MIB))
        wait_until(lambda: gate.listener()["bytes_spliced"] > 0, 5, "the kernel's share")
        client.settimeout(2)
        (pid,) = gate.worker_pids()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ConnectionResetError):
            client.sendall(bytes(256 * MIB))


def how_it_ends(sock: socket.socket) -> str:
    try:
        while sock.recv(MIB):
            pass
    except ConnectionResetError:
        return "reset"
    return "eof"


def test_timeouts_see_what_the_kernel_moves() -> None:
    with Backend("echo") as backend:
        config = tcp_config(
            [backend.address], splice="on", splice_after="0", front_timeout="1s", stale_after="10s",
            cluster={"back_timeout": "60s"},
        )  # fmt: skip
        with Tidegate(config) as gate, LineClient(gate.port()) as client:
            for number in range(8):  # longer than the timeout, never silent for as long
                assert client.ask(str(number)) == str(number)
                time.sleep(0.25)
            assert client.end() in ("eof", "reset")
            wait_until(lambda: gate.listener()["ended"]["front_timeout"] == 1, 5, "the timeout")
            assert gate.listener()["spliced"] == 1


def test_off_is_off_and_says_why() -> None:
    with (
        Backend("exchange") as backend,
        Tidegate(tcp_config([backend.address], splice="off", splice_after="0")) as gate,
    ):
        assert gate.status()["splice"] == {"by": "copy", "reason": 'splice = "off" on every listener'}
        done = Exchange(address(gate), [Stream("s", up=4 * MIB, down=4 * MIB)]).run(30)
        assert_intact(done, backend)
        assert gate.listener()["spliced"] == 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("percent", "timestamps"), [(1, 1), (5, 0)])
def test_under_packet_loss_nothing_is_lost_and_nothing_stalls(percent: int, timestamps: int) -> None:
    def run() -> None:
        with Backend("exchange") as backend, spliced(backend) as gate, losing(percent):
            orders = [
                Stream(f"l{n}", up=MIB, down=MIB, seed=2 * n, fin_first=("client", "backend")[n % 2])
                for n in range(8)
            ]
            done = Exchange(address(gate), orders).run(200)
            assert_intact(done, backend, patience_s=60)

    in_netns(run, {"net.ipv4.tcp_timestamps": str(timestamps)})


def test_where_sockets_are_kept_small_it_says_so_and_copies() -> None:
    def run() -> dict[str, str]:
        with Backend("exchange") as backend, spliced(backend, surely=False, splice="auto") as gate:
            assert_intact(Exchange(address(gate), [Stream("s", up=MIB, down=MIB)]).run(30), backend)
            assert gate.listener()["spliced"] == 0
            status: dict[str, str] = gate.status()["splice"]
            return status

    seen = in_netns(run, {"net.ipv4.tcp_rmem": "4096 16384 262144"})
    assert seen["by"] == "copy"
    assert "tcp_rmem" in seen["reason"]
