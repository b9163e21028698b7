"""Upgrades that do not succeed, and stops longer than every timeout."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest
from harness.backends import Backend
from harness.client import run
from harness.kernel_objects import held_by
from harness.line_client import LineClient
from harness.plan import Plan
from harness.ports import free_port
from harness.proc import Tidegate, tcp_config
from harness.processes import alive, session_pids, stopped
from harness.waiting import wait_until


def successor_of(gate: Tidegate) -> int:
    return int(wait_until(lambda: gate.events("upgrading"), 5, "the upgrade to begin")[-1]["successor"])


@pytest.mark.bpf
def test_a_successor_killed_late_leaves_control_slots_and_sessions_as_they_were() -> None:
    """It has its control socket and its workers already: they wrote the slots that both share."""
    with Backend("echo") as backend, Tidegate(tcp_config([backend.address], workers=2)) as gate:
        with LineClient(gate.port()) as lasting:
            assert lasting.ask("before") == "before"
            ours = os.stat(gate.control).st_ino
            os.kill(gate.supervisor_pid, signal.SIGUSR2)
            successor = successor_of(gate)
            wait_until(lambda: os.stat(gate.control).st_ino != ours, 20, "its control socket")
            os.kill(successor, signal.SIGKILL)
            wait_until(lambda: gate.events("upgrade_failed"), 5, "the predecessor to see it")
            assert gate.status()["pid"] == gate.supervisor_pid
            assert [worker["state"] for worker in gate.status()["workers"]] == ["active", "active"]
            assert run(Plan("127.0.0.1", gate.port(), rate=100, count=20)).outcomes() == {"answered": 20}
            assert lasting.ask("after") == "after"
        # and the next one succeeds
        old = gate.supervisor_pid
        assert gate.upgrade() != old


@pytest.mark.parametrize("after_s", [0.0, 0.3])
def test_sigterm_while_a_successor_starts_ends_both(after_s: float) -> None:
    with Backend("echo") as backend, Tidegate(tcp_config([backend.address], workers=2)) as gate:
        os.kill(gate.supervisor_pid, signal.SIGUSR2)
        successor = successor_of(gate)
        time.sleep(after_s)
        os.kill(successor, signal.SIGSTOP)  # wherever it is now, it does not get ready before the end
        assert not gate.events("handed_over")
        os.kill(gate.supervisor_pid, signal.SIGTERM)
        gate.wait()
        if alive(successor):
            os.kill(successor, signal.SIGCONT)
        wait_until(lambda: not alive(successor), 5, "the successor to end too")
        wait_until(lambda: not session_pids(gate.child.pid), 5, "its workers to end")


@pytest.mark.bpf
def test_an_upgrade_away_from_bpf_leaves_no_program_with_the_workers() -> None:
    with Backend("echo") as backend:
        config = tcp_config([backend.address], workers=2)
        with Tidegate(config) as gate:
            gate.write_config({**config, "queue_age": "tcp_info"})
            gate.upgrade()
            assert gate.status()["queue_age"]["source"] == "tcp_info"
            for pid in gate.worker_pids():
                held = held_by([pid])
                assert not held.ids["prog"]
                assert not held.ids["link"]
            gate.forget_cgroup()


def test_a_worker_stopped_for_longer_than_its_timeouts_cuts_nobody_who_spoke_meanwhile() -> None:
    with Backend("echo") as backend:
        config = tcp_config([backend.address], front_timeout="1s", stale_after="10s")
        with Tidegate(config) as gate:
            clients = [LineClient(gate.port()) for _ in range(150)]
            for client in clients:
                assert client.ask("before") == "before"
            with stopped(*gate.worker_pids()):
                for client in clients:
                    client.sock.sendall(b"meanwhile\n")
                time.sleep(1.5)
            for client in clients:
                client.sock.settimeout(5)
                assert client.sock.recv(100) == b"meanwhile\n"
                client.sock.close()


def test_nobody_is_let_in_to_a_listener_on_its_way_out() -> None:
    """One worker hangs, so that its end takes seconds: who came meanwhile would wait for a reset."""
    with Backend("echo") as backend:
        config = tcp_config([backend.address], workers=2)
        front = config["listener"][0]
        port = free_port("127.0.0.1")
        leaving = {**front, "name": "leaving", "address": f"127.0.0.1:{port}"}
        with Tidegate({**config, "listener": [front, leaving]}) as gate:
            with stopped(gate.worker_pids()[0]):
                gate.write_config(config)
                gate.child.signal(signal.SIGHUP)
                wait_until(lambda: "leaving" not in str(gate.status()["listeners"]), 5, "the reload")
                with pytest.raises(OSError, match=r"timed out|refused"):
                    socket.create_connection(("127.0.0.1", port), 0.3)
            wait_until(lambda: gate.events("reloaded"), 10, "its end")
            assert run(Plan("127.0.0.1", gate.port(), rate=100, count=10)).outcomes() == {"answered": 10}
