"""The worker stands still for two seconds: who is served afterwards, and who is not.

All judgements come from clock readings of the client and the test itself (harness.evidence).
"""

from __future__ import annotations

import time

import pytest
from harness.backends import Backend
from harness.client import Client
from harness.evidence import Verdict, bounds, judge, require_histogram
from harness.plan import GiveUp, Outcome, Plan, Result, Send
from harness.proc import Table, Tidegate, tcp_config
from harness.processes import Stopped, stopped
from harness.waiting import wait_until

MS = 1_000_000
STALE_AFTER_MS = 500
STALL_S = 2.0
RATE = 200
# 0.3 s before, the stall, 0.3 s after
COUNT = int(RATE * (STALL_S + 0.6))


def stall(gate: Tidegate, plan: Plan) -> tuple[Result, Stopped]:
    """Runs the plan; from 0.3 s on, the only worker stands still for STALL_S."""
    (worker,) = gate.worker_pids()
    with Client(plan) as client:
        client.go()
        time.sleep(0.3)
        with stopped(worker) as span:
            time.sleep(STALL_S)
        return client.result(), span


def plan_for(gate: Tidegate, **options: object) -> Plan:
    given: Table = {"rate": RATE, "count": COUNT, **options}
    return Plan("127.0.0.1", gate.port(), **given)


def settled(gate: Tidegate) -> Table:
    """The listener's entry once nobody waits and no session is left."""

    def quiet() -> Table | None:
        listener = gate.listener()
        return listener if not (listener["sessions"] or listener["queued"] or listener["waiting"]) else None

    return wait_until(quiet, 10, "the listener to be quiet")


def enough_evidence(verdict: Verdict) -> None:
    """A verdict about nobody proves nothing: most connections must have been decided beyond doubt."""
    assert len(verdict.must_refuse) > RATE * (STALL_S - STALE_AFTER_MS / 1000) * 0.9
    assert len(verdict.must_serve) > RATE * 0.3


def run_stall(gate: Tidegate, backend: Backend) -> Verdict:
    """The stall with clients that wait for ever; every claim about it is checked, the verdict returned."""
    result, span = stall(gate, plan_for(gate))
    listener = settled(gate)
    served = {seen.line for seen in backend.seen()}
    verdict = judge(result.attempts, span, STALE_AFTER_MS * MS, served)
    verdict.require()
    enough_evidence(verdict)
    refused = [attempt for attempt in result.attempts if attempt.id not in served]
    assert {attempt.outcome for attempt in refused} == {Outcome.RESET}
    assert all(attempt.outcome is Outcome.ANSWERED for attempt in result.attempts if attempt.id in served)
    assert listener["accepted"] == COUNT
    assert listener["dropped"]["stale"] == len(refused)
    assert sum(listener["dropped"].values()) == len(refused)
    ages = listener["age_histogram"]
    require_histogram(
        [bounds(attempt, span) for attempt in result.attempts],
        ages["buckets"],
        ages["count"],
        ages["sum_ns"],
        ages["max_ns"],
    )
    return verdict


def config_for(backend: Backend, **listener: object) -> Table:
    given: Table = {"stale_after": f"{STALE_AFTER_MS}ms", **listener}
    return tcp_config([backend.address], top={"queue_age": "bpf"}, **given)


@pytest.mark.bpf
def test_stale_ones_are_refused_and_fresh_ones_served() -> None:
    with Backend("counting") as backend, Tidegate(config_for(backend)) as gate:
        assert gate.status()["queue_age"]["source"] == "bpf"
        run_stall(gate, backend)


@pytest.mark.bpf
def test_the_same_test_fails_with_the_clock_moved_to_accept() -> None:
    """`queue_age = "accept"` reads every age as of the worker's own accept(), as other proxies do."""
    with (
        Backend("counting") as backend,
        Tidegate(config_for(backend) | {"queue_age": "accept"}) as gate,
        pytest.raises(AssertionError, match="stale connections were served"),
    ):
        run_stall(gate, backend)


