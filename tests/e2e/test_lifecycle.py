"""Starting, ending and dying: what is left, who is cut, what is said."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from harness.backends import Backend
from harness.client import Client, run
from harness.evidence import judge
from harness.line_client import LineClient
from harness.plan import Plan
from harness.ports import listening
from harness.proc import Tidegate, run_tidegate, tcp_config
from harness.processes import alive, stopped
from harness.waiting import wait_until

MS = 1_000_000


@pytest.mark.bpf
def test_it_holds_bpf_objects_while_it_runs_and_none_after_sigterm() -> None:
    with Backend("echo") as backend, Tidegate(tcp_config([backend.address])) as gate:
        held = gate.objects_held()
        assert held.ids["prog"]
        assert held.ids["map"]
        assert held.ids["link"]
        assert str(held.remaining()) == str(held)
        (cgroup,) = gate.cgroups()
        assert cgroup.stat().st_mode & 0o777 == 0o700
        assert str(gate.supervisor_pid) in (cgroup / "cgroup.procs").read_text().split()
        assert gate.stop() == 0
        gate.assert_nothing_left()


@pytest.mark.bpf
def test_kill_9_of_everything_leaves_nothing_attached_and_the_next_start_sweeps_the_cgroup() -> None:
    with Backend("echo") as backend:
        config = tcp_config([backend.address], workers=2)
        with Tidegate(config) as gate:
            gate.forget_cgroup()
            objects = gate.objects_held()
            assert objects
            gate.kill_everything()
            wait_until(lambda: not objects.remaining(), 2, "every BPF object to go")
            (left,) = gate.cgroups()
        assert left.is_dir()
        with Tidegate(config) as gate:
            assert run(Plan("127.0.0.1", gate.port(), rate=100, count=10)).outcomes() == {"answered": 10}
        assert not left.exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_die_with_their_supervisor(workers: int) -> None:
    with Backend("echo") as backend, Tidegate(tcp_config([backend.address], workers=workers)) as gate:
        gate.forget_cgroup()
        pids = gate.worker_pids()
        assert len(pids) == workers
        objects = gate.objects_held()
        os.kill(gate.supervisor_pid, signal.SIGKILL)
        gate.child.wait(10)
        wait_until(lambda: not any(map(alive, pids)), 5, "the workers to end")
        wait_until(lambda: not listening(gate.port()), 5, "the port to be free")
        if os.geteuid() == 0:
            wait_until(lambda: not objects.remaining(), 2, "every BPF object to go")


def test_a_dead_worker_is_replaced() -> None:
    with Backend("echo") as backend, Tidegate(tcp_config([backend.address])) as gate:
        (first,) = gate.worker_pids()
        os.kill(first, signal.SIGKILL)

        def replaced() -> bool:
            (worker,) = gate.status()["workers"]
            return worker["pid"] not in (0, None, first) and worker["restarts"] == 1

        wait_until(replaced, 10, "another worker")
        assert run(Plan("127.0.0.1", gate.port(), rate=100, count=10)).outcomes() == {"answered": 10}


@pytest.mark.root
def test_without_privileges_it_works_on_the_estimate_and_says_so_once() -> None:
    tick_ns = int(time.clock_getres(6) * 1e9)  # CLOCK_MONOTONIC_COARSE: the kernel's tick
    with Backend("counting") as backend:
        config = tcp_config([backend.address], stale_after="500ms")
        with Tidegate(config, user="nobody") as gate:
            status = gate.status()
            assert status["queue_age"]["source"] == "tcp_info"
            assert status["queue_age"]["reason"]
            said = [line for line in gate.log().splitlines() if "level=info" not in line]
            assert len(said) == 1, said
            assert "tcp_info" in said[0]
            assert "fix=" in said[0]
            assert not gate.objects_held()
            (worker,) = gate.worker_pids()
            plan = Plan("127.0.0.1", gate.port(), rate=200, count=220)
            with Client(plan) as client:
                client.go()
                time.sleep(0.1)
                with stopped(worker) as span:
                    time.sleep(1.0)
                result = client.result()
            # a lower bound in ticks: the youngest of the stale may pass, nobody fresh is refused
            served = {seen.line for seen in backend.seen()}
            verdict = judge(result.attempts, span, 500 * MS, served, resolution_ns=3 * tick_ns + 2 * MS)
            verdict.require()
            assert len(verdict.must_refuse) > 60
            assert len(verdict.must_serve) > 50


def test_bpf_demanded_without_privileges_refuses_to_start() -> None:
    if os.geteuid() != 0:
        pytest.skip("root needed to give privileges up")
    config = tcp_config(["127.0.0.1:9"], top={"queue_age": "bpf"})
    with pytest.raises(AssertionError, match=r"tidegate ended with [1-9]") as failure:
        Tidegate(config, user="nobody").__enter__()
    assert "Traceback" not in "".join(failure.value.__notes__)


def test_sigterm_lets_sessions_finish_and_takes_nobody_new() -> None:
    with Backend("echo") as backend:
        config = tcp_config([backend.address], top={"drain_timeout": "20s"})
        with Tidegate(config) as gate, LineClient(gate.port()) as client:
            assert client.ask("before") == "before"
            gate.child.signal(signal.SIGTERM)
            wait_until(lambda: not listening(gate.port()), 5, "the listener to go")
            assert client.ask("while draining") == "while draining"
            with pytest.raises(ConnectionRefusedError):
                LineClient(gate.port())
            client.sock.close()
            begun = time.monotonic()
            assert gate.wait() == 0
            assert time.monotonic() - begun < 15, "it ends when the last session does, not at the limit"


def test_sigterm_to_the_whole_group_cuts_nobody_either() -> None:
    """As systemd sends it: the worker hears it from the signal and from the supervisor."""
    with Backend("echo") as backend:
        config = tcp_config([backend.address], top={"drain_timeout": "20s"}, workers=2)
        with Tidegate(config) as gate, LineClient(gate.port()) as client:
            assert client.ask("before") == "before"
            os.killpg(gate.supervisor_pid, signal.SIGTERM)
            wait_until(lambda: not listening(gate.port()), 5, "the listener to go")
            assert client.ask("while draining") == "while draining"
            client.sock.close()
            assert gate.wait() == 0


def test_sigterm_cuts_what_outlasts_the_drain_limit() -> None:
    with Backend("echo") as backend:
        config = tcp_config([backend.address], top={"drain_timeout": "400ms"})
        with Tidegate(config) as gate, LineClient(gate.port()) as client:
            assert client.ask("before") == "before"
            begun = time.monotonic()
            gate.child.signal(signal.SIGTERM)
            assert client.end() in ("eof", "reset")
            assert time.monotonic() - begun >= 0.4
            assert gate.wait() == 0


@pytest.mark.parametrize("signals", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT,)])
def test_a_second_sigterm_or_a_sigint_ends_at_once(signals: tuple[signal.Signals, ...]) -> None:
    with Backend("echo") as backend:
        config = tcp_config([backend.address], top={"drain_timeout": "5m"})
        with Tidegate(config) as gate, LineClient(gate.port()) as client:
            assert client.ask("before") == "before"
            gate.child.signal(signals[0])
            if len(signals) == 2:
                wait_until(lambda: gate.events("draining"), 5, "the drain to begin")
                assert client.ask("still") == "still"
                gate.child.signal(signals[1])
            assert client.end() in ("eof", "reset")
            gate.wait()


def test_what_waits_at_sigterm_is_served_or_closed_and_never_forgotten() -> None:
    with Backend("counting") as backend:
        config = tcp_config([backend.address], stale_after="20s", top={"drain_timeout": "5s"})
        with Tidegate(config) as gate:
            (worker,) = gate.worker_pids()
            plan = Plan("127.0.0.1", gate.port(), rate=1000, count=40)
            with Client(plan) as client:
                with stopped(worker):
                    client.go()
                    wait_until(lambda: gate.listener()["waiting"] == 40, 5, "40 to wait")
                    gate.child.signal(signal.SIGTERM)
                    time.sleep(0.2)
                assert client.result().outcomes() == {"answered": 40}
            assert gate.wait() == 0


def test_a_bad_file_is_refused_with_its_line_and_exit_status_2(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text('workers = 1\n[[listener]]\naddress = "127.0.0.1:1"\nprotocl = "tcp"\n')
    for verb in ("check", "run"):
        done = run_tidegate(verb, str(file))
        assert done.returncode == 2, done.stderr
        assert "bad.toml:4" in done.stdout + done.stderr
        assert "protocol" in done.stdout + done.stderr
