"""Routes, limits, PROXY headers, logs, sticky cookies, health, names, places: in a running proxy."""

# ruff: noqa: SIM117 - a proxy, then its clients: two levels say more than one line

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.http_wire import (
    HttpClient,
    ScriptedBackend,
    Wire,
    answer_ok,
    read_head,
    read_request,
    turned_away,
)
from harness.line_client import LineClient
from harness.ports import free_port
from harness.proc import Tidegate, tcp_config
from harness.waiting import wait_until

from tidegate.http.proxyproto import encode_v1, encode_v2

TRUST = ["127.0.0.0/8"]
PLAIN = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
SOURCE, DESTINATION = ("203.0.113.9", 4711), ("198.51.100.1", 443)


@contextlib.contextmanager
def proxy(
    backends: list[str], cluster: Any = None, protocol: str = "http", **listener: Any
) -> Iterator[Tidegate]:
    config = tcp_config(backends, protocol=protocol, cluster=cluster, **listener)
    with Tidegate(config) as gate:
        yield gate


def named(name: str) -> ScriptedBackend:
    """Answers with its name."""

    def script(wire: Wire) -> None:
        while True:
            read_request(wire)
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(name), name.encode()))

    return ScriptedBackend(script)


def test_routes_lead_to_clusters_redirects_and_answers() -> None:
    with named("app") as app, named("api") as api:
        config = tcp_config([app.address], protocol="http")
        config["cluster"]["api"] = {"backends": [api.address]}
        config["listener"][0]["route"] = [
            {
                "path": {"prefix": "/api"},
                "cluster": "api",
                "strip_prefix": True,
                "rewrite_host": "inner",
                "request_headers": {"set": {"X-Env": "prod"}, "remove": ["Cookie"]},
                "response_headers": {"set": {"X-Via-Route": "1"}},
            },
            {"host": "*.old.example", "redirect": {"to": "https://new.example", "status": 308}},
            {"path": {"exact": "/secret"}, "deny": 403},
            {"path": {"exact": "/ping"}, "answer": {"status": 200, "body": "pong"}},
        ]
        with Tidegate(config) as gate, HttpClient(gate.port()) as client:
            response = client.get("/api/v1?q=1", "Cookie: a=b")
            assert response.body == b"api" and response.get("x-via-route") == "1"
            head = api.wires[0].received.decode()
            assert head.startswith("GET /v1?q=1 HTTP/1.1\r\nHost: inner\r\n")
            assert "X-Env: prod" in head and "Cookie" not in head
            assert client.get("/other").body == b"app"
            moved = client.ask(b"GET /p?q=2 HTTP/1.1\r\nHost: a.old.example\r\n\r\n")
            assert (moved.status, moved.get("location")) == (308, "https://new.example/p?q=2")
            assert client.get("/secret").status == 403
            assert client.get("/ping").body == b"pong"
            assert client.get("/ping", method="HEAD").body == b""
            posted = client.ask(b"POST /secret HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc")
            assert posted.status == 403 and posted.get("connection") is None
            assert client.get("/secret/%2e%2e/x").status in (200, 400)


def test_own_answers_from_files() -> None:
    with tempfile.TemporaryDirectory() as directory:
        page = Path(directory) / "502.html"
        page.write_text("<h1>soon</h1>")
        answers = {"502": str(page)}
        if os.geteuid() == 0:  # workers run as somebody who cannot look into it: said, and served without
            with proxy(["127.0.0.1:1"], cluster={"retries": 0}, answers=answers) as gate:
                with HttpClient(gate.port()) as client:
                    assert client.get().body == b"502 Bad Gateway\n"
                assert gate.events("answer_file_unreadable")
        os.chmod(directory, 0o755)
        with proxy(["127.0.0.1:1"], cluster={"retries": 0}, answers=answers) as gate:
            with HttpClient(gate.port()) as client:
                response = client.get()
                assert (response.status, response.body) == (502, b"<h1>soon</h1>")
                assert (response.get("content-type") or "").startswith("text/html")


