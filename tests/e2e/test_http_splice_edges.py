"""The edges of spliced bodies: answers that come early, backends that die or say too much, late ends."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
from harness.http_wire import Wire, read_head, read_request
from harness.proc import Tidegate
from harness.processes import cpu_seconds
from harness.spliced_http import length, pattern, put, quiet, site
from harness.splicing import MIB
from harness.waiting import wait_until

pytestmark = [pytest.mark.bpf, pytest.mark.feature("splice")]


def send_until_stopped(wire: Wire, data: bytes) -> None:
    """As much of it as goes in; somebody else ends the connection."""
    with contextlib.suppress(OSError):
        wire.send(data)


def wait_until_still(gate: Tidegate) -> None:
    """Until nothing has moved to the client for a while."""
    still, before = 0, -1
    while still < 5:
        now = gate.listener()["bytes_out"]
        still = still + 1 if now == before else 0
        before = now
        time.sleep(0.1)


@pytest.mark.parametrize("interim", [False, True])
def test_an_answer_is_heard_while_the_backend_takes_no_more_of_the_upload(interim: bool) -> None:
    size = 64 * MIB
    go_on = threading.Event()

    def script(wire: Wire) -> None:
        wire.recording = False
        read_head(wire)
        body = wire.exactly(MIB)
        time.sleep(0.3)  # every buffer on the way is full, and the relay has something in hand
        if interim:
            wire.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")
            assert go_on.wait(20)
            pieces = [body, *(wire.exactly(MIB) for _ in range(size // MIB - 1))]
            verdict = str(b"".join(pieces) == pattern(1, size)).encode()
            wire.send(length(len(verdict)) + verdict)
        else:
            wire.send(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 4\r\n\r\nmuch")
            go_on.wait(20)

    with site(script) as (gate, _), quiet(gate) as client:
        sender = threading.Thread(target=send_until_stopped, args=(client, put(size) + pattern(1, size)))
        sender.start()
        try:
            if interim:
                assert read_head(client).status == 103
                go_on.set()
                assert client.response("PUT").body == b"True"
            else:
                assert client.response("PUT").status == 413
        finally:
            go_on.set()
            sender.join(20)


def test_a_backend_that_resets_under_a_slow_reader_costs_no_time() -> None:
    give_up = threading.Event()

    def script(wire: Wire) -> None:
        wire.recording = False
        read_head(wire)
        wire.sock.settimeout(0.2)
        send_until_stopped(wire, length(64 * MIB) + pattern(1, 64 * MIB))
        give_up.wait(20)
        wire.reset()

    with site(script) as (gate, _), quiet(gate) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
        assert read_head(client).status == 200
        wait_until(lambda: gate.listener()["spliced"] == 1, 5, "the hand-over")
        wait_until_still(gate)
        give_up.set()
        time.sleep(0.1)
        (worker,) = gate.worker_pids()
        begun, used = time.monotonic(), cpu_seconds([worker])
        time.sleep(1.5)
        assert cpu_seconds([worker]) - used < 0.4 * (time.monotonic() - begun)
        assert gate.listener()["sessions"] == 1
        client.rest()
        wait_until(lambda: gate.listener()["ended"]["backend_reset"] == 1, 5, "its end to be counted")


def test_a_backend_that_waits_for_a_client_learns_at_once_that_it_left() -> None:
    """What was passed and not read is no unread byte to TCP: a plain close would leave the window closed."""
    stopped: list[OSError] = []

    def script(wire: Wire) -> None:
        wire.recording = False
        read_head(wire)
        try:
            wire.send(length(64 * MIB) + pattern(1, 64 * MIB))
        except OSError as error:
            stopped.append(error)

    with site(script) as (gate, _), quiet(gate) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
        assert read_head(client).status == 200
        wait_until(lambda: gate.listener()["spliced"] == 1, 5, "the hand-over")
        wait_until_still(gate)
        client.reset()
        wait_until(lambda: len(stopped) == 1, 2, "the backend to be told")


def test_what_a_backend_says_behind_a_body_costs_its_connection_not_the_next_response() -> None:
    size = 2 * MIB

    def script(wire: Wire) -> None:
        wire.recording = False
        while True:
            read_request(wire)
            wire.send(length(size) + pattern(3, size) + b"\r\n")

    with site(script) as (gate, _), quiet(gate) as client:
        for _ in range(4):  # the second of each pair finds the connection just put down
            client.send(2 * b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
            for _ in range(2):
                assert client.response().body == pattern(3, size)


def test_a_tunnel_ends_behind_the_last_byte() -> None:
    """Its client's socket is in the kernel's map since an upload: recv() must not end before what waits."""
    size = 2 * MIB
    go_on = threading.Event()
    got: list[bytes] = []

    def script(wire: Wire) -> None:
        wire.recording = False
        while read_request(wire).method == "PUT":
            wire.send(length(4) + b"done")
        wire.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n")
        assert go_on.wait(20)
        got.append(wire.rest())

    for turn in range(3):
        go_on.clear()
        got.clear()
        with site(script) as (gate, _), quiet(gate) as client:
            client.send(put(size) + pattern(size, size))
            assert client.response("PUT").body == b"done"
            client.send(b"GET / HTTP/1.1\r\nHost: a.example\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n")
            assert read_head(client).status == 101
            data = pattern(turn, 32 * MIB)
            client.sock.settimeout(0.5)
            sent, step = 0, (64 * 1024, 1000, 9000)[turn % 3]
            with contextlib.suppress(TimeoutError):
                while sent < len(data):
                    sent += client.sock.send(data[sent : sent + step])
            client.sock.shutdown(1)
            go_on.set()
            wait_until(lambda: len(got) == 1, 10, "the end")
            assert len(got[0]) == sent
            assert got[0] == data[:sent]
