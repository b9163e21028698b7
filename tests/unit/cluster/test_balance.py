from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule
from unit.cluster.building import SECOND, Clock, address, backends, cluster

from tidegate.cluster.backend import BackendState
from tidegate.cluster.balance import PROBE_NS, ClusterEvent, ClusterState
from tidegate.cluster.ejection import BACKOFF_BASE_NS, BACKOFF_MAX_TRIES, MAX_EJECTION_NS, backoff_ns
from tidegate.config.model import Backend, BackendMode, Balance, Eject, Health

EJECT = Eject(failures=3, for_ns=10 * SECOND)
HEALTH = Health("", SECOND, SECOND, 2, 3, ())


class Bench:
    """A cluster, its clock and what it told."""

    def __init__(self, *weights: int, **changes: object) -> None:
        self.clock = Clock()
        self.told: list[tuple[ClusterEvent, BackendState | None]] = []
        self.state = ClusterState(
            cluster(*weights, **changes), Random(1), self.clock, lambda *event: self.told.append(event)
        )

    def picks(self, count: int = 40) -> set[int]:
        found = set()
        for _ in range(count):
            backend = self.state.pick()
            assert backend is not None
            found.add(backend.index)
        return found

    def events(self) -> list[ClusterEvent]:
        return [event for event, _ in self.told]


def test_an_empty_cluster_has_nobody() -> None:
    assert Bench().state.pick() is None


def test_only_a_backend_that_was_not_there_is_told_as_added() -> None:
    known = (Backend(address("127.0.0.1:9000"), 1), Backend(address("app.internal:80"), 1))
    bench = Bench(backends=known)

    def added() -> list[str]:
        found = [str(one.address) for event, one in bench.told if event is ClusterEvent.BACKEND_ADDED and one]
        bench.told.clear()
        return found

    name = known[1].address
    bench.state.set_addresses(name, [address("10.0.0.1:80")])
    assert added() == [], "a worker has begun, nothing else"
    bench.state.set_addresses(name, [address("10.0.0.1:80"), address("10.0.0.2:80")])
    assert added() == ["10.0.0.2:80"]
    for mode in (BackendMode.DRAIN, BackendMode.MAINTENANCE):
        bench.state.reconfigure(cluster(backends=tuple(replace(one, mode=mode) for one in known)))
        assert not bench.state.backends
        bench.state.reconfigure(cluster(backends=known))
        assert added() == [], "back is not new"
    fresh = (Backend(address("127.0.0.1:7000"), 1), Backend(address("other.internal:80"), 1))
    bench.state.reconfigure(cluster(backends=(*known, *fresh)))
    bench.state.set_addresses(fresh[1].address, [address("10.0.0.3:80")])
    assert added() == ["127.0.0.1:7000", "10.0.0.3:80"]


def test_a_failed_connect_rests_the_backend_then_probes_it_one_at_a_time() -> None:
    bench = Bench(1, 1)
    bad, good = bench.state.backends
    bench.state.connect_failed(bad)
    assert bench.picks() == {good.index}
    assert bad.state(bench.clock()) == "failing"
    bench.clock.advance(1.0)
    picked = Counter(bench.state.pick().index for _ in range(100))
    assert picked[bad.index] == 1
    bench.clock.advance(PROBE_NS / SECOND)  # the probe never reported: another one
    assert Counter(bench.state.pick().index for _ in range(100))[bad.index] == 1
    bench.state.succeeded(bad)
    assert bench.picks() == {0, 1}
    assert bench.events() == [ClusterEvent.BACKEND_FAILING, ClusterEvent.BACKEND_RECOVERED]