def test_requests_per_second_and_client() -> None:
    limits = {"requests_per_second": 1, "burst": 3}
    with ScriptedBackend() as backend, proxy([backend.address], limits=limits) as gate:
        with HttpClient(gate.port()) as client:
            responses = [client.get() for _ in range(6)]
            assert [response.status for response in responses[:3]] == [200] * 3
            assert 429 in [response.status for response in responses]
            refused = next(response for response in responses if response.status == 429)
            assert int(refused.get("retry-after") or 0) >= 1
        with HttpClient(gate.port(), source="127.0.0.7") as other:
            assert other.get().status == 200


@pytest.mark.parametrize("protocol", ["http", "tcp"])
def test_connections_per_client(protocol: str) -> None:
    limits = {"connections_per_client": 2}
    with ScriptedBackend() as backend, proxy([backend.address], protocol=protocol, limits=limits) as gate:
        first, second = HttpClient(gate.port()), HttpClient(gate.port())
        assert first.get().status == second.get().status == 200
        if protocol == "http":
            with HttpClient(gate.port()) as third:
                assert third.get().status == 429
                assert third.ended
        else:
            assert turned_away(gate.port()) == b""
        with HttpClient(gate.port(), source="127.0.0.7") as other:
            assert other.get().status == 200
        first.close()
        second.close()

        def free_again() -> bool:
            with contextlib.suppress(OSError, EOFError), HttpClient(gate.port()) as client:
                return client.get().status == 200
            return False

        wait_until(free_again, 5, "the places to be free again")


@pytest.mark.parametrize("version", ["v1", "v2", "any"])
def test_a_proxy_header_says_who_the_client_is(version: str) -> None:
    seen = []

    def script(wire: Wire) -> None:
        while True:
            seen.append(read_request(wire))
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    header = (encode_v1 if version == "v1" else encode_v2)(SOURCE, DESTINATION)
    with ScriptedBackend(script) as backend:
        with proxy([backend.address], proxy_protocol=version, trusted=TRUST) as gate:
            with HttpClient(gate.port()) as client:  # together with the first request
                client.send(header)
                assert client.get().status == 200
                assert client.get().status == 200
            assert [request.get("x-forwarded-for") for request in seen] == [SOURCE[0]] * 2
            assert seen[0].get("x-forwarded-port") == "443"
            with HttpClient(gate.port()) as client:  # byte by byte
                for byte in header:
                    client.send(bytes([byte]))
                assert client.get().status == 200
            assert turned_away(gate.port(), PLAIN) == b""
        assert len(seen) == 3
        assert len(seen) == 3


@pytest.mark.parametrize("protocol", ["http", "tcp"])
def test_a_peer_that_may_not_send_a_proxy_header_is_told_to_the_operator(protocol: str) -> None:
    others = {"proxy_protocol": "v1", "trusted": ["192.0.2.0/24"]}
    with ScriptedBackend() as backend, proxy([backend.address], protocol=protocol, **others) as gate:
        assert turned_away(gate.port(), encode_v1(SOURCE, DESTINATION) + PLAIN) == b""
        wait_until(lambda: gate.listener()["ended"]["bad_proxy_header"] == 1, 5, "the end to be counted")
        refused = gate.call("errors")
        assert refused["total"] == 1
        (one,) = refused["errors"]
        assert (one["fault"], one["message"], one["position"]) == ("not_trusted", "peer not in trusted", -1)
        assert one["client"].startswith("127.0.0.1:")
        (ended,) = gate.events("session_ended")
        assert (ended["reason"], ended["fault"]) == ("bad_proxy_header", "not_trusted")


@pytest.mark.parametrize("protocol", ["http", "tcp"])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_proxy_header_goes_on_to_the_backend(protocol: str, version: str) -> None:
    heads = []

    def script(wire: Wire) -> None:
        heads.append(wire.until(b"\r\n") if version == "v1" else wire.exactly(28))
        answer_ok(wire)

    received = encode_v2(SOURCE, DESTINATION)
    with (
        ScriptedBackend(script) as backend,
        proxy(
            [backend.address],
            protocol=protocol,
            cluster={"send_proxy": version},
            proxy_protocol="v2",
            trusted=TRUST,
        ) as gate,
        HttpClient(gate.port()) as client,
    ):
        client.send(received)
        assert client.get("/a").body == b"GET /a"
        assert client.get("/b").body == b"GET /b"
    assert set(heads) == {(encode_v1 if version == "v1" else encode_v2)(SOURCE, DESTINATION)}


