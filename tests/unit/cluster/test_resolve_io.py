from __future__ import annotations

import itertools
import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from unit.cluster.building import address, cluster

from tidegate.cluster import resolve, resolve_helper, resolve_io
from tidegate.cluster.balance import ClusterState
from tidegate.cluster.resolve_io import Resolver
from tidegate.config.model import Backend
from tidegate.loop.reactor import Reactor

MS = 1_000_000


class Zone:
    """A helper that answers from a file, so that the test can change what names resolve to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.set({})

    def set(self, names: dict[str, list[str] | str]) -> None:
        """A list answers with addresses, "silent" does not answer, "die" ends the helper."""
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps(names))
        fresh.rename(self.path)

    def serve(self, channel: socket.socket) -> None:
        with channel.makefile("rb") as lines:
            for line in lines:
                request = json.loads(line)
                found = json.loads(self.path.read_text()).get(request["host"])
                if found == "die":
                    return
                if found == "silent":
                    continue
                reply = {"addresses": found} if found else {"error": "no such name"}
                channel.sendall(json.dumps({"id": request["id"], **reply}).encode() + b"\n")


class Bench:
    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self.reactor = Reactor()
        self.resolver = Resolver(self.reactor, Random(1), serve)

    def cluster(self, *names: str) -> ClusterState:
        some = tuple(Backend(address(name)) for name in names)
        return ClusterState(cluster(backends=some), Random(1), lambda: self.reactor.now)

    def until(self, condition: Callable[[], bool], seconds: float = 10) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            self.reactor.run_once(20 * MS)


@pytest.fixture
def zone(tmp_path: Path) -> Zone:
    return Zone(tmp_path / "zone")


@pytest.fixture
def bench(zone: Zone, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    for name, value in (("REFRESH_NS", 50 * MS), ("RETRY_NS", 20 * MS), ("LOOKUP_TIMEOUT_NS", 300 * MS)):
        monkeypatch.setattr(resolve, name, value)
    monkeypatch.setattr(resolve_io, "_RESTART_NS", 20 * MS)
    made = Bench(zone.serve)
    yield made
    made.resolver.close()
    made.reactor.run_once(0)
    made.reactor.close()


def names(state: ClusterState) -> list[str]:
    return [backend.name for backend in state.backends]


def children() -> set[int]:
    return {int(pid) for pid in Path("/proc/thread-self/children").read_text().split()}


def test_names_are_resolved_and_followed(zone: Zone, bench: Bench) -> None:
    zone.set({"app.test": ["10.0.0.2", "10.0.0.1"], "db.test": ["::1"]})
    state = bench.cluster("app.test:80", "127.0.0.1:90")
    other = bench.cluster("db.test:81", "app.test:82")
    bench.resolver.watch(state)
    bench.resolver.watch(other)
    bench.until(lambda: len(state.backends) == 3 and len(other.backends) == 3)
    assert names(state) == ["10.0.0.1:80", "10.0.0.2:80", "127.0.0.1:90"]
    assert names(other) == ["[::1]:81", "10.0.0.1:82", "10.0.0.2:82"]
    busy = state.backends[0]
    state.acquired(busy)
    zone.set({"app.test": ["10.0.0.2", "10.0.0.3"], "db.test": ["::1"]})
    bench.until(lambda: "10.0.0.3:80" in names(state))
    assert state.draining() == [busy]


def test_a_failed_look_up_keeps_the_last_good_answer(zone: Zone, bench: Bench) -> None:
    zone.set({"app.test": ["10.0.0.1"]})
    state = bench.cluster("app.test:80")
    bench.resolver.watch(state)
    bench.until(lambda: bool(state.backends))
    zone.set({})
    failures: list[str] = []
    tell = bench.resolver._tell
    bench.resolver._tell = lambda answer: (failures.append(answer.error), tell(answer))  # type: ignore
    bench.until(lambda: len(failures) >= 2)
    assert failures[0] == "no such name"
    assert names(state) == ["10.0.0.1:80"]
    zone.set({"app.test": ["10.0.0.9"]})
    bench.until(lambda: names(state) == ["10.0.0.9:80"])


def test_silence_about_one_name_does_not_hold_up_another(zone: Zone, bench: Bench) -> None:
    zone.set({"slow.test": "silent", "app.test": ["10.0.0.1"]})
    state = bench.cluster("slow.test:80", "app.test:80")
    bench.resolver.watch(state)
    bench.until(lambda: names(state) == ["10.0.0.1:80"])
    zone.set({"slow.test": ["10.0.0.5"], "app.test": ["10.0.0.1"]})
    bench.until(lambda: "10.0.0.5:80" in names(state))


def test_a_dead_helper_is_replaced(zone: Zone, bench: Bench) -> None:
    zone.set({"app.test": ["10.0.0.1"]})
    state = bench.cluster("app.test:80")
    bench.resolver.watch(state)
    bench.until(lambda: bool(state.backends))
    first = bench.resolver._pid
    os.kill(first, signal.SIGKILL)
    zone.set({"app.test": ["10.0.0.7"]})
    bench.until(lambda: names(state) == ["10.0.0.7:80"])
    assert bench.resolver._pid != first
    assert first not in children()


def test_questions_a_dead_helper_took_along_are_asked_again(
    zone: Zone, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolve, "LOOKUP_TIMEOUT_NS", 10**15)
    zone.set({"app.test": "silent"})
    state = bench.cluster("app.test:80")
    bench.resolver.watch(state)
    assert bench.resolver.prime(0.1) == {"app.test"}
    zone.set({"app.test": ["10.0.0.7"]})
    os.kill(bench.resolver._pid, signal.SIGKILL)
    bench.until(lambda: names(state) == ["10.0.0.7:80"])


def test_a_helper_that_keeps_dying_is_not_restarted_in_a_loop(zone: Zone, bench: Bench) -> None:
    zone.set({"app.test": "die"})
    started: list[int] = []
    start = bench.resolver._start_helper
    bench.resolver._start_helper = lambda now: (started.append(now), start(now))  # type: ignore[method-assign]
    bench.resolver.watch(bench.cluster("app.test:80"))
    bench.until(lambda: len(started) >= 4)
    gaps = [later - earlier for earlier, later in itertools.pairwise(started)]
    assert all(gap >= (20 << doubled) * MS for doubled, gap in enumerate(gaps))


def test_prime_answers_before_the_loop_runs(zone: Zone, bench: Bench) -> None:
    zone.set({"app.test": ["10.0.0.1"], "slow.test": "silent"})
    state = bench.cluster("app.test:80", "none.test:80")
    bench.resolver.watch(state)
    assert bench.resolver.prime(5) == {"none.test"}
    assert names(state) == ["10.0.0.1:80"]
    bench.resolver.watch(bench.cluster("slow.test:80"))
    before = time.monotonic()
    assert bench.resolver.prime(0.2) == {"none.test", "slow.test"}
    assert time.monotonic() - before < 5


def test_reload_and_unwatch(zone: Zone, bench: Bench) -> None:
    zone.set({"app.test": ["10.0.0.1"], "new.test": ["10.0.0.2"]})
    state = bench.cluster("app.test:80")
    bench.resolver.watch(state)
    bench.until(lambda: bool(state.backends))
    state.reconfigure(cluster(backends=(Backend(address("new.test:80")),)))
    assert state.pick() is None
    bench.until(lambda: names(state) == ["10.0.0.2:80"])
    helper = bench.resolver._pid
    bench.resolver.unwatch(state)
    assert helper not in children()
    assert names(state) == ["10.0.0.2:80"]


def test_clusters_without_names_cost_no_process(bench: Bench) -> None:
    before = children()
    bench.resolver.watch(bench.cluster("127.0.0.1:80"))
    bench.reactor.run_once(0)
    assert bench.resolver.prime(1) == set()
    assert children() == before


def test_the_helper_keeps_nothing_of_its_parent(bench: Bench, zone: Zone) -> None:
    zone.set({"app.test": ["10.0.0.1"]})
    with socket.create_server(("127.0.0.1", 0)):
        state = bench.cluster("app.test:80")
        bench.resolver.watch(state)
        bench.until(lambda: bool(state.backends))
        held = sorted(int(fd) for fd in os.listdir(f"/proc/{bench.resolver._pid}/fd"))
        assert held == [0, 1, 2]
        title = Path(f"/proc/{bench.resolver._pid}/cmdline").read_bytes()
        assert title.startswith(b"tidegate: resolver")


def test_the_helper_ends_with_its_worker(zone: Zone) -> None:
    read, write = os.pipe()
    worker = os.fork()
    if worker == 0:
        try:
            bench = Bench(zone.serve)
            bench.resolver.watch(bench.cluster("app.test:80"))
            bench.resolver.prime(5)
            os.write(write, str(bench.resolver._pid).encode())
            time.sleep(60)
        finally:
            os._exit(1)
    try:
        helper = int(os.read(read, 20))
        watch = os.pidfd_open(helper)
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        os.close(read)
        os.close(write)
    try:
        poller = select.poll()
        poller.register(watch, select.POLLIN)
        assert poller.poll(10_000), "the helper outlived its worker"
    finally:
        os.close(watch)


def test_the_real_helper_asks_the_system(bench: Bench) -> None:
    bench.resolver._serve = resolve_helper.serve
    state = bench.cluster("localhost:80", "does-not-exist.invalid:80")
    bench.resolver.watch(state)
    bench.until(lambda: bool(state.backends))
    expected = {info[4][0] for info in socket.getaddrinfo("localhost", None, type=socket.SOCK_STREAM)}
    assert {backend.address.host for backend in state.backends} <= expected
    answer = resolve_helper.answer({"id": 4, "host": "x" * 70 + ".invalid"})
    assert answer["id"] == 4
    assert answer["error"]