@pytest.mark.bpf
def test_dead_requests_of_silent_clients_are_not_passed_on() -> None:
    """They give up after stale_after without a sign: only the age tells that nobody waits any more."""
    with Backend("counting") as backend, Tidegate(config_for(backend)) as gate:
        plan = plan_for(gate, patience_ns=STALE_AFTER_MS * MS, give_up=GiveUp.SILENT)
        result, span = stall(gate, plan)
        entry = settled(gate)
        seen = {request.line for request in backend.seen()}
        stale = [a for a in result.attempts if bounds(a, span).low_ns > STALE_AFTER_MS * MS]
        assert len(stale) > RATE * (STALL_S - STALE_AFTER_MS / 1000) * 0.9
        assert all(attempt.outcome is Outcome.TIMEOUT for attempt in stale)
        assert not [attempt.id for attempt in stale if attempt.id in seen]
        assert {attempt.late for attempt in stale} == {"reset"}
        assert entry["dropped"]["stale"] == COUNT - len(seen)
        assert sum(entry["dropped"].values()) == COUNT - len(seen)


@pytest.mark.bpf
@pytest.mark.parametrize("give_up", [GiveUp.FIN, GiveUp.RESET])
def test_dead_requests_of_clients_that_closed_are_not_passed_on(give_up: GiveUp) -> None:
    """They close before they are stale, after sending their request."""
    with Backend("counting") as backend, Tidegate(config_for(backend, abort_on_close=True)) as gate:
        plan = plan_for(gate, patience_ns=STALE_AFTER_MS * MS // 2, give_up=give_up)
        result, span = stall(gate, plan)
        entry = settled(gate)
        seen = {request.line for request in backend.seen()}
        gave_up = sorted(result.of(Outcome.TIMEOUT), key=lambda attempt: attempt.outcome_ns)
        # One whose connect() began before the stop may have been a session already. The client notes the
        # outcome, then closes: a later note proves that an earlier close is done.
        dead = [a for a in gave_up if a.before_connect_ns >= span.since_ns and a.outcome_ns < span.until_ns]
        dead = dead[:-1]
        assert len(dead) > RATE * (STALL_S - STALE_AFTER_MS / 1000)
        assert not [attempt.id for attempt in dead if attempt.id in seen]
        assert entry["dropped"]["stale"] + entry["dropped"]["client_gone"] == COUNT - len(seen)
        assert entry["dropped"]["client_gone"] > 0


@pytest.mark.bpf
def test_a_stalled_client_that_sent_and_half_closed_is_served() -> None:
    with Backend("counting") as backend, Tidegate(config_for(backend, stale_after="10s")) as gate:
        (worker,) = gate.worker_pids()
        with Client(Plan("127.0.0.1", gate.port(), rate=100, count=20, send=Send.LINE_FIN)) as client:
            with stopped(worker):
                client.go()
                time.sleep(0.5)
            assert client.result().outcomes() == {"answered": 20}


@pytest.mark.parametrize("leave", [GiveUp.FIN, GiveUp.RESET])
@pytest.mark.parametrize("source", [pytest.param("bpf", marks=pytest.mark.bpf), "tcp_info"])
def test_clients_that_leave_without_a_byte_cost_no_backend_connection(source: str, leave: GiveUp) -> None:
    with Backend("counting") as backend:
        config = tcp_config([backend.address], top={"queue_age": source}, stale_after="10s")
        with Tidegate(config) as gate:
            (worker,) = gate.worker_pids()
            plan = Plan(
                "127.0.0.1", gate.port(), rate=200, count=30, send=Send.NOTHING, leave_after_ns=20 * MS,
                give_up=leave,
            )  # fmt: skip
            with Client(plan) as client, stopped(worker):
                assert client.go().result().outcomes() == {"left": 30}
            wait_until(lambda: gate.listener()["accepted"] == 30, 5, "all to be accepted")
            listener = settled(gate)
            assert listener["dropped"]["client_gone"] == 30
            assert backend.stats()["accepted"] == 0


@pytest.mark.bpf
def test_waiting_connections_are_counted_while_the_worker_stands_still() -> None:
    """`status` comes from the supervisor and the kernel: it answers, and counts, with no worker running."""
    with Backend("counting") as backend, Tidegate(config_for(backend, stale_after="20s")) as gate:
        (worker,) = gate.worker_pids()
        with Client(Plan("127.0.0.1", gate.port(), rate=500, count=50)) as client:
            with stopped(worker):
                client.go()
                wait_until(lambda: gate.listener()["waiting"] == 50, 5, "50 to wait")
            assert client.result().outcomes() == {"answered": 50}
        assert settled(gate)["waiting"] == 0
