"""Requests and responses through the proxy: framing, reuse, pipelining, early and interim answers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from harness.http_wire import HttpClient, ScriptedBackend, Wire, answer_ok, read_head, read_request
from harness.proc import Tidegate, tcp_config
from harness.waiting import wait_until


class Site:
    """A proxy whose backend a test may script anew."""

    def __init__(self, gate: Tidegate, backend: ScriptedBackend) -> None:
        self.gate = gate
        self.backend = backend

    def client(self, timeout_s: float = 10.0) -> HttpClient:
        return HttpClient(self.gate.port(), timeout_s=timeout_s)


@contextlib.contextmanager
def site(script: Callable[[Wire], None] = answer_ok, cluster: Any = None, **listener: Any) -> Iterator[Site]:
    with ScriptedBackend(script) as backend:
        config = tcp_config([backend.address], protocol="http", cluster=cluster, **listener)
        with Tidegate(config) as gate:
            yield Site(gate, backend)


@pytest.fixture(scope="module")
def shared() -> Iterator[Site]:
    """One proxy for all tests that only differ in what the backend does; its pool is emptied by closing."""
    with site() as one:
        yield one


def scripted(one: Site, script: Callable[[Wire], None]) -> Site:
    """New connections run `script`; idle ones from before are gone."""
    one.backend.script = script
    for wire in one.backend.wires:
        with contextlib.suppress(OSError):
            wire.sock.shutdown(2)
    one.backend.wires.clear()
    return one


def responding(*responses: bytes, close: bool = False) -> Callable[[Wire], None]:
    """Reads a request, sends the next response; closes behind the last one if told to."""
    left = list(responses)

    def script(wire: Wire) -> None:
        while True:
            read_request(wire)
            wire.send(left.pop(0) if len(left) > 1 else left[0])
            if close:
                return

    return script


def test_kept_alive_connections_are_used_again_on_both_sides(shared: Site) -> None:
    one = scripted(shared, answer_ok)
    with one.client() as client:
        for at in range(20):
            assert client.get(f"/{at}").body == f"GET /{at}".encode()
    assert len(one.backend.wires) == 1
    with one.client() as client:
        assert client.get("/again").status == 200
    assert len(one.backend.wires) == 1


def test_pipelined_requests_are_answered_in_order(shared: Site) -> None:
    one = scripted(shared, answer_ok)
    with one.client() as client:
        requests = [f"GET /{at} HTTP/1.1\r\nHost: a.example\r\n\r\n".encode() for at in range(200)]
        client.send(b"".join(requests))
        assert [client.response().body for _ in requests] == [f"GET /{at}".encode() for at in range(200)]


def test_a_thousand_pipelined_own_answers(shared: Site) -> None:
    """They are made in a loop, not in a call within a call."""
    with one_refusing() as one, one.client() as client:
        client.send(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n" * 1000)
        for _ in range(1000):
            assert client.response().status == 403
        assert client.get().status == 403


def one_refusing() -> contextlib.AbstractContextManager[Site]:
    return site(route=[{"deny": 403}])


@pytest.mark.parametrize("size", [0, 1, 1000, 70_000, 3_000_000])
def test_bodies_of_known_length_both_ways(shared: Site, size: int) -> None:
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)

    def echo(wire: Wire) -> None:
        while True:
            request = read_request(wire)
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(request.body) + request.body)

    one = scripted(shared, echo)
    with one.client() as client:
        for _ in range(2):
            client.send(b"POST /e HTTP/1.1\r\nHost: a.example\r\nContent-Length: %d\r\n\r\n" % size)
            client.send(body)
            assert client.response().body == body


def test_chunked_bodies_and_trailers_both_ways(shared: Site) -> None:
    seen = []
    passed = threading.Event()

    def script(wire: Wire) -> None:
        while True:
            seen.append(read_request(wire))
            wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
            passed.wait(10)
            # a framing field in a trailer is a fault: the response is cut, its end not made up
            wire.send(b"2;x=y\r\nde\r\n0\r\nDigest: d\r\nContent-Length: 9\r\n\r\n")

    one = scripted(shared, script)
    with one.client() as client:
        client.send(b"POST / HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n")
        for piece in (
            b"5;ext=1\r\nhe",
            b"llo\r\n",
            b"0006\r\n world\r\n",
            b"0\r\nX-Sum: 1\r\nHost",
            b"ile: n\r\n\r\n",
        ):
            client.send(piece)
        assert client.until(b"abc\r\n").endswith(b"\r\n\r\n3\r\nabc\r\n")
        passed.set()
        assert client.rest() == b""
    assert seen[0].body == b"hello world"
    assert seen[0].trailers == b"X-Sum: 1\r\nHostile: n\r\n"


def test_a_chunked_response_with_trailers(shared: Site) -> None:
    one = scripted(
        shared,
        responding(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nDigest: d\r\n\r\n"
        ),
    )
    with one.client() as client:
        for _ in range(3):
            response = client.get()
            assert (response.body, response.trailers) == (b"abc", b"Digest: d\r\n")
    assert len(one.backend.wires) == 1


def test_a_response_that_ends_with_its_connection(shared: Site) -> None:
    one = scripted(shared, responding(b"HTTP/1.0 200 OK\r\n\r\nto the end", close=True))
    with one.client() as client:
        for _ in range(2):
            response = client.get()
            assert response.get("transfer-encoding") == "chunked"
            assert response.body == b"to the end"
    with one.client() as client:
        client.send(b"GET / HTTP/1.0\r\n\r\n")
        response = client.response()
        assert response.get("transfer-encoding") is None
        assert response.body == b"to the end"


def test_http10_clients(shared: Site) -> None:
    one = scripted(
        shared, responding(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
    )
    with one.client() as client:
        response = client.ask(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert response.body == b"abc"
        assert response.get("connection") == "close"
    one = scripted(shared, answer_ok)
    with one.client() as client:
        for _ in range(2):
            response = client.ask(b"GET /k HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            assert response.get("connection") == "keep-alive"
        assert client.ask(b"GET /k HTTP/1.0\r\n\r\n").get("connection") == "close"
        assert client.ended


@pytest.mark.parametrize(
    ("method", "response"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"),
        ("GET", b"HTTP/1.1 204 No Content\r\n\r\n"),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 77\r\n\r\n"),
    ],
)
def test_responses_without_a_body(shared: Site, method: str, response: bytes) -> None:
    one = scripted(shared, responding(response))
    with one.client() as client:
        for _ in range(3):
            assert client.get("/", method=method).status == int(response[9:12])
    assert len(one.backend.wires) == 1


def test_interim_responses_are_passed_on(shared: Site) -> None:
    one = scripted(
        shared,
        responding(
            b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
            b"HTTP/1.1 103 Early Hints\r\nLink: </b>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
        ),
    )
    with one.client() as client:
        assert [hint.get("link") for hint in client.get().interim] == ["</a>", "</b>"]
        response = client.ask(b"GET / HTTP/1.0\r\n\r\n")
        assert response.interim == [] and response.status == 200


def test_the_body_waits_for_100_continue(shared: Site) -> None:
    one = scripted(shared, answer_ok)
    with one.client() as client:
        client.send(
            b"POST /u HTTP/1.1\r\nHost: a.example\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n"
        )
        assert read_head(client).status == 100
        client.send(b"body")
        assert client.response().body == b"POST /u"
        assert client.get("/next").status == 200


def test_a_final_answer_instead_of_100_continue(shared: Site) -> None:
    def refuse(wire: Wire) -> None:
        read_head(wire)
        wire.send(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\n\r\nbig")
        wire.rest()

    one = scripted(shared, refuse)
    with one.client() as client:
        client.send(
            b"POST /u HTTP/1.1\r\nHost: a.example\r\nContent-Length: 9000000\r\nExpect: 100-continue\r\n\r\n"
        )
        response = client.response()
        assert (response.status, response.body, response.get("connection")) == (413, b"big", "close")
        assert client.ended


@pytest.mark.parametrize("closes", [True, False])
def test_an_early_answer_to_a_large_upload_arrives(shared: Site, closes: bool) -> None:
    """Whether the backend then closes with the upload unread, a reset, or only reads no more."""
    done = threading.Event()

    def refuse(wire: Wire) -> None:
        read_head(wire)
        wire.send(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\nno")
        if not closes:
            done.wait(10)

    one = scripted(shared, refuse)
    with one.client() as client:
        client.send(b"POST /u HTTP/1.1\r\nHost: a.example\r\nContent-Length: 50000000\r\n\r\n")

        def upload() -> None:
            with contextlib.suppress(OSError):
                for _ in range(500):
                    client.send(b"x" * 100_000)

        sender = threading.Thread(target=upload)
        sender.start()
        response = client.response()
        assert (response.status, response.body, response.get("connection")) == (401, b"no", "close")
        done.set()
        sender.join(10)
    with scripted(shared, answer_ok).client() as client:
        assert client.get().status == 200


def test_memory_stays_bounded_when_the_client_does_not_read(shared: Site) -> None:
    sent = 0

    def flood(wire: Wire) -> None:
        nonlocal sent
        read_request(wire)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 200000000\r\n\r\n")
        wire.sock.settimeout(1.0)
        with contextlib.suppress(TimeoutError):
            while sent < 200_000_000:
                sent += wire.sock.send(b"x" * 65536)

    one = scripted(shared, flood)
    with one.client() as client:
        client.send(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
        wait_until(lambda: sent > 100_000, 5, "the flood to begin")
        before = -1
        while before != sent:
            before = sent
            threading.Event().wait(0.5)
        assert sent < 60_000_000  # what socket buffers hold


def test_hop_by_hop_fields_stay_on_their_hop(shared: Site) -> None:
    seen = []

    def script(wire: Wire) -> None:
        while True:
            seen.append(read_request(wire))
            wire.send(
                b"HTTP/1.1 200 OK\r\nConnection: x-a, keep-alive\r\nX-A: 1\r\nKeep-Alive: timeout=5\r\n"
                b"X-B: 2\r\nContent-Length: 0\r\n\r\n"
            )

    one = scripted(shared, script)
    with one.client() as client:
        response = client.get("/", "Connection: x-c", "X-C: 1", "X-D: 2", "X-Forwarded-For: 6.6.6.6")
    assert response.get("x-a") is None and response.get("keep-alive") is None and response.get("x-b") == "2"
    assert seen[0].get("x-c") is None and seen[0].get("x-d") == "2"
    assert seen[0].all("x-forwarded-for") == ["127.0.0.1"]
    assert seen[0].get("x-request-start") and seen[0].get("x-request-id")


def test_an_upgrade_becomes_bytes_both_ways(shared: Site) -> None:
    def websocket(wire: Wire) -> None:
        request = read_head(wire)
        assert request.get("upgrade") == "websocket"
        wire.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhi!")
        while data := wire.exactly(4):
            wire.send(data.upper())

    one = scripted(shared, websocket)
    with one.client() as client:
        client.send(
            b"GET /ws HTTP/1.1\r\nHost: a.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nearl"
        )
        assert read_head(client).status == 101
        assert client.exactly(3) == b"hi!"
        assert client.exactly(4) == b"EARL"
        for _ in range(3):
            client.send(b"ping")
            assert client.exactly(4) == b"PING"
        client.sock.shutdown(1)
        assert client.rest() == b""
    wait_until(lambda: one.gate.listener()["sessions"] == 0, 5, "the session's end")


def test_a_refused_upgrade_is_a_plain_response(shared: Site) -> None:
    one = scripted(shared, answer_ok)
    with one.client() as client:
        assert client.get("/ws", "Connection: Upgrade", "Upgrade: websocket").status == 200
        assert client.get("/next").status == 200


def test_sessions_and_descriptors_come_back(shared: Site) -> None:
    one = scripted(shared, answer_ok)
    for _ in range(50):
        with one.client() as client:
            client.get("/", "Connection: close")
            assert client.ended
    wait_until(lambda: one.gate.listener()["sessions"] == 0, 5, "sessions to end")


@pytest.mark.parametrize("wait_s", [0.0, 0.1])
def test_what_a_client_sends_behind_its_last_request_costs_it_no_answer(shared: Site, wait_s: float) -> None:
    """Closing over bytes that nobody read is a reset: what was sent before must be on its way by then."""
    asked, sent = threading.Event(), threading.Event()

    def script(wire: Wire) -> None:
        read_request(wire)
        asked.set()
        assert sent.wait(10)
        time.sleep(wait_s)  # so long that the client is watched meanwhile, or not
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlast")

    one = scripted(shared, script)
    for behind in (b"\r\n", b"GET /never HTTP/1.1\r\nHost: a.example\r\n\r\n", b"x" * 5000):
        asked.clear()
        sent.clear()
        with one.client() as client:
            client.send(b"GET / HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n")
            assert asked.wait(10)
            client.send(behind)
            sent.set()
            answer = client.response()
            assert (answer.status, answer.body) == (200, b"last")
