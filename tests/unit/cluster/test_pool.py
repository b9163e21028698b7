from __future__ import annotations

import select
import socket
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from unit.cluster.building import SECOND, address, cluster

from tidegate.cluster.backend import BackendState
from tidegate.cluster.balance import ClusterState
from tidegate.cluster.pool import ConnectionPool, IdleEnd, readable
from tidegate.config.model import Pool
from tidegate.loop.timers import TimerWheel

START = 1_000 * SECOND


class Bench:
    def __init__(self, max_idle: int = 8, idle_s: int = 4, max_per_backend: int = 0) -> None:
        self.now = START
        self.wheel = TimerWheel(START)
        self.closed: list[str] = []
        self.stale: set[str] = set()
        self.pool: ConnectionPool[str] = ConnectionPool(
            Pool(max_idle, idle_s * SECOND, max_per_backend),
            self.wheel,
            self.closed.append,
            self.stale.__contains__,
        )
        self.a = BackendState(address("127.0.0.1:1"))
        self.b = BackendState(address("127.0.0.1:2"))

    def rest(self, backend: BackendState, name: str) -> bool:
        self.pool.opened(backend)
        return self.pool.checkin(backend, name, self.now)

    def advance(self, seconds: float) -> None:
        self.now += int(seconds * SECOND)
        self.wheel.advance(self.now)


def test_the_newest_is_reused_first_and_only_for_its_backend() -> None:
    bench = Bench()
    for name in ("a1", "a2", "a3"):
        assert bench.rest(bench.a, name)
    assert bench.pool.checkout(bench.b) is None
    assert [bench.pool.checkout(bench.a) for _ in range(4)] == ["a3", "a2", "a1", None]
    assert bench.pool.open == {bench.a: 3}
    assert bench.closed == []


def test_idle_connections_expire_each_in_its_time() -> None:
    bench = Bench(idle_s=4)
    bench.rest(bench.a, "a1")
    bench.advance(2)
    bench.rest(bench.b, "b1")
    bench.advance(1.9)
    assert bench.closed == []
    bench.advance(0.2)
    assert bench.closed == ["a1"]
    bench.advance(1.8)
    assert bench.closed == ["a1"]
    bench.advance(0.2)
    assert bench.closed == ["a1", "b1"]
    assert bench.pool.open == {}
    assert bench.pool.ended[IdleEnd.EXPIRED] == 2
    bench.rest(bench.a, "a2")  # the timer works a second time
    bench.advance(4.1)
    assert bench.closed[-1] == "a2"


def test_reuse_starts_the_idle_time_anew() -> None:
    bench = Bench(idle_s=4)
    bench.rest(bench.a, "a1")
    bench.advance(3)
    assert bench.pool.checkout(bench.a) == "a1"
    bench.pool.checkin(bench.a, "a1", bench.now)
    bench.advance(3)
    assert bench.closed == []
    bench.advance(1.1)
    assert bench.closed == ["a1"]


def test_when_full_the_oldest_goes() -> None:
    bench = Bench(max_idle=2)
    bench.rest(bench.a, "a1")
    bench.rest(bench.b, "b1")
    assert bench.rest(bench.a, "a2")
    assert bench.closed == ["a1"]
    assert bench.pool.ended[IdleEnd.OVERFLOW] == 1
    assert len(bench.pool) == 2


def test_without_room_nothing_is_kept() -> None:
    bench = Bench(max_idle=0)
    assert not bench.rest(bench.a, "a1")
    assert bench.closed == ["a1"]
    assert bench.pool.open == {}


def test_stale_connections_are_passed_over() -> None:
    bench = Bench()
    for name in ("a1", "a2", "a3"):
        bench.rest(bench.a, name)
    bench.stale = bench.stale | {"a3", "a2"}
    bench.pool._stale = bench.stale.__contains__
    assert bench.pool.checkout(bench.a) == "a1"
    assert bench.closed == ["a3", "a2"]
    assert bench.pool.open == {bench.a: 1}
    assert bench.pool.ended[IdleEnd.STALE] == 2


def test_discard_of_a_connection_that_became_readable() -> None:
    bench = Bench()
    bench.rest(bench.a, "a1")
    assert bench.pool.discard("a1")
    assert not bench.pool.discard("a1")
    assert bench.closed == ["a1"]
    bench.advance(10)
    assert bench.pool.checkout(bench.a) is None


def test_max_per_backend_counts_busy_and_idle() -> None:
    bench = Bench(max_per_backend=2)
    bench.rest(bench.a, "a1")
    assert bench.pool.may_open(bench.a)
    bench.pool.opened(bench.a)
    assert not bench.pool.may_open(bench.a)
    assert bench.pool.may_open(bench.b)
    bench.pool.closed(bench.a)
    assert bench.pool.may_open(bench.a)