def test_the_access_log_tells_of_every_request_and_reopens() -> None:
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        path = Path(directory) / "access.log"
        log = {"path": str(path), "format": "json"}
        routes = [{"path": {"exact": "/own"}, "deny": 404}]
        with ScriptedBackend() as backend, proxy([backend.address], access_log=log, route=routes) as gate:
            with HttpClient(gate.port()) as client:
                client.get("/one", "X-Request-Id: my-id")
                client.get("/two")
                assert client.get("/own").status == 404
                client.ask(b"GET / HTTP/1.1\r\nHost: a\r\nBad Name: x\r\n\r\n")
            wait_until(lambda: path.exists() and path.read_text().count("\n") == 4, 5, "four lines")
            one, two, own, bad = [json.loads(line) for line in path.read_text().splitlines()]
            assert (own["status"], own["path"], own["backend"], own["request_id"]) == (404, "/own", "", "")
            assert (one["method"], one["path"], one["status"], one["end"]) == ("GET", "/one", 200, "done")
            assert one["request_id"] == "my-id" and one["backend"] == backend.address
            assert one["client"] == "127.0.0.1" and one["queue_age_us"] is not None
            assert (one["reused"], two["reused"]) == (False, True)
            assert two["queue_age_us"] is None and two["first_byte_us"] <= two["total_us"]
            assert (bad["status"], bad["end"]) == (400, "bad_request:header")
            assert one["connect_us"] > 0 and two["connect_us"] is None
            assert one["connect_us"] + one["first_byte_us"] <= 2 * one["total_us"]
            assert own["total_us"] > 0 and own["first_byte_us"] is None
            assert bad["total_us"] > 0
            path.rename(path.with_suffix(".1"))
            os.kill(gate.supervisor_pid, signal.SIGUSR1)
            wait_until(path.exists, 5, "the new file")
            with HttpClient(gate.port()) as client:
                client.get("/three")
            wait_until(lambda: "/three" in path.read_text(), 5, "its line in the new file")


def test_a_request_that_never_becomes_whole_is_timed_from_its_beginning() -> None:
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        path = Path(directory) / "access.log"
        listener = {"access_log": {"path": str(path), "format": "json"}, "request_timeout": "400ms"}
        with ScriptedBackend() as backend, proxy([backend.address], **listener) as gate:
            with HttpClient(gate.port()) as first:
                first.send(b"GET / HTTP/1.1\r\n")
                assert first.response().status == 408
            with HttpClient(gate.port()) as later:
                assert later.get().status == 200
                time.sleep(1.0)  # idle: no part of the request that comes
                begun = time.monotonic()
                later.send(b"GET / HTTP/1.1\r\n")
                assert later.response().status == 408
            wait_until(lambda: path.exists() and path.read_text().count("\n") == 3, 5, "three lines")
            elapsed_us = (time.monotonic() - begun) * 1e6
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            one, two = [line["total_us"] for line in lines if line["status"] == 408]
            assert one > 350_000 and 400_000 <= two <= elapsed_us


def test_the_access_log_counts_the_bytes_of_each_request_and_response() -> None:
    """Heads and bodies as they came, however the kernel cut them: each byte belongs to one request."""
    requests = [
        b"GET /1 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
        b"POST /3 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3;x\r\nabc\r\n0\r\n\r\n",
        b"PUT /4 HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100_000,
        b"BAD\r\n\r\n",
    ]
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        path = Path(directory) / "access.log"
        log = {"path": str(path), "format": "json"}
        listener = {"access_log": log, "proxy_protocol": "v1", "trusted": TRUST}
        with ScriptedBackend() as backend, proxy([backend.address], **listener) as gate:
            with HttpClient(gate.port()) as client:
                client.send(encode_v1(SOURCE, DESTINATION) + b"".join(requests))
                answers = client.rest()
            wait_until(lambda: path.exists() and path.read_text().count("\n") == 5, 5, "five lines")
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            assert [line["bytes_in"] for line in lines] == [len(request) for request in requests]
            assert sum(line["bytes_out"] for line in lines) == len(answers)
            assert gate.listener()["bytes_in"] == sum(map(len, requests))


