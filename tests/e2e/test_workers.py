"""Several workers: nobody waits while one is free, whatever happens to the others."""

from __future__ import annotations

import os
import signal
import time

import pytest
from harness.backends import Backend
from harness.client import Client, run
from harness.kernel_objects import held_by
from harness.line_client import LineClient
from harness.plan import Attempt, Outcome, Plan, Result, Then
from harness.proc import Tidegate, tcp_config
from harness.processes import Stopped, alive, stat, stopped
from harness.sessions import excess, sessions_by_pid
from harness.waiting import wait_until

MS = 1_000_000
KILLS = 5
# Sessions last about a millisecond here: this many may be with a worker at the moment it is stopped.
IN_SESSION_AT_MOST = 3


def unlucky(result: Result, spans: list[Stopped]) -> list[Attempt]:
    """Who got no answer: only such as a worker had accepted before it stood still.

    Raises:
        AssertionError: one connected when the worker stood still already, or was refused at any other time.
    """
    lost = [attempt for attempt in result.attempts if attempt.outcome is not Outcome.ANSWERED]
    for attempt in lost:
        assert any(
            attempt.before_connect_ns < span.since_ns and attempt.outcome_ns > span.signalled_ns
            for span in spans
        ), attempt
    return lost


@pytest.mark.bpf
@pytest.mark.parametrize("rate", [200, 500])
def test_a_hung_worker_costs_no_client_its_answer(rate: int) -> None:
    with Backend("counting") as backend:
        config = tcp_config([backend.address], workers=2, stale_after="5s", top={"hang_after": "200ms"})
        with Tidegate(config) as gate:
            victim = gate.worker_pids()[0]
            plan = Plan("127.0.0.1", gate.port(), rate=rate, count=int(rate * 4.0), patience_ns=500 * MS)
            with Client(plan) as client:
                client.go()
                time.sleep(0.5)
                with stopped(victim) as span:
                    time.sleep(3.0)
                result = client.result()
            assert len(unlucky(result, [span])) <= IN_SESSION_AT_MOST
            assert gate.worker_pids()[0] == victim, "it only hung: nobody killed it"


@pytest.mark.bpf
def test_whoever_waits_at_a_worker_that_is_killed_is_served_by_the_others() -> None:
    with Backend("counting") as backend:
        config = tcp_config([backend.address], workers=2, stale_after="60s")
        with Tidegate(config) as gate:
            first, second = gate.worker_pids()
            plan = Plan("127.0.0.1", gate.port(), rate=1000, count=60, patience_ns=30_000 * MS)
            with Client(plan) as client, stopped(first, second):
                client.go()
                wait_until(lambda: gate.listener()["waiting"] == 60, 5, "60 to wait")
                os.kill(first, signal.SIGKILL)
                # the other one stands still all the while: the replacement takes both queues
                assert client.result().outcomes() == {"answered": 60}
                assert alive(second)
            wait_until(lambda: gate.listener()["waiting"] == 0, 5, "the counts to come right again")
            dropped = gate.listener()["dropped"]
            assert not any(dropped.values()), dropped


@pytest.mark.bpf
def test_kills_under_load_reset_nobody_who_was_not_accepted() -> None:
    """A worker is stopped, then killed: who connected in between was accepted by none but the others."""
    with Backend("counting") as backend:
        config = tcp_config([backend.address], workers=2, stale_after="60s")
        with Tidegate(config) as gate:
            plan = Plan("127.0.0.1", gate.port(), rate=300, count=300 * KILLS, patience_ns=10_000 * MS)
            spans = []
            with Client(plan) as client:
                client.go()
                for number in range(KILLS):
                    time.sleep(0.4)
                    victim = gate.worker_pids()[number % 2]
                    with stopped(victim) as span:
                        time.sleep(0.1)
                        os.kill(victim, signal.SIGKILL)
                        span.until_ns = time.monotonic_ns()
                    spans.append(span)
                    wait_until(
                        lambda v=victim: all(pid and pid != v for pid in gate.worker_pids()),  # type: ignore[misc]
                        10,
                        "the worker to be replaced",
                    )
                result = client.result()
            assert len(unlucky(result, spans)) <= IN_SESSION_AT_MOST * KILLS
            assert sum(worker["restarts"] for worker in gate.status()["workers"]) == KILLS


@pytest.mark.bpf
@pytest.mark.parametrize("steer", ["p2c", "least_queue"])
@pytest.mark.parametrize("workers", [2, 4])
def test_lasting_sessions_spread_evenly(steer: str, workers: int) -> None:
    with Backend("echo") as backend:
        config = tcp_config([backend.address], workers=workers, top={"steer": steer})
        with Tidegate(config) as gate:
            count = 60 * workers
            lasting = Plan(
                "127.0.0.1",
                gate.port(),
                rate=250,
                count=count,
                then=Then.HOLD,
                hold_ns=2_500 * MS,
                linger_ns=0,
            )
            passing = Plan("127.0.0.1", gate.port(), rate=100, count=100)
            with Client(lasting) as holder, Client(passing) as passer:
                holder.go()
                passer.go()
                assert passer.result().outcomes() == {"answered": 100}
                pids = gate.worker_pids()
                wait_until(
                    lambda: sum(sessions_by_pid(pids, gate.port()).values()) == count, 10, "all of them"
                )
                counts = list(sessions_by_pid(pids, gate.port()).values())
                told = [worker["sessions"] for worker in gate.status()["workers"]]
                assert holder.result().outcomes() == {"answered": count}
            assert excess(counts) <= 0.10, counts
            assert sum(told) == count
            assert excess(told) <= 0.10, told


