"""Large bodies that the kernel moves: whole, to where exactly they end, whatever happens meanwhile."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import pytest
from harness.http_wire import HttpClient, Message, Wire, read_head, read_request
from harness.spliced_http import length, pattern, put, quiet, site
from harness.splicing import MIB
from harness.waiting import wait_until

pytestmark = [pytest.mark.bpf, pytest.mark.feature("splice")]

SIZES = (10, 300_000, 3_000_000, 100, 20 * MIB, 1_000_003, 20)


def check_put(client: HttpClient, size: int) -> None:
    client.send(put(size) + pattern(size, size))
    assert client.response("PUT").body == f"{size} True".encode()


def test_bodies_of_every_size_both_ways_on_kept_alive_connections() -> None:
    with site() as (gate, backend):
        with quiet(gate) as client:
            for size in SIZES:
                assert client.get(f"/{size}").body == pattern(size, size)
                check_put(client, size)
        assert len(backend.wires) == 1  # the pool keeps what was spliced
        wait_until(lambda: gate.listener()["sessions"] == 0, 5, "the session to end")
        seen = gate.listener()
        assert seen["bytes_spliced"] > 0
        assert seen["bytes_in"] > sum(SIZES)
        assert seen["bytes_out"] > sum(SIZES)
        assert seen["bytes_in"] < sum(SIZES) + 200 * len(SIZES) + 100 * len(SIZES)


def test_many_clients_share_pooled_connections() -> None:
    with site() as (gate, backend):
        failures: list[object] = []

        def run(number: int) -> None:
            try:
                with quiet(gate, 60) as client:
                    for at in range(4):
                        size = 400_000 + 37_123 * number + at
                        assert client.get(f"/{size}").body == pattern(size, size)
                        check_put(client, size)
            except Exception as failure:
                failures.append((number, failure))

        threads = [threading.Thread(target=run, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert len(backend.wires) <= 16
        assert gate.listener()["spliced"] >= 64


def test_what_follows_a_body_is_the_next_request() -> None:
    """Pipelined behind a large upload, in the same packets: it comes back to the parser at its exact end."""
    size = 2 * MIB
    with site() as (gate, _), quiet(gate) as client:
        for _ in range(5):
            heads = b"GET /7 HTTP/1.1\r\nHost: a.example\r\n\r\n"
            client.send(put(size) + pattern(size, size) + heads + put(size) + pattern(size, size) + heads)
            for _ in range(2):
                assert client.response("PUT").body == f"{size} True".encode()
                assert client.response().body == pattern(7, 7)


def test_the_access_log_counts_what_the_kernel_moved() -> None:
    size = 3 * MIB
    log = {"path": "stdout", "format": "json"}
    with site(access_log=log) as (gate, _), quiet(gate) as client:
        assert client.get(f"/{size}").body == pattern(size, size)
        check_put(client, size)

        def lines() -> list[dict[str, Any]]:
            written = [line for line in gate.child.output().splitlines() if line.startswith("{")]
            return [json.loads(line) for line in written]

        wait_until(lambda: len(lines()) == 2, 5, "two lines")
        down, up = lines()
        assert size < down["bytes_out"] < size + 400
        assert size < up["bytes_in"] < size + 200


def test_an_early_refusal_of_a_large_upload_reaches_the_client() -> None:
    def script(wire: Wire) -> None:
        wire.recording = False
        read_head(wire)
        wire.exactly(MIB)
        wire.send(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 4\r\n\r\nmuch")
        wire.rest()

    with site(script) as (gate, _), quiet(gate) as client:
        answers: list[Message] = []
        reader = threading.Thread(target=lambda: answers.append(client.response("PUT")))
        reader.start()
        client.send(put(64 * MIB) + pattern(1, 2 * MIB))
        reader.join(10)
        assert [(answer.status, answer.body) for answer in answers] == [(413, b"much")]


def test_interim_answers_in_the_middle_of_an_upload_pass() -> None:
    size = 8 * MIB

    def script(wire: Wire) -> None:
        wire.recording = False
        read_head(wire)
        body = wire.exactly(2 * MIB)
        wire.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")
        body += wire.exactly(size - len(body))
        verdict = str(body == pattern(size, size)).encode()
        wire.send(length(len(verdict)) + verdict)

    with site(script) as (gate, _), quiet(gate) as client:
        client.send(put(size) + pattern(size, size))
        answer = client.response("PUT")
        assert answer.body == b"True"
        assert [one.status for one in answer.interim] == [103]


def test_an_upload_that_waits_for_100() -> None:
    size = 4 * MIB
    with site() as (gate, _), quiet(gate) as client:
        client.send(put(size, "Expect: 100-continue"))
        assert read_head(client).status == 100
        client.send(pattern(size, size))
        assert client.response("PUT").body == f"{size} True".encode()


@pytest.mark.parametrize("way", ["fin", "reset"])
def test_a_backend_that_dies_in_a_response_cuts_it(way: str) -> None:
    handed_over = threading.Event()

    def script(wire: Wire) -> None:
        read_head(wire)
        wire.send(length(32 * MIB) + pattern(1, 4 * MIB))
        assert handed_over.wait(10)
        if way == "reset":
            wire.reset()

    with site(script) as (gate, _), quiet(gate) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
        assert read_head(client).status == 200
        wait_until(lambda: gate.listener()["spliced"] == 1, 5, "the hand-over")
        handed_over.set()
        rest = client.rest()
        assert len(rest) <= 4 * MIB
        assert rest == pattern(1, 4 * MIB)[: len(rest)]
        assert way == "reset" or len(rest) == 4 * MIB
        reason = "backend_closed" if way == "fin" else "backend_reset"
        wait_until(lambda: gate.listener()["ended"][reason] == 1, 5, "its end to be counted")


@pytest.mark.parametrize("way", ["fin", "reset"])
def test_a_client_that_leaves_in_an_upload_takes_its_request_along(way: str) -> None:
    ends: list[int] = []

    def script(wire: Wire) -> None:
        wire.recording = False
        read_head(wire)
        ends.append(len(wire.rest()))

    with site(script) as (gate, _):
        client = quiet(gate)
        client.send(put(32 * MIB) + pattern(1, 3 * MIB))
        wait_until(lambda: gate.listener()["spliced"] == 1, 5, "the hand-over")
        if way == "fin":
            client.close()
        else:
            client.reset()
        wait_until(lambda: len(ends) == 1, 10, "the backend to see the end")
        assert ends[0] <= 3 * MIB
        reason = "client_gone" if way == "fin" else "client_reset"
        wait_until(lambda: gate.listener()["ended"][reason] == 1, 5, "its end to be counted")


def test_a_client_that_leaves_in_a_response_frees_the_backend() -> None:
    with site() as (gate, backend):
        client = quiet(gate)
        client.send(b"GET /%d HTTP/1.1\r\nHost: a.example\r\n\r\n" % (64 * MIB))
        assert read_head(client).status == 200
        client.exactly(MIB)
        client.reset()
        wait_until(lambda: gate.listener()["sessions"] == 0, 10, "the session to end")
        wait_until(lambda: backend.wires[0].sock.fileno() < 0, 10, "the backend to be let go")


def test_silence_in_a_body_ends_it_on_the_side_that_owes() -> None:
    hold = threading.Event()

    def script(wire: Wire) -> None:
        wire.recording = False
        request = read_head(wire)
        if request.method == "GET":
            wire.send(length(32 * MIB) + pattern(1, MIB))
        else:
            wire.exactly(MIB)
        hold.wait(20)

    times = {"front_timeout": "1s", "cluster": {"back_timeout": "2s"}}
    try:
        with site(script, **times) as (gate, _):
            with quiet(gate) as client:  # the backend stalls
                client.send(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
                assert read_head(client).status == 200
                assert client.rest() == pattern(1, MIB)
            wait_until(lambda: gate.listener()["ended"]["back_timeout"] == 1, 5, "the timeout")
            with quiet(gate) as client:  # the client stalls
                client.send(put(32 * MIB) + pattern(1, MIB))
                assert client.response("PUT").status == 408
            wait_until(lambda: gate.listener()["ended"]["front_timeout"] == 1, 5, "the timeout")
    finally:
        hold.set()


def test_a_slow_reader_is_no_slow_backend() -> None:
    size = 24 * MIB
    with site(cluster={"back_timeout": "1s"}, front_timeout="20s") as (gate, _), quiet(gate) as client:
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.send(b"GET /%d HTTP/1.1\r\nHost: a.example\r\n\r\n" % size)
        assert read_head(client).status == 200
        wait_until(lambda: gate.listener()["spliced"] == 1, 5, "the hand-over")
        still, before = 0, -1
        while still < 25:  # for longer than the backend's time nothing moves
            now = gate.listener()["bytes_out"]
            still = still + 1 if now == before else 0
            before = now
            threading.Event().wait(0.1)
        assert client.exactly(size) == pattern(size, size)


def test_an_upgrade_on_a_connection_that_was_spliced_is_relayed() -> None:
    size = 2 * MIB

    def script(wire: Wire) -> None:
        wire.recording = False
        while (request := read_request(wire)).method == "PUT":
            wire.send(length(4) + b"done")
        assert request.get("upgrade") == "echo"
        wire.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n")
        while True:
            wire.send(wire.more())

    with site(script) as (gate, _), quiet(gate) as client:
        client.send(put(size) + pattern(size, size))
        assert client.response("PUT").body == b"done"
        client.send(b"GET / HTTP/1.1\r\nHost: a.example\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n")
        assert read_head(client).status == 101
        data = pattern(9, 2 * MIB)
        sender = threading.Thread(target=client.send, args=(data,))
        sender.start()
        assert client.exactly(len(data)) == data
        sender.join()


def test_an_upgraded_stream_is_spliced() -> None:
    def script(wire: Wire) -> None:
        wire.recording = False
        read_request(wire)
        wire.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n")
        while data := wire.sock.recv(65536):
            wire.send(data)

    with site(script) as (gate, _), quiet(gate) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: a.example\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n")
        assert read_head(client).status == 101
        data = pattern(9, 8 * MIB)
        sender = threading.Thread(target=client.send, args=(data,))
        sender.start()
        assert client.exactly(len(data)) == data
        sender.join()
        client.sock.shutdown(socket.SHUT_WR)  # half-closed: the other way stays open to its end
        assert client.ended
        wait_until(lambda: gate.listener()["bytes_spliced"] > 0, 5, "the kernel's share")