def test_a_sticky_cookie_keeps_a_client_on_its_backend() -> None:
    with named("a") as a, named("b") as b:
        cluster = {"sticky": {"cookie": "GATE"}, "balance": "round_robin"}
        with proxy([a.address, b.address], cluster=cluster) as gate, HttpClient(gate.port()) as client:
            first = client.get()
            cookie = (first.get("set-cookie") or "").split(";")[0]
            assert cookie.startswith("GATE=")
            for _ in range(6):
                again = client.get("/", f"Cookie: x=y; {cookie}")
                assert again.body == first.body and again.get("set-cookie") is None
            assert {client.get().body for _ in range(4)} == {b"a", b"b"}
            used = a if first.body == b"a" else b
            assert b"GATE" not in used.seen and b"x=y" in used.seen


def test_hash_keeps_a_client_on_its_backend() -> None:
    with named("a") as a, named("b") as b:
        with proxy([a.address, b.address], cluster={"balance": "hash"}) as gate:
            answers = set()
            for host in range(2, 30):
                bodies = set()
                for _ in range(3):
                    with HttpClient(gate.port(), source=f"127.0.0.{host}") as client:
                        bodies.add(client.get().body)
                assert len(bodies) == 1
                answers |= bodies
            assert answers == {b"a", b"b"}


def test_a_backend_that_fails_its_check_gets_nothing() -> None:
    healthy = True

    def checked(wire: Wire) -> None:
        while True:
            request = read_request(wire)
            body = b"sick" if request.target != "/health" else b""
            status = b"200 OK" if healthy or request.target != "/health" else b"500 Down"
            wire.send(b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))

    health = {"path": "/health", "interval": "100ms", "timeout": "1s", "rise": 1, "fall": 1}
    with ScriptedBackend(checked) as sick, named("well") as well:
        with proxy([sick.address, well.address], cluster={"health": health}) as gate:
            with HttpClient(gate.port()) as client:
                wait_until(lambda: client.get().body == b"sick", 5, "both to serve")
                healthy = False
                wait_until(lambda: gate.events("backend_down"), 5, "the check to fail")
                assert {client.get().body for _ in range(10)} == {b"well"}
                healthy = True
                wait_until(lambda: client.get().body == b"sick", 5, "it to come back")


@pytest.mark.parametrize("protocol", ["http", "tcp"])
def test_a_backend_given_by_name(protocol: str) -> None:
    with ScriptedBackend() as backend:
        with proxy([f"localhost:{backend.port}"], protocol=protocol, cluster={"retries": 3}) as gate:
            with HttpClient(gate.port()) as client:
                assert client.get("/named").body == b"GET /named"


def readable(clients: list[HttpClient], timeout_s: float = 0) -> list[HttpClient]:
    ready, _, _ = select.select([client.sock for client in clients], [], [], timeout_s)
    return [client for client in clients if client.sock in ready]


def test_places_at_a_cluster_are_handed_on_and_waiting_ends() -> None:
    go = threading.Event()
    inside = []

    def script(wire: Wire) -> None:
        while True:
            request = read_request(wire)
            inside.append(request.target)
            go.wait(10)
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    cluster = {"max_in_flight": 2, "max_waiting": 2}
    with ScriptedBackend(script) as backend:
        with proxy([backend.address], cluster, stale_after="5s") as gate, contextlib.ExitStack() as stack:
            clients = [stack.enter_context(HttpClient(gate.port())) for _ in range(6)]
            for client in clients:
                client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            wait_until(lambda: len(readable(clients)) == 2, 5, "two too many to be refused")
            for client in readable(clients):
                response = client.response()
                assert (response.status, response.get("retry-after")) == (503, "1")
                clients.remove(client)
            wait_until(lambda: len(inside) == 2, 5, "two to be served")
            go.set()
            assert [client.response().status for client in clients] == [200] * 4
            assert len(inside) == 4
        go.clear()
        with proxy([backend.address], cluster, stale_after="300ms") as gate, contextlib.ExitStack() as stack:
            clients = [stack.enter_context(HttpClient(gate.port())) for _ in range(3)]
            for client in clients:
                client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            (refused,) = readable(clients, 5)
            assert refused.response().status == 503  # its own age ended the wait
            go.set()


