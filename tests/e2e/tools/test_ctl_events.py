"""`tidegate ctl events` follows what happens, and ends well whoever ends it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from harness.backends import Backend
from harness.line_client import LineClient
from harness.proc import Tidegate, run_tidegate, tcp_config
from harness.processes import python, python_env
from harness.waiting import wait_until


class Follower:
    """A running `tidegate ctl events`, its output in files."""

    def __init__(self, gate: Tidegate, out: Path, *arguments: str, pipe: str = "") -> None:
        self.out, self.err = out / "events.out", out / "events.err"
        command = [python(), "-m", "tidegate_tools.main", "ctl", "events", *arguments]
        with self.out.open("wb") as stdout, self.err.open("wb") as stderr:
            self.process = subprocess.Popen(
                ["bash", "-c", f'set -o pipefail; exec "$@" | {pipe}', "bash", *command] if pipe else command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env={**python_env(), "TIDEGATE_CONTROL": gate.control},
            )

    def said(self) -> str:
        return self.err.read_text()

    def events(self) -> list[dict[str, Any]]:
        """Whole lines only."""
        return [json.loads(line) for line in self.out.read_text().splitlines(True) if line.endswith("\n")]

    def saw(self, name: str, **fields: object) -> dict[str, Any]:
        """The first event of that name with these fields, waited for."""

        def found() -> dict[str, Any] | None:
            return next(
                (one for one in self.events() if one["event"] == name and fields.items() <= one.items()), None
            )

        return wait_until(found, 10, f"{name} {fields} in {self.events()}")

    def ended(self) -> int:
        status = self.process.wait(10)
        assert "Traceback" not in self.said()
        assert "Aborted" not in self.said()
        return status


@contextmanager
def following(gate: Tidegate, out: Path, *arguments: str, pipe: str = "") -> Iterator[Follower]:
    follower = Follower(gate, out, *arguments, pipe=pipe)
    try:
        wait_until(lambda: "following tidegate's events" in follower.said(), 10, "the stream to be open")
        yield follower
    finally:
        if follower.process.poll() is None:
            follower.process.kill()
            follower.process.wait()


@pytest.fixture
def backend() -> Iterator[Backend]:
    with Backend("echo") as one:
        yield one


def unused_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return f"127.0.0.1:{sock.getsockname()[1]}"


def test_a_death_an_ejection_and_a_reload_are_seen(backend: Backend, tmp_path: Path) -> None:
    config = tcp_config(
        [backend.address, unused_address()],
        workers=2,
        cluster={"balance": "round_robin", "eject": {"failures": 1, "for": "30s"}},
    )
    with Tidegate(config) as gate, following(gate, tmp_path) as follower:
        victim = gate.worker_pids()[0]
        os.kill(victim, signal.SIGKILL)
        assert follower.saw("worker_died")["pid"] == victim
        assert follower.saw("worker_died")["ended_by"] == "signal 9"
        replacement = follower.saw("worker_replaced", worker=0)["pid"]
        assert replacement == gate.worker_pids()[0] != victim

        for _ in range(8):  # both workers, both backends
            with LineClient(gate.port()) as client:
                assert client.ask("hello") == "hello", "the other backend serves"
        ejected = follower.saw("backend_ejected", cluster="back")
        assert ejected["backend"] == config["cluster"]["back"]["backends"][1]
        assert ejected["worker_process"] in (0, 1)
        assert ejected["level"] == "warning"

        config["listener"][0]["stale_after"] = "2s"
        gate.write_config(config)
        gate.call("reload")
        follower.saw("reloaded")

        follower.process.send_signal(signal.SIGINT)
        assert follower.ended() == 0
        assert all(set(one) >= {"time", "level", "logger", "event"} for one in follower.events())


def test_only_what_was_asked_for(backend: Backend, tmp_path: Path) -> None:
    with (
        Tidegate(tcp_config([backend.address])) as gate,
        following(gate, tmp_path, "level=info", "event=reloaded") as follower,
    ):
        gate.call("log.level", {"level": "info"})
        gate.call("reload")
        follower.saw("reloaded")
        gate.call("drain")
        gate.wait()
        assert follower.ended() == 0
        assert [one["event"] for one in follower.events()] == ["reloaded"]


def test_a_misspelt_event_is_refused(backend: Backend) -> None:
    with Tidegate(tcp_config([backend.address])) as gate:
        done = run_tidegate("ctl", "events", "event=reloadde", "--control", gate.control)
        assert (done.returncode, done.stdout) == (1, "")
        assert "did you mean reloaded?" in done.stderr


def test_it_ends_with_tidegate_and_says_so(backend: Backend, tmp_path: Path) -> None:
    with Tidegate(tcp_config([backend.address])) as gate, following(gate, tmp_path) as follower:
        gate.call("drain")
        gate.wait()
        assert follower.ended() == 0
        assert [one["event"] for one in follower.events()][-1] == "stopped"
        assert follower.said().splitlines()[-1] == "tidegate has ended"


def test_a_killed_supervisor_ends_it_too(backend: Backend, tmp_path: Path) -> None:
    with Tidegate(tcp_config([backend.address])) as gate, following(gate, tmp_path) as follower:
        gate.forget_cgroup()
        gate.kill_everything()
        assert follower.ended() == 0
        assert follower.said().splitlines()[-1] == "tidegate has ended"


def test_it_follows_an_upgrade(backend: Backend, tmp_path: Path) -> None:
    config = tcp_config([backend.address], top={"drain_timeout": "3s"})
    with Tidegate(config) as gate, following(gate, tmp_path) as follower:
        successor = gate.upgrade()
        follower.saw("handed_over", successor=successor)
        wait_until(lambda: "following its successor's events" in follower.said(), 10, "the successor")
        gate.call("reload")
        follower.saw("reloaded")


def test_a_pipe_whose_reader_is_gone_ends_it(backend: Backend, tmp_path: Path) -> None:
    with (
        Tidegate(tcp_config([backend.address])) as gate,
        following(gate, tmp_path, pipe="head -n 1") as follower,
    ):
        gate.call("log.level", {"level": "info"})
        assert follower.ended() == 0, "at once: no second event came"
        assert [one["event"] for one in follower.events()] == ["control"]


def test_a_pipe_that_closes_before_anything_came(backend: Backend, tmp_path: Path) -> None:
    with (
        Tidegate(tcp_config([backend.address])) as gate,
        following(gate, tmp_path, pipe="true") as follower,
    ):
        assert follower.ended() == 0
