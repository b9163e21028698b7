"""Half-closed clients, draining, reload, slow-loris. Timeouts are rows of the table in test_http_clients."""

# ruff: noqa: SIM117 - a proxy, then its clients: two levels say more than one line

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from harness.http_wire import HttpClient, ScriptedBackend, Wire, read_request
from harness.proc import Tidegate, tcp_config
from harness.processes import stat
from harness.slow_clients import SlowClients
from harness.waiting import wait_until


@contextlib.contextmanager
def proxy(backend: ScriptedBackend, cluster: Any = None, **listener: Any) -> Iterator[Tidegate]:
    config = tcp_config([backend.address], protocol="http", cluster=cluster, **listener)
    with Tidegate(config) as gate:
        yield gate


def test_a_half_closed_client_is_served_where_that_is_allowed() -> None:
    with ScriptedBackend() as backend, proxy(backend, abort_on_close=False) as gate:
        with HttpClient(gate.port()) as client:
            client.send(b"GET /half HTTP/1.1\r\nHost: a.example\r\n\r\n")
            client.sock.shutdown(1)
            assert client.response().body == b"GET /half"
            assert client.ended


def test_draining_ends_idle_connections_and_finishes_requests() -> None:
    go = threading.Event()

    def script(wire: Wire) -> None:
        while True:
            request = read_request(wire)
            if request.target == "/slow":
                go.wait(10)
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    with ScriptedBackend(script) as backend, proxy(backend) as gate:
        with HttpClient(gate.port()) as idle, HttpClient(gate.port()) as busy:
            assert idle.get().status == 200
            busy.send(b"GET /slow HTTP/1.1\r\nHost: a.example\r\n\r\n")
            wait_until(lambda: b"/slow" in backend.seen, 5, "the slow request")
            os.kill(gate.supervisor_pid, signal.SIGTERM)
            assert idle.ended
            go.set()
            response = busy.response()
            assert (response.body, response.get("connection")) == (b"ok", "close")
            assert busy.ended
        assert gate.wait() == 0


def test_a_reload_changes_the_rules_of_a_kept_alive_connection() -> None:
    with ScriptedBackend() as backend:
        config = tcp_config([backend.address], protocol="http")
        with Tidegate(config) as gate, HttpClient(gate.port()) as client:
            assert client.get("/x").status == 200
            config["listener"][0]["route"] = [{"path": {"prefix": "/x"}, "deny": 404}]
            gate.write_config(config)
            gate.call("reload")
            assert client.get("/x").status == 404
            assert client.get("/y").status == 200


def test_slow_loris_clients_hinder_nobody_and_leave_nothing_behind() -> None:
    """Each sends a byte every 100 ms, which does not prolong its time; everybody else is served meanwhile."""
    count, request_timeout_s = 300, 2.0
    with ScriptedBackend() as backend, proxy(backend, request_timeout=f"{request_timeout_s}s") as gate:
        (worker,) = gate.worker_pids()
        memory: list[int] = []

        def round_of_slow_ones() -> None:
            begun = time.monotonic()
            asked = 0
            with SlowClients(gate.port(), count, interval_ms=100) as slow:
                with HttpClient(gate.port()) as kept:
                    while time.monotonic() < begun + request_timeout_s / 2:
                        assert kept.get("/kept").status == 200
                        with HttpClient(gate.port()) as fresh:
                            assert fresh.get("/fresh").status == 200
                        asked += 1
                    counts = slow.counts()
                    assert counts["sent"] > count  # they do trickle
                    wait_until(lambda: not slow.counts()["open"], 10, "the slow ones' end")
                    assert kept.get("/kept").status == 200
                assert slow.counts()["answered_408"] == count
            assert asked > 5
            wait_until(lambda: gate.listener()["sessions"] == 0, 5, "the sessions' end")
            seen = stat(worker)
            assert seen is not None
            memory.append(seen.rss_bytes)

        with HttpClient(gate.port()) as client:
            assert client.get().status == 200
        wait_until(lambda: gate.listener()["sessions"] == 0, 5, "the first session's end")
        files = len(os.listdir(f"/proc/{worker}/fd"))
        for _ in range(3):
            round_of_slow_ones()
        ended = gate.listener()["ended"]
        assert ended["request_timeout"] == 3 * count
        assert ended["internal_error"] == 0
        wait_until(lambda: len(os.listdir(f"/proc/{worker}/fd")) == files, 5, "the descriptors to come back")
        # the first round's sessions made the interpreter's arenas; the later ones live in them
        assert memory[2] - memory[1] < 128 << 10  # bytes: less than half a KiB for each slow one