def test_stale_first_requests_get_503_where_that_is_wanted() -> None:
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        os.chmod(directory, 0o755)
        path = Path(directory) / "access.log"
        log = {"path": str(path), "format": "json"}
        listener = {"on_stale": "503", "stale_after": "200ms", "access_log": log}
        backend = stack.enter_context(ScriptedBackend())
        at = f"127.0.0.1:{free_port()}"
        config = tcp_config([backend.address], protocol="http", top={"metrics": at}, **listener)
        gate = stack.enter_context(Tidegate(config))
        (worker,) = gate.worker_pids()
        os.kill(worker, signal.SIGSTOP)
        try:
            asking, silent = HttpClient(gate.port()), HttpClient(gate.port())
            asking.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            time.sleep(0.5)
        finally:
            os.kill(worker, signal.SIGCONT)
        response = asking.response()
        assert (response.status, response.get("retry-after"), response.get("connection")) == (
            503,
            "1",
            "close",
        )
        assert silent.rest() == b""
        wait_until(lambda: path.exists() and path.read_text().count("\n") == 1, 5, "its line")
        line = json.loads(path.read_text())
        assert (line["status"], line["end"], line["method"], line["path"]) == (503, "stale", "GET", "/")
        assert (line["client"], line["host"], line["backend"]) == ("127.0.0.1", "a", "")
        assert line["bytes_in"] == len(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert line["bytes_out"] > 50
        assert line["queue_age_us"] >= 200_000
        counted = gate.listener()
        assert counted["dropped"]["stale"] == 2
        with urllib.request.urlopen(f"http://{at}/metrics", timeout=10) as page:
            shown = page.read().decode()
        assert 'tidegate_own_answers_total{listener="front"} 1\n' in shown
        assert 'tidegate_requests_total{listener="front",status="server_error"} 1\n' in shown
        assert 'tidegate_request_duration_seconds_count{listener="front"} 1\n' in shown
        asking.close()
        silent.close()
        assert backend.seen == b""
        with HttpClient(gate.port()) as client:
            assert client.get().status == 200


def test_x_request_start_tells_the_time_in_the_kernels_queue() -> None:
    with (
        ScriptedBackend() as backend,
        proxy([backend.address], stale_after="5s", queue_age_header=True) as gate,
    ):
        (worker,) = gate.worker_pids()
        os.kill(worker, signal.SIGSTOP)
        try:
            before = time.time()
            client = HttpClient(gate.port())
            after = time.time()
            client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            time.sleep(0.4)
        finally:
            os.kill(worker, signal.SIGCONT)
        assert client.response().status == 200
        head = read_head_of(backend)
        started = int((head.get("x-request-start") or "")[2:]) / 1e6
        assert before - 0.02 <= started <= after + 0.02
        assert 390 <= int(head.get("x-queue-age-ms") or 0) < 5000
        client.close()


def read_head_of(backend: ScriptedBackend) -> Any:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(backend.seen)
        return read_head(Wire(ours))


def test_tcp_clients_behind_a_proxy_header() -> None:
    def lines(wire: Wire) -> None:
        while line := wire.until(b"\n"):
            wire.send(line.upper())

    with ScriptedBackend(lines) as backend:
        with proxy([backend.address], protocol="tcp", proxy_protocol="any", trusted=TRUST) as gate:
            with LineClient(gate.port()) as client:
                client.sock.sendall(encode_v1(SOURCE, DESTINATION) + b"first\n")
                assert client.hear() == "FIRST"
                assert client.ask("more") == "MORE"
            with pytest.raises((EOFError, ConnectionError)), LineClient(gate.port()) as client:
                client.ask("GET /")