def test_mistakes_are_refused() -> None:
    bench = Bench()
    with pytest.raises(ValueError, match="no open"):
        bench.pool.closed(bench.a)
    bench.rest(bench.a, "a1")
    with pytest.raises(ValueError, match="idle already"):
        bench.pool.checkin(bench.a, "a1", bench.now)


def test_a_removed_backend_keeps_no_idle_connections() -> None:
    bench = Bench()
    state = ClusterState(cluster(1, 1))
    state.on_change.append(bench.pool.sync)
    stays, goes = state.backends
    bench.rest(stays, "s1")
    bench.rest(goes, "g1")
    bench.pool.opened(goes)
    state.reconfigure(cluster(1))
    assert bench.closed == ["g1"]
    assert not bench.pool.checkin(goes, "g2", bench.now)  # was in use during the reload
    assert bench.closed == ["g1", "g2"]
    assert bench.pool.open == {stays: 1}


def test_new_limits_apply_to_what_is_there() -> None:
    bench = Bench()
    for i in range(6):
        bench.rest(bench.a, f"a{i}")
        bench.advance(0.5)
    bench.pool.reconfigure(Pool(4, 1 * SECOND, 0), bench.now)
    assert bench.closed == ["a0", "a1", "a2", "a3", "a4"]  # two too many, then three older than a second
    bench.advance(0.6)
    assert bench.closed[-1] == "a5"


def test_close_all() -> None:
    bench = Bench()
    bench.rest(bench.a, "a1")
    bench.rest(bench.b, "b1")
    bench.pool.close_all()
    assert sorted(bench.closed) == ["a1", "b1"]
    assert bench.pool.open == {}
    assert bench.wheel.next_due(bench.now) is None


def test_what_readable_says() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
        with client, peer:
            assert not readable(client)
            peer.sendall(b"x")
            select.select([client], [], [], 5)
            assert readable(client)
            client.setblocking(False)
            assert client.recv(1)
            assert not readable(client)
            peer.close()
            select.select([client], [], [], 5)
            assert readable(client)


class PoolModel(RuleBasedStateMachine):
    """Against a plain list of (connection, backend, since) in the order they came to rest."""

    @initialize(max_idle=st.integers(0, 5), idle_s=st.integers(1, 4))
    def begin(self, max_idle: int, idle_s: int) -> None:
        self.bench = Bench(max_idle, idle_s)
        self.idle: list[tuple[str, BackendState, int]] = []
        self.busy: list[tuple[str, BackendState]] = []
        self.expected_closed: list[str] = []
        self.count = 0

    def pick(self, second: bool) -> BackendState:
        return self.bench.b if second else self.bench.a

    def trim(self) -> None:
        config = self.bench.pool.config
        while len(self.idle) > config.max_idle:
            self.expected_closed.append(self.idle.pop(0)[0])

    @rule(second=st.booleans())
    def open(self, second: bool) -> None:
        self.count += 1
        self.bench.pool.opened(self.pick(second))
        self.busy.append((f"c{self.count}", self.pick(second)))

    @precondition(lambda self: self.busy)
    @rule(data=st.data())
    def checkin(self, data: st.DataObject) -> None:
        name, backend = self.busy.pop(data.draw(st.integers(0, len(self.busy) - 1)))
        kept = self.bench.pool.checkin(backend, name, self.bench.now)
        self.idle.append((name, backend, self.bench.now))
        self.trim()
        assert kept is (name in [n for n, _, _ in self.idle])

    @precondition(lambda self: self.busy)
    @rule()
    def close_busy(self) -> None:
        _, backend = self.busy.pop()
        self.bench.pool.closed(backend)

    @rule(second=st.booleans())
    def checkout(self, second: bool) -> None:
        mine = [entry for entry in self.idle if entry[1] is self.pick(second)]
        found = self.bench.pool.checkout(self.pick(second))
        if not mine:
            assert found is None
            return
        assert found == mine[-1][0]
        self.idle.remove(mine[-1])
        self.busy.append((found, self.pick(second)))

    @precondition(lambda self: self.idle)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        entry = self.idle.pop(data.draw(st.integers(0, len(self.idle) - 1)))
        assert self.bench.pool.discard(entry[0])
        self.expected_closed.append(entry[0])

    @rule(seconds=st.sampled_from([0.3, 1.0, 2.5]))
    def wait(self, seconds: float) -> None:
        self.bench.advance(seconds)
        limit = self.bench.now - self.bench.pool.config.idle_timeout_ns
        while self.idle and self.idle[0][2] <= limit:
            self.expected_closed.append(self.idle.pop(0)[0])

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "bench"):
            return
        pool = self.bench.pool
        assert len(pool) == len(self.idle)
        assert self.bench.closed == self.expected_closed
        held = Counter(b for _, b in self.busy) + Counter(b for _, b, _ in self.idle)
        assert pool.open == dict(held)
        for backend in (self.bench.a, self.bench.b):
            assert pool.idle(backend) == sum(b is backend for _, b, _ in self.idle)


TestPoolModel = PoolModel.TestCase
TestPoolModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