def test_back_off_grows_is_random_and_is_capped() -> None:
    rng = Random(3)
    for tries in range(1, 20):
        top = BACKOFF_BASE_NS << min(tries - 1, BACKOFF_MAX_TRIES)
        draws = {backoff_ns(tries, rng) for _ in range(50)}
        assert len(draws) > 40
        assert all(top // 2 <= draw <= top for draw in draws)


def test_failed_probes_lengthen_the_back_off() -> None:
    bench = Bench(1, 1)
    bad = bench.state.backends[0]
    rests = []
    for _ in range(12):
        while bench.state.pick() is not bad:
            bench.clock.advance(0.05)
        bench.clock.advance(0.2)
        bench.state.connect_failed(bad)
        rests.append((bad.retry_at_ns - bench.clock()) / SECOND)
    for tries, rest in enumerate(rests):
        top = 2 ** min(tries, BACKOFF_MAX_TRIES)
        assert top / 2 <= rest <= top
    assert bench.picks() == {1}


def test_a_burst_of_failures_together_is_one_step_of_back_off() -> None:
    bench = Bench(1, 1)
    for _ in range(50):
        bench.state.connect_failed(bench.state.backends[0])
    assert bench.state.backends[0].tries == 1
    assert bench.state.backends[0].connect_failures_total == 50


def test_ejection_after_consecutive_failures_only() -> None:
    bench = Bench(1, 1, eject=EJECT)
    bad = bench.state.backends[0]
    for _ in range(5):
        bench.state.failed(bad)
        bench.state.failed(bad)
        bench.state.succeeded(bad)
    assert bench.picks() == {0, 1}
    for _ in range(3):
        bench.state.failed(bad)
    assert bench.picks() == {1}
    assert bad.state(bench.clock()) == "ejected"
    assert bad.ejections_total == 1
    bench.clock.advance(9.9)
    assert bench.picks() == {1}
    bench.clock.advance(0.2)
    assert bench.picks() == {0, 1}


def test_ejections_grow_relapse_at_once_and_are_forgiven() -> None:
    bench = Bench(1, 1, eject=EJECT)
    bad = bench.state.backends[0]
    for _ in range(3):
        bench.state.failed(bad)
    lengths = [bad.ejected_until_ns - bench.clock()]
    for _ in range(40):
        bench.clock.now = bad.ejected_until_ns
        bench.state.failed(bad)  # one failure on probation is enough
        lengths.append(bad.ejected_until_ns - bench.clock())
    assert lengths[:4] == [10 * SECOND, 20 * SECOND, 30 * SECOND, 40 * SECOND]
    assert lengths[-1] == MAX_EJECTION_NS
    bench.clock.now = bad.ejected_until_ns
    bench.state.succeeded(bad)
    bench.clock.advance(3600)
    for _ in range(3):
        bench.state.failed(bad)
    assert bad.ejected_until_ns - bench.clock() == 10 * SECOND


def test_a_longer_configured_ejection_stands() -> None:
    bench = Bench(1, 1, eject=Eject(1, 900 * SECOND))
    bench.state.failed(bench.state.backends[0])
    assert bench.state.backends[0].ejected_until_ns - bench.clock() == 900 * SECOND


@pytest.mark.parametrize(("count", "most"), [(1, 0), (2, 1), (3, 1), (4, 2), (10, 5)])
def test_no_more_than_the_share_is_ejected(count: int, most: int) -> None:
    bench = Bench(*[1] * count, eject=EJECT)
    for backend in bench.state.backends:
        for _ in range(9):
            bench.state.failed(backend)
    assert sum(b.ejected_until_ns > bench.clock() for b in bench.state.backends) == most
    assert len(bench.picks()) == count - most
    assert not bench.state.fail_open


def test_the_last_that_works_is_not_ejected() -> None:
    bench = Bench(1, 1, 1, eject=EJECT)
    down, failing, last = bench.state.backends
    bench.state.set_health(down, False)
    bench.state.connect_failed(failing)
    for _ in range(9):
        bench.state.failed(last)
    assert bench.picks() == {last.index}


def test_what_succeeds_during_an_ejection_does_not_end_it() -> None:
    bench = Bench(1, 1, eject=EJECT)
    for _ in range(3):
        bench.state.failed(bench.state.backends[0])
    bench.state.succeeded(bench.state.backends[0])
    assert bench.picks() == {1}


def test_health_takes_out_and_brings_back_with_a_clean_slate() -> None:
    bench = Bench(1, 1, eject=EJECT)
    backend = bench.state.backends[0]
    for _ in range(4):
        bench.state.failed(backend)
    bench.state.connect_failed(backend)
    bench.state.set_health(backend, False)
    bench.clock.advance(1000)
    assert bench.picks() == {1}
    bench.state.set_health(backend, True)
    assert bench.picks() == {0, 1}
    assert backend.failures == 0


def test_fail_open_prefers_what_the_health_check_calls_up() -> None:
    bench = Bench(1, 1, 1)
    first, second, third = bench.state.backends
    bench.state.set_health(first, False)
    bench.state.connect_failed(second)
    bench.state.connect_failed(third)
    assert bench.picks() == {1, 2}
    assert bench.state.fail_open
    assert bench.state.pick(exclude=(second, third)) is None  # the down one is for when nobody is up
    bench.state.set_health(second, False)
    bench.state.set_health(third, False)
    assert bench.picks() == {0, 1, 2}
    bench.state.set_health(first, True)
    assert bench.picks() == {0}
    assert not bench.state.fail_open
    assert bench.events().count(ClusterEvent.FAIL_OPEN) == 1
    assert bench.events()[-1] is ClusterEvent.FAIL_OPEN_OVER


def test_a_single_dead_backend_is_tried_every_time() -> None:
    bench = Bench(1)
    for _ in range(20):
        assert bench.state.pick() is bench.state.backends[0]
        bench.state.connect_failed(bench.state.backends[0])
        bench.clock.advance(0.3)


def test_counts_that_do_not_pair_are_refused() -> None:
    bench = Bench(1)
    backend = bench.state.backends[0]
    with pytest.raises(ValueError, match="released"):
        bench.state.released(backend)
    with pytest.raises(ValueError, match="connects"):
        bench.state.connect_ended(backend, True)
    bench.state.acquired(backend)
    bench.state.connect_started(backend)
    bench.state.connect_ended(backend, True)
    bench.state.released(backend)
    assert (backend.active, backend.connecting, backend.connections_total) == (0, 0, 1)


# -- reload


def test_reload_keeps_the_state_of_who_stays_and_drains_who_goes() -> None:
    bench = Bench(1, 1, 1, health=HEALTH, eject=EJECT)
    stays, goes, idle = bench.state.backends
    for backend in (stays, goes):
        bench.state.acquired(backend)
    bench.state.set_health(stays, False)
    new = Backend(address("127.0.0.1:9999"), 2)
    changed = (new, Backend(stays.address, 7))
    bench.state.reconfigure(cluster(backends=changed, health=HEALTH, eject=EJECT))
    assert [b.name for b in bench.state.backends] == ["127.0.0.1:9999", stays.name]
    assert bench.state.backends[1] is stays
    assert (stays.index, stays.weight, stays.active, stays.up) == (1, 7, 1, False)
    assert bench.picks() == {0}
    assert bench.state.draining() == [goes]
    assert goes.state(bench.clock()) == "draining"
    assert idle.draining
    assert bench.state.active == 2
    bench.state.released(goes)
    assert bench.state.draining() == []
    assert bench.state.active == 1


def test_a_draining_backend_that_comes_back_is_the_same_one() -> None:
    bench = Bench(1, 1)
    goes = bench.state.backends[1]
    bench.state.acquired(goes)
    bench.state.reconfigure(cluster(1))
    assert bench.picks() == {0}
    bench.state.reconfigure(cluster(1, 1))
    assert bench.state.backends[1] is goes
    assert goes.active == 1
    assert bench.picks() == {0, 1}


def test_reload_can_change_the_policy_and_drop_checks() -> None:
    bench = Bench(1, 1, health=HEALTH, eject=Eject(1, 100 * SECOND))
    bench.state.set_health(bench.state.backends[0], False)
    bench.state.set_health(bench.state.backends[0], True)
    bench.state.failed(bench.state.backends[1])
    bench.state.set_health(bench.state.backends[0], False)
    bench.state.reconfigure(cluster(1, 1, balance=Balance.HASH))
    assert bench.picks() == {0, 1}
    assert len({bench.state.pick(key=b"a") for _ in range(20)}) == 1


# -- host names


def test_a_name_has_a_backend_per_address() -> None:
    name = address("app.internal:9000")
    bench = Bench(backends=(Backend(name, 3), *backends(1)))
    assert bench.state.names() == [name]
    assert bench.picks() == {1}
    bench.state.set_addresses(name, [address("10.0.0.2:9000"), address("10.0.0.1:9000")])
    assert [b.name for b in bench.state.backends] == ["10.0.0.1:9000", "10.0.0.2:9000", "127.0.0.1:9000"]
    assert [b.weight for b in bench.state.backends] == [3, 3, 1]
    assert bench.state.backends[0].origin == name
    kept = bench.state.backends[0]
    left = bench.state.backends[1]
    bench.state.acquired(left)
    bench.state.set_addresses(name, [address("10.0.0.1:9000"), address("10.0.0.3:9000")])
    assert bench.state.backends[0] is kept
    assert bench.state.draining() == [left]
    bench.state.set_addresses(name, [])  # a failed look-up
    assert [b.name for b in bench.state.backends] == ["10.0.0.1:9000", "10.0.0.3:9000", "127.0.0.1:9000"]
    bench.state.reconfigure(cluster(backends=(Backend(name, 1),)))
    assert bench.state.backends[0] is kept
    assert len(bench.state.backends) == 2


# -- everything at once


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order: counts hold, and somebody can be picked."""

    held = Bundle("held")

    @initialize(
        weights=st.lists(st.integers(1, 5), min_size=1, max_size=5),
        balance=st.sampled_from(list(Balance)),
        ejecting=st.booleans(),
    )
    def begin(self, weights: list[int], balance: Balance, ejecting: bool) -> None:
        self.clock = Clock()
        self.eject = EJECT if ejecting else None
        self.balance = balance
        self.state = ClusterState(
            cluster(*weights, balance=balance, eject=self.eject, health=HEALTH), Random(0), self.clock
        )
        self.held_now: Counter[BackendState] = Counter()

    @rule(target=held)
    def acquire(self) -> BackendState:
        backend = self.state.pick(key=b"client")
        assert backend is not None
        assert not backend.draining
        self.state.acquired(backend)
        self.held_now[backend] += 1
        return backend

    @rule(backend=consumes(held))
    def release(self, backend: BackendState) -> None:
        self.state.released(backend)
        self.held_now[backend] -= 1

    @rule(target=held, backend=consumes(held), how=st.sampled_from(["connect_failed", "failed", "succeeded"]))
    def report(self, backend: BackendState, how: str) -> BackendState:
        getattr(self.state, how)(backend)
        return backend

    @rule(index=st.integers(0, 4), up=st.booleans())
    def check(self, index: int, up: bool) -> None:
        self.state.set_health(self.state.backends[index % len(self.state.backends)], up)

    @rule(seconds=st.sampled_from([0.001, 0.5, 1.0, 7.0, 100.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(weights=st.lists(st.integers(1, 5), min_size=1, max_size=5))
    def reload(self, weights: list[int]) -> None:
        self.state.reconfigure(cluster(*weights, balance=self.balance, eject=self.eject, health=HEALTH))

    @rule(target=held)
    def nothing(self) -> object:
        return multiple()

    @invariant()
    def counts_hold(self) -> None:
        if not hasattr(self, "state"):
            return
        everyone = [*self.state.backends, *self.state.draining()]
        for backend in everyone:
            assert backend.active == self.held_now[backend] >= 0
        assert self.state.active == sum(self.held_now.values())
        assert all(backend.active for backend in self.state.draining())

    @invariant()
    def somebody_is_pickable(self) -> None:
        if not hasattr(self, "state"):
            return
        now = self.clock()
        usable = {backend for backend in self.state.backends if backend.usable(now)}
        backend = self.state.pick(now_ns=now)
        assert backend is not None
        assert backend in (usable or set(self.state.backends))
        ejected = sum(b.ejected_until_ns > now for b in self.state.backends)
        if self.eject is None:
            assert not ejected


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_events_are_logged_when_nobody_else_takes_them(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="tidegate.cluster")
    quiet = Bench(1, 1)
    quiet.state.connect_failed(quiet.state.backends[0])
    assert caplog.records == []
    state = ClusterState(cluster(1, 1))
    state.backends[0].last_check = "timeout"
    state.set_health(state.backends[0], False)
    (record,) = caplog.records
    assert (record.levelname, record.getMessage()) == ("WARNING", "backend_down")
    kv = record.kv  # type: ignore[attr-defined]
    assert kv == {"cluster": "app", "backend": state.backends[0].name, "check": "timeout"}
