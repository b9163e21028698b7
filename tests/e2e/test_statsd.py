"""What a StatsD server gets: each addition once, over workers' and the pusher's deaths, upgrades and ends."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Self

import pytest
from harness.backends import Backend
from harness.client import run
from harness.line_client import LineClient
from harness.plan import Plan
from harness.ports import free_port
from harness.proc import Tidegate, tcp_config
from harness.processes import alive, child_pids
from harness.waiting import wait_until


class Server:
    """Adds up what is counted, keeps the gauges."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_DGRAM)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self.sock.bind((host, port))
        self.port = int(self.sock.getsockname()[1])
        self.counts: Counter[str] = Counter()
        self.gauges: dict[str, float] = {}
        self.sizes: list[int] = []
        self.strange: list[str] = []
        self._thread = threading.Thread(target=self._receive)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with socket.socket(self.sock.family, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", self.sock.getsockname()[:2])
        self._thread.join(10)
        self.sock.close()

    def _receive(self) -> None:
        while data := self.sock.recv(65536):
            self.sizes.append(len(data))
            for line in data.decode().split("\n"):
                name, _, rest = line.partition(":")
                number, kind, *tags = rest.split("|")
                name += "".join(tags)
                if kind == "c" and float(number) > 0:
                    self.counts[name] += int(number)
                elif kind == "g" and float(number) >= 0:
                    self.gauges[name] = float(number)
                else:
                    self.strange.append(line)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as one:
        yield one
        assert one.sizes, "nothing came"
        assert max(one.sizes) <= 1432
        assert not one.strange


def config(backend: Backend, port: int, host: str = "127.0.0.1", **top: object) -> dict[str, object]:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return tcp_config(
        [backend.address], workers=2, top={"statsd": address, "statsd_interval": "100ms", **top}
    )


def load(gate: Tidegate, count: int = 40) -> None:
    assert run(Plan("127.0.0.1", gate.port(), rate=400, count=count)).outcomes() == {"answered": count}


def pusher(gate: Tidegate) -> int:
    """Pid of the process that pushes; 0 between two of them."""
    pids = [pid for pid in child_pids(gate.supervisor_pid) if b"tidegate: metrics" in command(pid)]
    return pids[0] if pids else 0


def command(pid: int) -> bytes:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read()


FRONT = "tidegate.listener.front."


def test_each_connection_is_told_once_over_kill_9_of_workers(server: Server) -> None:
    with Backend("echo") as backend, Tidegate(config(backend, server.port)) as gate:
        for number in range(2):
            load(gate)
            victim = gate.worker_pids()[number]
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda v=victim: all(p and p != v for p in gate.worker_pids()), 10, "another")  # type: ignore[misc]
        load(gate)
        wait_until(lambda: gate.listener()["ended"]["done"] == 120, 5, "all to end")
        wait_until(lambda: server.counts[f"{FRONT}ended_total.done"] >= 120, 5, "all to be told")
        time.sleep(0.3)  # and some pushes more: nothing is told again
        wait_until(lambda: server.gauges.get("tidegate.workers") == 2, 5, "both workers")
        assert server.counts[f"{FRONT}accepted_total"] == 120
        assert server.counts[f"{FRONT}sessions_total"] == 120
        assert server.counts[f"{FRONT}ended_total.done"] == 120
        assert server.counts[f"{FRONT}queue_age_ms.count"] == 120
        assert server.counts[f"{FRONT}sent_bytes_total"] == gate.listener()["bytes_out"]
        restarts = sum(server.counts[f"tidegate.worker.{i}.worker_restarts_total.signaled"] for i in (0, 1))
        assert restarts == 2


def test_the_end_pushes_once_more(server: Server) -> None:
    with Backend("echo") as backend, Tidegate(config(backend, server.port, statsd_interval="1h")) as gate:
        load(gate)
        gate.stop()
        wait_until(lambda: server.counts[f"{FRONT}accepted_total"] == 40, 5, "the last push")


def test_the_pushers_death_loses_no_more_than_an_interval_and_doubles_nothing(server: Server) -> None:
    with Backend("echo") as backend, Tidegate(config(backend, server.port)) as gate:
        load(gate)
        wait_until(lambda: server.counts[f"{FRONT}ended_total.done"] == 40, 5, "what was before")
        first = pusher(gate)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: not alive(first), 5, "its end")
        wait_until(lambda: gate.events("metrics_process_died"), 5, "its death to be noticed")
        seen = len(server.sizes)
        wait_until(lambda: len(server.sizes) > seen, 5, "another one's push")
        load(gate)
        wait_until(lambda: server.counts[f"{FRONT}ended_total.done"] == 80, 5, "what was after")
        assert server.counts[f"{FRONT}accepted_total"] == 80


def test_an_upgrade_doubles_nothing(server: Server) -> None:
    with Backend("echo") as backend, Tidegate(config(backend, server.port)) as gate:
        load(gate)
        wait_until(lambda: server.counts[f"{FRONT}ended_total.done"] == 40, 5, "what was before")
        with LineClient(gate.port()) as lasting:
            assert lasting.ask("before") == "before"
            wait_until(lambda: server.counts[f"{FRONT}accepted_total"] == 41, 5, "the lasting one")
            old = gate.supervisor_pid
            os.kill(old, signal.SIGUSR2)
            wait_until(lambda: int(gate.status()["pid"]) != old, 20, "the successor")
            gate._successor = int(gate.status()["pid"])
            wait_until(lambda: pusher(gate), 10, "its pusher")
            seen = len(server.sizes)
            wait_until(lambda: len(server.sizes) > seen, 5, "its push")
            load(gate)
            wait_until(lambda: server.counts[f"{FRONT}accepted_total"] >= 81, 5, "what was after")
        wait_until(lambda: not alive(old), 20, "the predecessor to end")
        wait_until(lambda: server.counts[f"{FRONT}ended_total.done"] >= 81, 10, "the lasting one's end")
        time.sleep(0.3)
        assert server.counts[f"{FRONT}accepted_total"] == 81
        assert server.counts[f"{FRONT}ended_total.done"] == 81


def test_without_a_server_it_goes_on_and_a_late_one_hears() -> None:
    port = free_port("127.0.0.1")
    with Backend("echo") as backend, Tidegate(config(backend, port)) as gate:
        load(gate)
        (told,) = wait_until(lambda: gate.events("statsd_not_sent"), 5, "it to be said")
        assert told["error"] == "Connection refused"
        first = pusher(gate)
        with Server(port=port) as server:
            wait_until(lambda: server.gauges.get("tidegate.workers") == 2, 5, "a late server to hear")
            load(gate)
            wait_until(lambda: server.counts[f"{FRONT}accepted_total"] >= 40, 5, "what came since")
            assert server.counts[f"{FRONT}accepted_total"] <= 80, "nothing is sent twice"
        assert pusher(gate) == first
        assert len(gate.events("statsd_not_sent")) == 1, "every second would be too often"
        assert not gate.events("metrics_process_died")


def test_over_ipv6_with_tags_beside_prometheus() -> None:
    with Server("::1") as server, Backend("echo") as backend:
        top = {"statsd_labels": "tags", "metrics": f"127.0.0.1:{free_port('127.0.0.1')}"}
        with Tidegate(config(backend, server.port, "::1", **top)) as gate:
            load(gate)
            name = "tidegate.accepted_total#listener:front"
            wait_until(lambda: server.counts[name] == 40, 5, "all to be told")
            place = f"#cluster:back,backend:{backend.address}"
            wait_until(lambda: server.counts[f"tidegate.backend_connections_total{place}"] == 40, 5, "all")
