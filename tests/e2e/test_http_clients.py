"""What a client may do wrong or leave out, and what becomes of it: the table of docs/http.md, row by row.

As in the test of backends, the table is read: the reasons counted and logged must be those that a row names.
Each listener has an access log, for a request that never became one is a line there too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from harness.http_table import Site, Table, running
from harness.http_wire import ScriptedBackend, Wire, answer_ok, read_head, read_request, turned_away
from harness.processes import stopped
from harness.waiting import wait_until

TABLE = Table("The client | It gets")
row = TABLE.row
GET = b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"


@pytest.fixture(scope="module")
def shared() -> Iterator[Site]:
    """Listeners: `plain`; `hasty` (short timeouts), `narrow` (one place, and one may wait), `counted` (one
    request a second, two connections), `proxied` (a PROXY header is needed), `late` (503 for the stale).
    """
    with ExitStack() as stack:
        backend = stack.enter_context(ScriptedBackend())
        cluster: dict[str, Any] = {"backends": [backend.address], "retries": 0}
        clusters = {
            name: dict(cluster) for name in ("plain", "hasty", "narrow", "counted", "proxied", "late")
        }
        clusters["narrow"] |= {"max_in_flight": 1, "max_waiting": 1}
        listeners: dict[str, dict[str, Any]] = {
            "hasty": {"request_timeout": "500ms", "front_timeout": "500ms", "keepalive_timeout": "300ms"},
            "narrow": {"stale_after": "500ms"},
            "counted": {"limits": {"requests_per_second": 1, "burst": 1, "connections_per_client": 2}},
            "proxied": {"proxy_protocol": "any", "trusted": ["127.0.0.0/8"]},
            "late": {"on_stale": "503", "stale_after": "200ms"},
        }
        yield stack.enter_context(running(TABLE, clusters, backend, listeners))


@pytest.fixture
def site(shared: Site) -> Iterator[Site]:
    yield shared
    shared.script(answer_ok)


def session_ended(site: Site, row: str, listener: str, end: str, before: int) -> None:
    """One more session of the listener has ended so."""
    wait_until(lambda: ended(site, listener, end) == before + 1, 5, f"the session to end with {end}")
    assert end in TABLE.ends[row]


def ended(site: Site, listener: str, end: str) -> int:
    return int(site.gate.listener(listener)["ended"][end])


@row("sends no byte within request_timeout, counted from the kernel's stamp")
def test_silence(site: Site, row: str) -> None:
    with site.client("hasty") as client:
        begun = time.monotonic()
        assert client.rest() == b""
        assert time.monotonic() - begun > 0.45
    session_ended(site, row, "hasty", "request_timeout", 0)


@pytest.mark.parametrize("place", ["first", "second"])
@row("sends no whole head within it, however it trickles")
def test_a_trickled_head(site: Site, row: str, place: str) -> None:
    before = ended(site, "hasty", "request_timeout")
    with site.client("hasty") as client:
        if place == "second":
            assert client.get().status == 200
            assert site.lines(1)[0]["path"] == "/"
        begun = time.monotonic()
        sent = 0
        client.sock.settimeout(0.02)
        for byte in b"GET /slow HTTP/1.1\r\nHost: a.example\r\nX-Slow: " + b"x" * 1000:
            with contextlib.suppress(OSError):
                client.send(bytes([byte]))
                sent += 1
            try:
                client.more()
                break
            except TimeoutError:
                continue
        took = time.monotonic() - begun
        client.sock.settimeout(5)
        answer = client.response()
        assert (answer.status, answer.get("connection")) == (408, "close")
        assert client.ended
        # in the time of one head, though a byte came every 20 ms
        assert 0.45 < took < 3 and sent > 5
    line = site.ended(row, "request_timeout")
    assert (line["status"], line["method"], line["path"], line["request_id"]) == (408, "", "", "")
    assert 5 < line["bytes_in"] <= sent and line["backend"] == ""
    assert b"/slow" not in site.backend.seen
    session_ended(site, row, "hasty", "request_timeout", before)


@row("sends no further request within keepalive_timeout")
def test_an_idle_connection(site: Site, row: str) -> None:
    with site.client("hasty") as client:
        assert client.get().status == 200
        assert client.rest() == b""
    site.lines(1)
    session_ended(site, row, "hasty", "idle", 0)


@row("stops in the middle of a body for front_timeout")
def test_a_stalled_upload(site: Site, row: str) -> None:
    with site.client("hasty") as client:
        client.send(b"POST /u HTTP/1.1\r\nHost: a.example\r\nContent-Length: 10\r\n\r\nabc")
        answer = client.response()
        assert (answer.status, answer.get("connection")) == (408, "close")
        assert client.ended
    site.ended(row, "front_timeout")
    wait_until(lambda: site.backend.wires[-1].sock.fileno() == -1, 5, "the backend connection's end")
    assert site.backend.seen.endswith(b"\r\n\r\nabc")  # and never a whole request

    def half(wire: Wire) -> None:
        read_head(wire)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        wire.rest()

    site.script(half)
    with site.client("hasty") as client:
        client.send(b"POST /u HTTP/1.1\r\nHost: a.example\r\nContent-Length: 10\r\n\r\nabc")
        client.until(b"half")
        assert client.rest() == b""
    assert site.ended(row, "front_timeout")["status"] == 200


@row("does not take the response for front_timeout")
def test_a_response_not_taken(site: Site, row: str) -> None:
    before = ended(site, "hasty", "front_timeout")

    def flood(wire: Wire) -> None:
        read_request(wire)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 200000000\r\n\r\n")
        with contextlib.suppress(OSError):
            while True:
                wire.send(b"x" * 65536)

    site.script(flood)
    with site.client("hasty") as client:
        client.send(GET)
        client.until(b"\r\n\r\n")
        session_ended(site, row, "hasty", "front_timeout", before)
        assert len(client.rest()) < 100_000_000  # and then it is over
    assert site.ended(row, "front_timeout")["bytes_out"] < 100_000_000


@row("closes before its response began (abort_on_close)")
def test_a_client_that_leaves(site: Site, row: str) -> None:
    gone = threading.Event()

    def wait(wire: Wire) -> None:
        read_request(wire)
        with contextlib.suppress(OSError, EOFError):
            wire.more()
        gone.set()

    site.script(wait)
    with site.client() as client:
        client.send(GET)
        wait_until(lambda: site.backend.seen.endswith(b"\r\n\r\n"), 5, "the request")
    assert gone.wait(5)  # the backend is told
    assert site.ended(row, "client_gone")["status"] == 0
    session_ended(site, row, "plain", "client_gone", 0)


@row("resets")
def test_a_client_that_resets(site: Site, row: str) -> None:
    gone = threading.Event()

    def wait(wire: Wire) -> None:
        read_request(wire)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        with contextlib.suppress(OSError, EOFError):
            wire.more()
        gone.set()

    site.script(wait)
    client = site.client()
    client.send(GET)
    client.until(b"half")
    client.reset()
    assert gone.wait(5)
    site.ended(row, "client_reset")
    session_ended(site, row, "plain", "client_reset", 0)


BAD = {
    "header": (b"GET / HTTP/1.1\r\nHost: a\r\nBad Name: x\r\n\r\n", 400),
    "framing": (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx", 400),
    "method": (b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", 405),
    "target_too_long": (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
    "expectation": (b"GET / HTTP/1.1\r\nHost: a\r\nExpect: x\r\n\r\n", 417),
    "misdirected": (b"GET https://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 421),
    "head_too_large": (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 40_000 + b"\r\n\r\n", 431),
    "coding": (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    "version": (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
}


@pytest.mark.parametrize("fault", BAD)
@row("sends what is refused above")
def test_what_is_refused(site: Site, row: str, fault: str) -> None:
    data, status = BAD[fault]
    with site.client() as client:
        client.send(GET)  # a good one first: nothing of it may stick to the bad one
        assert client.response().status == 200
        (good,) = site.lines(1)
        seen = len(site.backend.seen)
        with contextlib.suppress(ConnectionError):
            client.send(data)
        answer = client.response()
        assert (answer.status, answer.get("connection")) == (status, "close")
        assert client.ended
    line = site.ended(row, "bad_request")
    assert (line["end"], line["status"]) == (f"bad_request:{fault}", status)
    assert good["request_id"] and (line["request_id"], line["backend"], line["path"]) == ("", "", "")
    assert len(site.backend.seen) == seen


@row("sends what is refused above")
def test_a_body_that_turns_out_malformed(site: Site, row: str) -> None:
    with site.client() as client:
        client.send(b"POST /b HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        wait_until(lambda: b"abc" in site.backend.seen, 5, "the first chunk")
        client.send(b"nonsense\r\n")
        assert client.response().status == 400
    line = site.ended(row, "bad_request")
    assert (line["method"], line["path"], line["end"]) == ("POST", "/b", "bad_request:body")
    wait_until(lambda: site.backend.wires[-1].sock.fileno() == -1, 5, "the backend connection's end")


@row("waits for a place (max_in_flight) past stale_after, or too many wait")
def test_no_place(site: Site, row: str) -> None:
    go = threading.Event()

    def slow(wire: Wire) -> None:
        read_request(wire)
        go.wait(10)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    site.script(slow)
    with site.client("narrow") as inside, site.client("narrow") as waits, site.client("narrow") as over:
        inside.send(GET)
        wait_until(lambda: site.backend.seen.endswith(b"\r\n\r\n"), 5, "the first to have the place")
        waits.send(GET)
        over.send(GET)
        for client in (over, waits):  # the one at once, or nearly, the other when it has grown stale
            answer = client.response()
            assert (answer.status, answer.get("retry-after")) == (503, "1")
            site.ended(row, "overloaded")
        go.set()
        assert inside.response().status == 200
        assert site.lines(1)[0]["end"] == "done"


@row("is over a limit of `limits`")
def test_over_a_limit(site: Site, row: str) -> None:
    with site.client("counted") as client:
        statuses = [client.get().status for _ in range(6)]  # of which the connection survives
        assert statuses[0] == 200 and 429 in statuses
        refused = [line for line in site.lines(6) if line["end"] != "done"]
        assert [line["end"] for line in refused] == ["limited"] * statuses.count(429)
        with site.client("counted") as second:
            second.get()
            site.lines(1)
            with site.client("counted") as third:
                answer = third.get()
            assert (answer.status, answer.get("connection")) == (429, "close")
            site.ended(row, "limited")


@row("sends no proper PROXY header where one is expected, or is not in `trusted` (fault `not_trusted`)")
def test_no_proxy_header(site: Site, row: str) -> None:
    assert turned_away(site.gate.port("proxied"), GET) == b""
    session_ended(site, row, "proxied", "bad_proxy_header", 0)


@row('has a whole head here, but waited past stale_after for a session (on_stale = "503")')
def test_a_stale_request(site: Site, row: str) -> None:
    (worker,) = site.gate.worker_pids()
    with stopped(worker), site.client("late") as client:
        client.send(GET)
        time.sleep(0.4)
        os.kill(worker, signal.SIGCONT)
        answer = client.response()
    assert (answer.status, answer.get("retry-after"), answer.get("connection")) == (503, "1", "close")
    assert site.ended(row, "stale")["status"] == 503


def test_it_still_serves_and_counts_what_it_logs(site: Site) -> None:
    with site.client() as client:
        assert client.get("/still").body == b"GET /still"
    site.lines(1)
    assert site.gate.status()["workers"][0]["restarts"] == 0
    logged, counted = site.failures()
    assert logged.pop("stale") == 1, "counted as dropped, for it never became a session"
    assert counted == logged
    assert "internal_error" not in counted


def test_every_row_of_the_table_is_tried() -> None:
    assert set(TABLE.ends) == TABLE.tried
