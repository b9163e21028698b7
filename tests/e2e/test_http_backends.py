"""What a backend may do wrong, and what becomes of it: the table of docs/http.md, row by row."""

# ruff: noqa: SIM117 - a proxy, then its clients: two levels say more than one line

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from harness.http_wire import HttpClient, ScriptedBackend, Wire, answer_ok, read_head, read_request
from harness.ports import free_port
from harness.proc import Tidegate, tcp_config
from harness.waiting import wait_until


@contextlib.contextmanager
def proxy(backends: list[str], cluster: Any = None, **listener: Any) -> Iterator[Tidegate]:
    config = tcp_config(backends, protocol="http", cluster=cluster, **listener)
    with Tidegate(config) as gate:
        yield gate


def after_request(*pieces: bytes, hold: threading.Event | None = None) -> Callable[[Wire], None]:
    """Reads one request, sends the pieces, closes; waits for `hold` between them."""

    def script(wire: Wire) -> None:
        read_request(wire)
        for at, piece in enumerate(pieces):
            if at and hold is not None:
                hold.wait(10)
            wire.send(piece)

    return script


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "response",
    [
        b"garbage\r\n\r\n",
        b"HTTP/2.0 200 OK\r\n\r\n",
        OK + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        OK + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        OK + b"Transfer-Encoding: gzip\r\n\r\nxx",
        OK + b"Bad Name: x\r\nContent-Length: 0\r\n\r\n",
        OK + b"X: a\nY: b\r\nContent-Length: 0\r\n\r\n",
        OK + b"X: " + b"a" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 40,
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        OK + b"Content-Length: 10\r\n",
        b"HTTP/1.1 200",
    ],
    ids=lambda value: value[:60].decode("latin-1").encode("unicode_escape").decode(),
)
def test_an_unusable_head_is_502_and_the_client_goes_on(response: bytes) -> None:
    with ScriptedBackend(after_request(response)) as backend, proxy([backend.address]) as gate:
        with HttpClient(gate.port()) as client:
            assert client.get().status == 502
            backend.script = answer_ok
            assert client.get("/next").body == b"GET /next"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (OK + b"Content-Length: 10\r\n\r\nabc", b"de"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", b"5\r\nd"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", b"nonsense\r\n"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", b""),
    ],
    ids=["short", "inside-a-chunk", "bad-chunk-size", "no-last-chunk"],
)
def test_a_response_broken_in_its_body_is_cut(first: bytes, second: bytes) -> None:
    hold = threading.Event()
    with (
        ScriptedBackend(after_request(first, second, hold=hold)) as backend,
        proxy([backend.address]) as gate,
    ):
        with HttpClient(gate.port()) as client:
            client.send(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
            head = read_head(client)
            assert head.status == 200
            client.until(b"abc")
            hold.set()
            rest = client.rest()
            assert b"0\r\n\r\n" not in rest and len(rest) < 9  # what was good so far, chunked anew
        wait_until(lambda: sum(gate.listener()["ended"].values()) == 1, 5, "the end")
        ended = gate.listener()["ended"]
        assert ended["backend_closed"] + ended["bad_response"] == 1


def test_a_cut_by_reset_is_a_reset_for_who_reads_to_the_end() -> None:
    hold = threading.Event()

    def script(wire: Wire) -> None:
        read_request(wire)
        wire.send(b"HTTP/1.1 200 OK\r\n\r\nhalf")
        hold.wait(10)
        wire.reset()

    with ScriptedBackend(script) as backend, proxy([backend.address]) as gate:
        with HttpClient(gate.port()) as client:
            client.send(b"GET / HTTP/1.0\r\n\r\n")
            client.until(b"half")
            hold.set()
            with pytest.raises(ConnectionResetError):
                client.more()


def test_longer_than_declared_stands_and_the_surplus_is_dropped() -> None:
    with ScriptedBackend(after_request(OK + b"Content-Length: 3\r\n\r\nabcSURPLUS")) as backend:
        with proxy([backend.address]) as gate, HttpClient(gate.port()) as client:
            for _ in range(3):
                assert client.get().body == b"abc"
            assert len(backend.wires) == 3


def test_bytes_on_an_idle_connection_end_it() -> None:
    unasked = threading.Event()

    def script(wire: Wire) -> None:
        read_request(wire)
        wire.send(OK + b"Content-Length: 3\r\n\r\nabc")
        unasked.wait(10)
        wire.send(OK + b"Content-Length: 4\r\n\r\nevil")
        wire.rest()

    with ScriptedBackend(script) as backend, proxy([backend.address]) as gate:
        with HttpClient(gate.port()) as client:
            assert client.get().body == b"abc"
            unasked.set()
            backend.script = answer_ok
            wait_until(lambda: backend.wires[0].sock.fileno() == -1, 5, "the idle connection's end")
            assert client.get("/mine").body == b"GET /mine"


class Restarting:
    """Closes the first `times` connections at its second request; `method` by `method` it counts."""

    def __init__(self) -> None:
        self.requests: list[str] = []

    def __call__(self, wire: Wire) -> None:
        first = True
        while True:
            request = read_request(wire)
            self.requests.append(f"{request.method} {request.target}")
            if not first:
                return
            first = False
            wire.send(OK + b"Content-Length: 2\r\n\r\nok")


def test_closed_without_a_byte_is_retried_where_that_is_safe() -> None:
    script = Restarting()
    with ScriptedBackend(script) as backend, proxy([backend.address]) as gate:
        with HttpClient(gate.port()) as client:
            assert client.get("/1").status == 200
            assert client.get("/2").status == 200  # its connection closed; sent once more on another
            assert script.requests == ["GET /1", "GET /2", "GET /2"]
            client.send(b"POST /3 HTTP/1.1\r\nHost: a.example\r\nContent-Length: 1\r\n\r\nx")
            assert client.response().status == 502
            assert script.requests.count("POST /3") == 1


def test_a_stale_idle_connection_is_no_reason_to_fail_a_post() -> None:
    """It was closed before the request came: seen, and not used."""

    def once(wire: Wire) -> None:
        read_request(wire)
        wire.send(OK + b"Content-Length: 2\r\n\r\nok")

    with ScriptedBackend(once) as backend, proxy([backend.address]) as gate:
        with HttpClient(gate.port()) as client:
            for at in range(10):
                client.send(b"POST /%d HTTP/1.1\r\nHost: a.example\r\nContent-Length: 1\r\n\r\nx" % at)
                assert client.response().status == 200
                wait_until(lambda: backend.wires[-1].sock.fileno() == -1, 5, "the backend's close")


def test_a_dead_backend_is_502_and_another_one_is_tried() -> None:
    dead = f"127.0.0.1:{free_port()}"
    with proxy([dead], cluster={"retries": 1}) as gate, HttpClient(gate.port()) as client:
        assert client.get().status == 502
        assert client.get().status == 502
    with ScriptedBackend() as backend, proxy([dead, backend.address]) as gate:
        with HttpClient(gate.port()) as client:
            for _ in range(10):
                client.send(b"POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 1\r\n\r\nx")
                assert client.response().status == 200


def test_silence_is_504_and_a_stall_is_a_cut() -> None:
    hold = threading.Event()

    def script(wire: Wire) -> None:
        request = read_request(wire)
        if request.target == "/stall":
            wire.send(OK + b"Content-Length: 10\r\n\r\nabc")
        hold.wait(20)

    with ScriptedBackend(script) as backend:
        with proxy([backend.address], cluster={"back_timeout": "300ms", "retries": 0}) as gate:
            with HttpClient(gate.port()) as client:
                assert client.get("/silent").status == 504
                client.send(b"GET /stall HTTP/1.1\r\nHost: a.example\r\n\r\n")
                client.until(b"abc")
                assert client.rest() == b""
            wait_until(lambda: gate.listener()["ended"]["back_timeout"] == 1, 5, "the cut's reason")
            hold.set()


def test_a_slow_backend_within_its_time_is_waited_for() -> None:
    def script(wire: Wire) -> None:
        read_request(wire)
        for piece in (b"HTTP/1.1 200", b" OK\r\nContent-", b"Length: 4\r\n", b"\r\na", b"bc", b"d"):
            wire.send(piece)
            threading.Event().wait(0.15)

    with ScriptedBackend(script) as backend:
        with proxy([backend.address], cluster={"back_timeout": "600ms"}) as gate:
            with HttpClient(gate.port()) as client:
                assert client.get().body == b"abcd"


def test_a_killed_backend_comes_back() -> None:
    with ScriptedBackend() as backend, proxy([backend.address], cluster={"retries": 0}) as gate:
        with HttpClient(gate.port()) as client:
            assert client.get().status == 200

            def die(wire: Wire) -> None:
                read_head(wire)
                wire.reset()

            backend.script = die
            backend.wires[0].sock.shutdown(2)
            statuses = {client.get().status for _ in range(3)}
            assert statuses <= {502, 503}
            backend.script = answer_ok
            wait_until(lambda: client.get().status == 200, 10, "recovery", every_s=0.1)
