"""What a backend may do wrong, and what becomes of it: the table of docs/http.md, row by row.

The table is read: each test says which row it tries, and the reason in the access log must be one that the
row names. A row without a test fails the last test here.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from harness.app_servers import uvicorn
from harness.http_table import Script, Site, Table, running
from harness.http_wire import HttpClient, Message, ScriptedBackend, Wire, answer_ok, read_head, read_request
from harness.ports import free_port
from harness.waiting import wait_until

GET = b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\n"
TABLE = Table("The backend | The client gets")
ROWS, row = TABLE.ends, TABLE.row


@pytest.fixture(scope="module")
def shared() -> Iterator[Site]:
    """Listeners: `plain`; `hasty` (a short back_timeout, no retries); `gone` (nothing listens), `full` (the
    backend's queue is), `none` (no address), `either` (nothing listens at one of two).
    """
    with ExitStack() as stack:
        backend = stack.enter_context(ScriptedBackend())
        gone = f"127.0.0.1:{free_port()}"
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(2):  # what it takes until the kernel drops SYNs
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        patient = {"retries": 1, "connect_timeout": "300ms"}
        clusters: dict[str, dict[str, Any]] = {
            "plain": {"backends": [backend.address]},
            "hasty": {"backends": [backend.address], "back_timeout": "300ms", "retries": 0},
            "gone": {"backends": [gone], **patient},
            "full": {"backends": [f"127.0.0.1:{full.getsockname()[1]}"], **patient},
            "none": {"backends": ["nowhere.invalid:80"], **patient},
            "either": {"backends": [gone, backend.address], **patient},
        }
        yield stack.enter_context(running(TABLE, clusters, backend))


@pytest.fixture
def site(shared: Site) -> Iterator[Site]:
    yield shared
    shared.script(answer_ok)


def after_request(*pieces: bytes, hold: threading.Event | None = None, reset: bool = False) -> Script:
    """Reads one request, sends the pieces, closes or resets; waits for `hold` before the second piece."""

    def script(wire: Wire) -> None:
        read_request(wire)
        for at, piece in enumerate(pieces):
            if at and hold is not None:
                hold.wait(10)
            wire.send(piece)
        if reset:
            wire.reset()

    return script


def post(client: HttpClient, target: str = "/") -> Message:
    return client.ask(b"POST %b HTTP/1.1\r\nHost: a.example\r\nContent-Length: 1\r\n\r\nx" % target.encode())


@row("refuses, or is not reachable, on every attempt")
def test_nothing_listens(site: Site, row: str) -> None:
    with site.client("gone") as client:
        assert client.get().status == 502
        assert site.ended(row, "connect_failed")["retries"] == 1
        assert post(client).status == 502  # and the connection went on
        site.ended(row, "connect_failed")


@row("does not accept within connect_timeout, on the last attempt")
def test_the_backends_own_queue_is_full(site: Site, row: str) -> None:
    with site.client("full") as client:
        assert client.get().status == 504
        line = site.ended(row, "connect_failed")
        assert line["retries"] == 1 and line["total_us"] >= 2 * 300_000


@row("is none: no address, or all removed")
def test_no_backend(site: Site, row: str) -> None:
    with site.client("none") as client:
        assert client.get().status == 503
        assert site.ended(row, "no_backend")["backend"] == ""


@row("refuses, or is not reachable, and another one is there")
def test_another_backend_is_tried(site: Site, row: str) -> None:
    with site.client("either") as client:
        retries = 0
        for _ in range(30):
            assert post(client).status == 200
            (line,) = site.lines(1)
            assert line["end"] == "done" and line["backend"] == site.backend.address
            retries += line["retries"]
            if retries == 2:
                break
        assert retries == 2 and ROWS[row] == {"done"}


class Restarting:
    """Closes or resets each connection at its second request; counts them all."""

    def __init__(self, reset: bool) -> None:
        self.requests: list[str] = []
        self._reset = reset

    def __call__(self, wire: Wire) -> None:
        first = True
        while True:
            request = read_request(wire)
            self.requests.append(f"{request.method} {request.target}")
            if not first:
                if self._reset:
                    wire.reset()
                return
            first = False
            wire.send(OK + b"Content-Length: 2\r\n\r\nok")


@pytest.mark.parametrize("reset", [False, True])
@row("closes or resets without a byte, and the request may be sent again")
def test_sent_again_where_that_is_safe(site: Site, row: str, reset: bool) -> None:
    script = Restarting(reset)
    site.script(script)
    with site.client() as client:
        assert client.get("/1").status == 200
        site.lines(1)
        assert client.get("/2").status == 200
        assert script.requests == ["GET /1", "GET /2", "GET /2"]
        site.ended(row, "done")
    site.script(after_request(reset=reset))
    with site.client() as client:
        assert client.get("/3").status == 502
        assert site.ended(row, "backend_closed")["retries"] == 2


@pytest.mark.parametrize("reset", [False, True])
@row("the same, and it may not")
def test_not_sent_again_where_that_is_not_safe(site: Site, row: str, reset: bool) -> None:
    script = Restarting(reset)
    site.script(script)
    with site.client() as client:
        assert post(client, "/1").status == 200
        site.lines(1)
        assert post(client, "/2").status == 502
        assert script.requests == ["POST /1", "POST /2"]
        site.ended(row, "backend_closed")


@row("has closed an idle connection that was about to be used")
def test_a_stale_idle_connection_is_no_reason_to_fail_a_post(site: Site, row: str) -> None:
    site.script(after_request(OK + b"Content-Length: 2\r\n\r\nok"))
    with site.client() as client:
        for at in range(10):
            assert post(client, f"/{at}").status == 200
            wait_until(lambda: site.backend.wires[-1].sock.fileno() == -1, 5, "the backend's close")
            site.ended(row, "done")


@pytest.mark.parametrize(
    "head", [OK + b"Content-Length: 10\r\n", b"HTTP/1.1 200", b"HTTP/1.1 100 Continue\r\n\r\n"]
)
@row("closes inside the head")
def test_half_a_head(site: Site, row: str, head: bytes) -> None:
    site.script(after_request(head))
    with site.client() as client:
        answer = client.get()
        assert answer.status == 502
        assert len(answer.interim) == head.count(b"100 Continue")
        site.ended(row, "backend_closed")


BAD_HEADS = {
    "garbage": b"garbage\r\n\r\n",
    "binary": bytes(range(256)),
    "ssh": b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n",
    "http2": b"HTTP/2.0 200 OK\r\n\r\n",
    "both-framings": OK + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "two-lengths": OK + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "other-coding": OK + b"Transfer-Encoding: gzip\r\n\r\nxx",
    "bad-name": OK + b"Bad Name: x\r\nContent-Length: 0\r\n\r\n",
    "bare-lf": OK + b"X: a\nY: b\r\nContent-Length: 0\r\n\r\n",
    "too-large": OK + b"X: " + b"a" * 70_000 + b"\r\n\r\n",
    "too-many-interim": b"HTTP/1.1 100 Continue\r\n\r\n" * 40,
    "101-unasked": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
}


@pytest.mark.parametrize("name", BAD_HEADS)
@row(
    "sends a malformed status line or field, CL and TE, repeated CL, a coding other than chunked, a head too "
    "large, too many 1xx, 101 unasked"
)
def test_an_unusable_head(site: Site, row: str, name: str) -> None:
    site.script(after_request(BAD_HEADS[name]))
    with site.client() as client:
        assert client.get().status == 502
        site.ended(row, "bad_response")
        site.script(answer_ok)
        assert client.get("/next").body == b"GET /next"
        assert site.lines(1)[0]["end"] == "done"  # the fault is not said of the next request


CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"


def broken_body(site: Site, start: bytes, then: bytes) -> None:
    """The client gets what was good so far, and can tell that it is not all."""
    hold = threading.Event()
    site.script(after_request(start, then, hold=hold))
    with site.client() as client:
        client.send(GET)
        assert read_head(client).status == 200
        client.until(b"abc")
        hold.set()
        rest = client.rest()
        assert b"0\r\n\r\n" not in rest and len(rest) < 9


@pytest.mark.parametrize(
    ("start", "then"),
    [(OK + b"Content-Length: 10\r\n\r\nabc", b"de"), (CHUNKED, b"5\r\nd"), (CHUNKED, b"")],
    ids=["short", "inside-a-chunk", "no-last-chunk"],
)
@row("closes inside a body of known length, or before the last chunk")
def test_a_response_shorter_than_declared(site: Site, row: str, start: bytes, then: bytes) -> None:
    broken_body(site, start, then)
    assert site.ended(row, "backend_closed")["status"] == 200


@pytest.mark.parametrize("then", [b"nonsense\r\n", b"-1\r\nx\r\n", b"ffffffffffffffff\r\nx"])
@row("the same in a body, after the head was passed on")
def test_a_response_malformed_in_its_body(site: Site, row: str, then: bytes) -> None:
    broken_body(site, CHUNKED, then)
    site.ended(row, "bad_response")


@row("resets inside the response")
def test_a_reset_in_the_response(site: Site, row: str) -> None:
    hold = threading.Event()

    def script(start: bytes) -> Script:
        def half(wire: Wire) -> None:
            read_request(wire)
            wire.send(start)
            hold.wait(10)
            wire.reset()

        return half

    site.script(script(OK + b"Content-Le"))
    with site.client() as client:
        client.send(GET)
        wait_until(lambda: site.backend.seen.endswith(b"\r\n\r\n"), 5, "the request")
        hold.set()
        assert client.response().status == 502
        site.ended(row, "backend_reset")
    hold.clear()
    site.script(script(OK + b"\r\nhalf"))
    with site.client() as client:  # who reads to the end of the connection can tell by nothing but a reset
        client.send(b"GET / HTTP/1.0\r\n\r\n")
        client.until(b"half")
        hold.set()
        with pytest.raises(ConnectionResetError):
            client.more()
        site.ended(row, "backend_reset")


@row("sends more than it declared")
def test_a_response_longer_than_declared(site: Site, row: str) -> None:
    site.script(after_request(OK + b"Content-Length: 3\r\n\r\nabcSURPLUS"))
    with site.client() as client:
        for _ in range(3):
            assert client.get().body == b"abc"
            assert not site.ended(row, "done")["reused"]
    assert len(site.backend.wires) == 3


@row("sends bytes on an idle connection")
def test_bytes_on_an_idle_connection(site: Site, row: str) -> None:
    unasked = threading.Event()

    def script(wire: Wire) -> None:
        read_request(wire)
        wire.send(OK + b"Content-Length: 3\r\n\r\nabc")
        unasked.wait(10)
        wire.send(OK + b"Content-Length: 4\r\n\r\nevil")
        wire.rest()

    site.script(script)
    with site.client() as client:
        assert client.get().body == b"abc"
        unasked.set()
        site.backend.script = answer_ok
        wait_until(lambda: site.backend.wires[0].sock.fileno() == -1, 5, "the idle connection's end")
        assert client.get("/mine").body == b"GET /mine"
    assert [line["end"] for line in site.lines(2)] == ["done", "done"]
    assert not ROWS[row]


@row("says nothing, or takes nothing, for back_timeout")
def test_silence(site: Site, row: str) -> None:
    hold = threading.Event()

    def script(wire: Wire) -> None:
        head = read_head(wire)
        if head.target == "/stall":
            wire.send(OK + b"Content-Length: 10\r\n\r\nabc")
        hold.wait(20)

    site.script(script)
    with site.client("hasty") as client:
        assert client.get("/silent").status == 504
        site.ended(row, "back_timeout")
        client.send(b"GET /stall HTTP/1.1\r\nHost: a.example\r\n\r\n")
        client.until(b"abc")
        assert client.rest() == b""
        site.ended(row, "back_timeout")
    with site.client("hasty") as client:
        client.send(b"POST /deaf HTTP/1.1\r\nHost: a.example\r\nContent-Length: 90000000\r\n\r\n")
        client.sock.settimeout(0.2)
        with contextlib.suppress(OSError):  # until nobody takes it
            while True:
                client.send(b"x" * 100_000)
        client.sock.settimeout(10)
        answer = client.response()
        assert (answer.status, answer.get("connection")) == (504, "close")
        site.ended(row, "back_timeout")
    hold.set()


@row("is slow, each piece within back_timeout")
def test_slow_is_not_silent(site: Site, row: str) -> None:
    def script(wire: Wire) -> None:
        read_request(wire)
        for piece in (b"HTTP/1.1 200", b" OK\r\nContent-", b"Length: 4\r\n", b"\r\na", b"bc", b"d"):
            threading.Event().wait(0.1)
            wire.send(piece)

    site.script(script)
    with site.client("hasty") as client:
        assert client.get().body == b"abcd"
        assert site.ended(row, "done")["total_us"] > 300_000  # longer than back_timeout in all


def early(closes: bool, hold: threading.Event) -> Script:
    def script(wire: Wire) -> None:
        read_head(wire)
        wire.send(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\nno")
        if not closes:
            hold.wait(10)

    return script


def refused_upload(site: Site, script: Script, hold: threading.Event) -> None:
    """A large upload whose answer comes before its end."""
    site.script(script)
    with site.client() as client:
        client.send(b"POST /u HTTP/1.1\r\nHost: a.example\r\nContent-Length: 50000000\r\n\r\n")

        def upload() -> None:
            with contextlib.suppress(OSError):
                for _ in range(500):
                    client.send(b"x" * 100_000)

        sender = threading.Thread(target=upload)
        sender.start()
        response = client.response()
        assert (response.status, response.body, response.get("connection")) == (401, b"no", "close")
        hold.set()
        sender.join(10)
        assert not sender.is_alive()


@row("answers while the request is still coming")
def test_an_early_answer(site: Site, row: str) -> None:
    hold = threading.Event()
    refused_upload(site, early(False, hold), hold)
    assert site.ended(row, "done")["status"] == 401


@row("answers, then resets the rest of an upload")
def test_an_early_answer_and_a_reset(site: Site, row: str) -> None:
    hold = threading.Event()
    refused_upload(site, early(True, hold), hold)  # closing over unread bytes is a reset
    assert site.ended(row, "done")["status"] == 401


@row("has its max_per_backend connections open, and so have all others")
def test_full(row: str) -> None:
    """As long as another one has room, that one is taken."""
    go = threading.Event()
    inside = []

    def slow(wire: Wire) -> None:
        while True:
            inside.append(read_request(wire))
            go.wait(10)
            wire.send(OK + b"Content-Length: 0\r\n\r\n")

    with ExitStack() as stack:
        a, b = (stack.enter_context(ScriptedBackend(slow)) for _ in range(2))
        # one client: one backend, while that can be
        cluster = {"backends": [a.address, b.address], "balance": "hash", "pool": {"max_per_backend": 2}}
        site = stack.enter_context(running(TABLE, {"plain": cluster}, a))
        clients = [stack.enter_context(site.client()) for _ in range(5)]
        for at, client in enumerate(clients[:4], 1):
            client.send(GET)
            wait_until(lambda at=at: len(inside) == at, 5, f"{at} at the backends")
        assert sorted(len(backend.wires) for backend in (a, b)) == [2, 2]
        answer = clients[4].ask(GET)
        assert (answer.status, answer.get("retry-after"), answer.get("connection")) == (503, "1", None)
        site.ended(row, "overloaded")
        go.set()
        assert [client.response().status for client in clients[:4]] == [200] * 4
        assert clients[4].ask(GET).status == 200
        assert len(a.wires) + len(b.wires) == 4  # which were kept, and used again


# a real server, killed and started again


@row("is killed while it answers")
def test_killed(row: str) -> None:
    with uvicorn("h11") as server, before(server.address) as site, site.client() as client:
        client.send(b"GET /bytes/1000000000 HTTP/1.1\r\nHost: a.example\r\n\r\n")
        assert read_head(client).status == 200
        client.exactly(100_000)
        server.child.kill()
        client.recording = False
        assert not client.rest().endswith(b"\r\n0\r\n\r\n")
        (line,) = site.lines(1)
        assert line["end"].partition(":")[0] in ROWS[row]


@row("is down, and up again")
def test_restarted(row: str) -> None:
    with uvicorn("h11") as server, before(server.address) as site, site.client() as client:
        assert client.get().status == 200
        site.lines(1)
        server.child.kill()
        for _ in range(3):
            assert client.get().status == 502
            site.ended(row, "connect_failed")
        server.start()
        assert client.get().status == 200  # no reload, no time to wait: it is tried at every request
        site.ended(row, "done")


@contextlib.contextmanager
def before(address: str) -> Iterator[Site]:
    """A proxy of its own before a real server."""
    with (
        ScriptedBackend() as unused,
        running(TABLE, {"plain": {"backends": [address], "retries": 1}}, unused) as site,
    ):
        yield site


def test_it_still_serves_and_counts_what_it_logs(site: Site) -> None:
    with site.client() as client:
        assert client.get("/still").body == b"GET /still"
    site.lines(1)
    assert site.gate.status()["workers"][0]["restarts"] == 0
    logged, counted = site.failures()
    assert counted == logged
    assert "internal_error" not in counted


def test_every_row_of_the_table_is_tried() -> None:
    assert set(ROWS) == TABLE.tried
