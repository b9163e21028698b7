"""The metrics endpoint: what Prometheus reads, whatever happens to workers, the supervisor and scrapers."""

from __future__ import annotations

import gzip
import os
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.backends import Backend
from harness.client import run
from harness.line_client import LineClient
from harness.plan import Plan
from harness.ports import free_port
from harness.proc import Tidegate, tcp_config
from harness.processes import alive, child_pids, stopped
from harness.waiting import wait_until
from prometheus_client.parser import text_string_to_metric_families

from tidegate.metrics.names import METRICS, Kind

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Scraper:
    """Reads the endpoint, and holds every counter to never going backwards."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/metrics"
        self.last: Series = {}
        self.scrapes = 0

    def read(self, timeout_s: float = 10.0) -> Series:
        with urllib.request.urlopen(self.url, timeout=timeout_s) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            text = answer.read().decode()
        found: Series = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = tuple(sorted(sample.labels.items()))
                counts = family.type in ("counter", "histogram")
                assert (sample.name, labels) not in found, f"{sample.name} {labels} twice"
                if counts:
                    found[sample.name, labels] = sample.value
                self.current[sample.name, labels] = sample.value
        self.scrapes += 1
        return found

    current: Series = {}

    def check(self, but: tuple[str, ...] = ()) -> None:
        """Raises AssertionError when a counter is smaller than the last time, or gone."""
        now = self.read()
        back = {
            key: (value, now.get(key))
            for key, value in self.last.items()
            if not key[0].startswith(but or ("\0",)) and now.get(key, -1.0) < value
        }
        assert not back, f"went backwards: {back}"
        self.last = now

    def value(self, name: str, **labels: str) -> float:
        self.read()
        return sum(v for (n, ls), v in self.current.items() if n == name and set(labels.items()) <= set(ls))


@pytest.fixture
def port() -> int:
    return free_port("127.0.0.1")


@pytest.fixture
def gate(port: int) -> Iterator[Tidegate]:
    with Backend("echo") as backend:
        config = tcp_config([backend.address], workers=2, top={"metrics": f"127.0.0.1:{port}"})
        with Tidegate(config) as one:
            yield one


def exporter(gate: Tidegate) -> int:
    """Pid of the process that answers."""
    (pid,) = [
        pid
        for pid in child_pids(gate.supervisor_pid)
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"tidegate: metrics")
    ]
    return pid


def load(gate: Tidegate, count: int = 40) -> None:
    assert run(Plan("127.0.0.1", gate.port(), rate=400, count=count)).outcomes() == {"answered": count}


def test_what_is_served_agrees_with_status(gate: Tidegate, port: int) -> None:
    load(gate, 50)
    wait_until(lambda: gate.listener()["ended"]["done"] == 50, 5, "all to end")
    scraper = Scraper(port)
    listener = gate.listener()
    assert scraper.value("tidegate_accepted_total", listener="front") == listener["accepted"] == 50
    assert scraper.value("tidegate_ended_total", listener="front", reason="done") == 50
    assert scraper.value("tidegate_queue_age_seconds_count", listener="front") == 50
    assert scraper.value("tidegate_queue_age_seconds_bucket", listener="front", le="+Inf") == 50
    assert scraper.value("tidegate_sent_bytes_total") == listener["bytes_out"]
    wait_until(lambda: scraper.value("tidegate_workers") == 2, 5, "the count of workers")
    counters = {metric.exposed_name for metric in METRICS if metric.kind is Kind.COUNTER}
    assert counters <= {name for name, _ in scraper.current}, "every counter of the list is there"


def test_counters_never_go_backwards_over_kill_9(gate: Tidegate, port: int) -> None:
    scraper = Scraper(port)
    ending = threading.Event()
    failures: list[BaseException] = []

    def scrape() -> None:
        while not ending.is_set():
            try:
                scraper.check()
            except BaseException as error:
                failures.append(error)
                return

    thread = threading.Thread(target=scrape)
    thread.start()
    for number in range(3):
        load(gate)
        victim = gate.worker_pids()[number % 2]
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda v=victim: all(pid and pid != v for pid in gate.worker_pids()), 10, "another worker")  # type: ignore[misc]
    load(gate)
    ending.set()
    thread.join(10)
    assert not failures, failures
    assert scraper.scrapes > 20
    wait_until(lambda: scraper.value("tidegate_accepted_total") == 160, 5, "everybody to be counted")
    assert scraper.value("tidegate_worker_restarts_total", cause="signaled") == 3


def test_counters_never_go_backwards_over_an_upgrade(gate: Tidegate, port: int) -> None:
    """The loop's counters are of workers, and the successor's are others; all else goes along."""
    scraper = Scraper(port)
    ending = threading.Event()
    failures: list[BaseException] = []

    def scrape() -> None:
        while not ending.is_set():
            try:
                scraper.check(but=("tidegate_loop_", "tidegate_worker_restarts"))
            except BaseException as error:
                failures.append(error)
                return

    load(gate)
    with LineClient(gate.port()) as lasting:
        assert lasting.ask("before") == "before"
        thread = threading.Thread(target=scrape)
        thread.start()
        os.kill(gate.supervisor_pid, signal.SIGUSR2)
        for _ in range(5):
            load(gate)  # before, while and after the hand-over; the predecessor waits for the lasting one
        assert lasting.ask("after") == "after"
    old = gate.supervisor_pid
    wait_until(lambda: not alive(old), 20, "the predecessor to end")
    gate._successor = int(gate.status()["pid"])
    load(gate)
    wait_until(lambda: scraper.scrapes > 50, 10, "some scrapes more")
    ending.set()
    thread.join(10)
    assert not failures, failures
    wait_until(lambda: scraper.value("tidegate_accepted_total") == 281, 5, "everybody to be counted, once")
    assert exporter(gate)


def test_a_stuck_or_dead_exporter_stops_nothing_and_comes_back(gate: Tidegate, port: int) -> None:
    first = exporter(gate)
    with stopped(first), socket.create_connection(("127.0.0.1", port)) as waiting:
        waiting.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        begun = time.monotonic()
        load(gate)
        gate.status()
        assert time.monotonic() - begun < 5
        os.kill(first, signal.SIGKILL)
    wait_until(lambda: not alive(first), 5, "its end")
    scraper = Scraper(port)
    assert scraper.value("tidegate_accepted_total") == 40
    assert exporter(gate) != first
    (died,) = gate.events("metrics_process_died")
    assert (died["pid"], died["again"]) == (str(first), "at once")


@pytest.mark.root
def test_the_exporter_has_no_privileges_and_cannot_write_what_it_reads(gate: Tidegate) -> None:
    pid = exporter(gate)
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["Uid"].split()[0] != "0"
    assert status["NoNewPrivs"] == "1"
    maps = [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "tidegate-metrics" in line]
    assert maps
    assert all(line.split()[1].startswith("r--") for line in maps), maps
    listening = [
        os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")
    ]  # epoll, the one listening socket, its signals' pipe, the counters, stdio
    assert sum(target.startswith("socket:") for target in listening) == 1, listening
    assert not [target for target in listening if "bpf" in target or "cgroup" in target], listening


def ask(port: int, request: bytes, half_close: bool = False) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.sendall(request)
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        parts = []
        while chunk := sock.recv(65536):
            parts.append(chunk)
    return b"".join(parts)


def test_what_else_may_be_asked(gate: Tidegate, port: int) -> None:
    for half_close in (False, True):
        head, _, body = ask(port, b"GET /metrics HTTP/1.0\r\n\r\n", half_close).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK")
        assert f"Content-Length: {len(body)}".encode() in head
    zipped = ask(port, b"GET /metrics?x=1 HTTP/1.1\r\naccept-encoding: br, gzip;q=1.0\r\n\r\n")
    head, _, body = zipped.partition(b"\r\n\r\n")
    assert b"Content-Encoding: gzip" in head
    assert gzip.decompress(body).startswith(b"# HELP tidegate_queue_age_seconds")
    bare = ask(port, b"HEAD /metrics HTTP/1.1\r\nAccept-Encoding: gzip;q=0\r\n\r\n")
    head, _, body = bare.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert b"gzip" not in head
    assert not body
    assert ask(port, b"GET / HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 404")
    assert ask(port, b"POST /metrics HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 405")
    assert ask(port, b"hello\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert ask(port, b"GET /metrics HTTP/1.1\r\nx: " + b"y" * 9000).startswith(b"HTTP/1.1 431")
    assert ask(port, b"GET /met", half_close=True) == b""


def test_slow_scrapers_keep_nobody_waiting(gate: Tidegate, port: int) -> None:
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
    for sock in slow[::2]:
        sock.sendall(b"GET /metrics HT")
    scraper = Scraper(port)
    begun = time.monotonic()
    for _ in range(5):
        scraper.check()
    assert time.monotonic() - begun < 5
    for sock in slow:
        sock.close()


def test_an_address_in_use_is_an_error_at_start(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)):
        config = tcp_config(["127.0.0.1:9"], top={"metrics": f"127.0.0.1:{port}"})
        with pytest.raises(AssertionError, match="tidegate ended with 1") as failure:
            Tidegate(config).__enter__()
    said = "".join(failure.value.__notes__)
    assert f"cannot serve metrics at 127.0.0.1:{port}: Address already in use" in said
    assert "Traceback" not in said