@pytest.mark.root
def test_workers_have_no_privileges_and_hold_no_program_link_or_cgroup() -> None:
    with Backend("echo") as backend, Tidegate(tcp_config([backend.address], workers=2)) as gate:
        for pid in gate.worker_pids():
            with open(f"/proc/{pid}/status") as lines:
                status = dict(line.rstrip("\n").split(":\t", 1) for line in lines if ":\t" in line)
            assert set(status["Uid"].split()) != {"0"}
            assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == int(status["CapBnd"], 16) == 0
            assert status["NoNewPrivs"] == "1"
            held = held_by([pid])
            assert not held.ids["prog"]
            assert not held.ids["link"]
            for name in os.listdir(f"/proc/{pid}/fd"):
                assert "/sys/fs/cgroup" not in os.readlink(f"/proc/{pid}/fd/{name}")


def test_reloads_under_load_lose_nobody_and_backends_really_change() -> None:
    with Backend("counting") as old, Backend("counting") as new:
        config = tcp_config([old.address], workers=2, stale_after="5s")
        with Tidegate(config) as gate, LineClient(gate.port()) as lasting:
            assert lasting.ask("held") == "held"
            plan = Plan("127.0.0.1", gate.port(), rate=300, count=1200, patience_ns=5_000 * MS)
            with Client(plan) as client:
                client.go()
                for number in range(5):
                    changed = {**config, "cluster": {"back": {"backends": [(new, old)[number % 2].address]}}}
                    gate.write_config(changed)
                    before = len(gate.events("reloaded"))
                    gate.child.signal(signal.SIGHUP)
                    wait_until(lambda b=before: len(gate.events("reloaded")) > b, 5, "the reload")  # type: ignore[misc]
                    time.sleep(0.3)
                result = client.result()
            assert result.outcomes() == {"answered": 1200}
            assert lasting.ask("still") == "still"
            # the last one in force is `new`
            seen = len(old.seen())
            assert run(Plan("127.0.0.1", gate.port(), rate=300, count=30, prefix="z")).outcomes() == {
                "answered": 30
            }
            assert [s.line for s in old.seen()[seen:]] == []
            assert len([s for s in new.seen() if s.line.startswith("z")]) == 30


def test_a_bad_file_leaves_the_old_state_serving_and_says_why() -> None:
    with Backend("counting") as backend, Tidegate(tcp_config([backend.address])) as gate:
        pids = gate.worker_pids()
        good = gate.config_path.read_text()
        bad = {
            "backends = []": good.replace(f'backends = ["{backend.address}"]', "backends = []"),
            "stale_after": good.replace('name = "front"', 'name = "front"\nstale_after = "5 parsecs"'),
            "protocl": good.replace("protocol =", "protocl ="),
            "cluster": good.replace('cluster = "back"', 'cluster = "bock"'),
            "TOML": good + "\n[[[",
            "empty": "",
        }
        for what, text in bad.items():
            gate.config_path.write_text(text)
            before = len(gate.log())
            gate.child.signal(signal.SIGHUP)
            wait_until(
                lambda b=before: "level=error" in gate.log()[b:] or "level=warning" in gate.log()[b:],  # type: ignore[misc]
                5, f"a word about {what}",
            )  # fmt: skip
            assert run(Plan("127.0.0.1", gate.port(), rate=200, count=5)).outcomes() == {"answered": 5}
        assert gate.worker_pids() == pids
        assert all((seen := stat(pid)) and seen.state != "Z" for pid in pids)


@pytest.mark.bpf
def test_upgrades_under_load_lose_nobody() -> None:
    with Backend("counting") as backend:
        config = tcp_config([backend.address], workers=2, stale_after="5s", top={"drain_timeout": "10s"})
        with Tidegate(config) as gate, LineClient(gate.port()) as lasting:
            assert lasting.ask("held") == "held"
            first = gate.supervisor_pid
            plan = Plan("127.0.0.1", gate.port(), rate=300, count=1800, patience_ns=5_000 * MS)
            with Client(plan) as client:
                client.go()
                time.sleep(0.3)
                # it may finish: the old worker that has it drains for as long as it lasts
                assert lasting.ask("still") == "still"
                lasting.sock.close()
                pids = {first, gate.upgrade(), gate.upgrade()}
                result = client.result()
            assert len(pids) == 3
            assert result.outcomes() == {"answered": 1800}
            assert gate.status()["queue_age"]["source"] == "bpf"
            assert len(gate.cgroups()) == 1
