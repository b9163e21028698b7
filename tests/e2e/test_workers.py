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
from harness.processes import Stopped, alive, stopped
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


def bad_files(good: str, address: str, backend: str) -> dict[str, tuple[str | bytes | None, str]]:
    """Twenty and more ways to spoil `good`, each with a word that the message must have."""
    in_listener = 'name = "front"'
    in_cluster = f'backends = ["{backend}"]'
    return {
        "no file": (None, "No such file"),
        "empty": ("", "listener"),
        "not TOML": (good + "\n[[[", "TOML"),
        "not text": (b"\xff\xfe\x00", "UTF-8"),
        "unfinished string": (good.replace('"tcp"', '"tcp'), "TOML"),
        "key twice": (good.replace("workers = 2", "workers = 2\nworkers = 3"), "twice"),
        "unknown key": ("wrokers = 2\n" + good, "workers"),
        "unknown key of a listener": (good.replace("protocol =", "protocl ="), "protocol"),
        "unknown key of a cluster": (good.replace(in_cluster, in_cluster + "\nretry = 1"), "retries"),
        "wrong type": (good.replace("workers = 2", 'workers = "two"'), "workers"),
        "out of range": (good.replace("workers = 2", "workers = -1"), "workers"),
        "no unit": (good.replace(in_listener, in_listener + "\nstale_after = 5"), "stale_after"),
        "unknown unit": (
            good.replace(in_listener, in_listener + '\nstale_after = "5 parsecs"'),
            "stale_after",
        ),
        "unknown size": (
            good.replace(in_listener, in_listener + '\nsplice_after = "5 bananas"'),
            "splice_after",
        ),
        "unknown choice": (good.replace(in_listener, in_listener + '\nwhen_full = "cry"'), "queue"),
        "no port": (good.replace(address, "127.0.0.1"), "port"),
        "impossible port": (good.replace(address, "127.0.0.1:99999"), "port"),
        "somebody else's port": (good.replace(address, backend), "in use"),
        "somebody else's address": (good.replace(address, "192.0.2.1:8080"), "not on this host"),
        "no such cluster": (good.replace('cluster = "back"', 'cluster = "bock"'), "back"),
        "no backend": (good.replace(in_cluster, "backends = []"), "backend"),
        "bad backend": (good.replace(backend, "127.0.0.1:http"), "127.0.0.1:http"),
        "contradiction": ('hang_after = "2m"\n' + good, "kill_hung_after"),
    }


def test_bad_files_leave_the_old_state_serving_and_say_why() -> None:
    with Backend("counting") as backend, Tidegate(tcp_config([backend.address], workers=2)) as gate:
        pids = gate.worker_pids()
        good = gate.config_path.read_text()
        files = bad_files(good, gate.address(), backend.address)
        assert len(files) >= 20
        for number, (what, (content, word)) in enumerate(files.items()):
            assert content != good, f"{what}: the spoiling had no effect"
            if content is None:
                gate.config_path.unlink()
            else:
                gate.config_path.write_bytes(content if isinstance(content, bytes) else content.encode())
            gate.child.signal(signal.SIGHUP)
            refused = wait_until(
                lambda n=number: gate.events("reload_refused")[n:],  # type: ignore[misc]
                5,
                f"a word about {what}",
            )
            assert word.lower() in refused[0]["reason"].lower(), (what, refused)
            with LineClient(gate.port()) as client:
                assert client.ask(f"q{number}") == f"q{number}"
        assert gate.events("reloaded") == []
        assert gate.worker_pids() == pids
        # and a good one is taken again
        gate.config_path.write_text(good.replace('name = "front"', 'name = "front"\nstale_after = "7s"'))
        gate.child.signal(signal.SIGHUP)
        wait_until(lambda: gate.listener()["stale_after_ms"] == 7000, 5, "the new stale_after")
        assert gate.worker_pids() == pids


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
