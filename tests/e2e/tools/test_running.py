"""The verbs at a running tidegate."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from harness.backends import Backend
from harness.line_client import LineClient
from harness.proc import Tidegate, run_tidegate, tcp_config
from harness.processes import alive, python, python_env, stopped
from harness.waiting import wait_until

from tidegate_tools.recording import read

DOCS = Path(__file__).resolve().parents[3] / "docs" / "tools"


def asked(gate: Tidegate, *arguments: str, code: int = 0) -> str:
    """The standard output of a verb; its errors when it is to fail."""
    done = run_tidegate(*arguments, "--control", gate.control)
    assert done.returncode == code, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stderr if code else done.stdout


def row(gate: Tidegate, *arguments: str) -> dict[str, Any]:
    """The listener "front" in `tidegate ages`."""
    (found,) = json.loads(asked(gate, "ages", "front", "--json", "--connections", *arguments))["listeners"]
    assert isinstance(found, dict)
    return found


@pytest.mark.bpf
@pytest.mark.root
def test_ages_answers_while_every_worker_is_stopped() -> None:
    with (
        Backend("echo") as backend,
        Tidegate(tcp_config([backend.address], workers=2, stale_after="400ms")) as gate,
        ExitStack() as stack,
    ):
        bounds = {}
        with stopped(*gate.worker_pids()):
            for _ in range(8):
                start = time.monotonic_ns()
                sock = stack.enter_context(closing(socket.create_connection(("127.0.0.1", gate.port()))))
                bounds[sock.getsockname()[1]] = (start, time.monotonic_ns())
            time.sleep(0.5)
            found = row(gate)
            assert (found["name"], found["waiting"], found["source"]) == ("front", 8, "stamp")
            for entry in found["connections"]:
                low, high = bounds.pop(int(entry["client"].rpartition(":")[2]))
                assert low <= entry["established_ns"] <= high
            assert found["oldest_ns"] >= 400_000_000
            assert found["process"]["pid"] == gate.supervisor_pid
        wait_until(lambda: row(gate)["dropped"]["stale"] == 8, 10, "the stale ones to be refused")
        after = row(gate)
        assert (after["waiting"], after["accepted"], after["accepted_ages"]["count"]) == (0, 8, 8)
        assert after["accepted_ages"]["max_ns"] >= found["oldest_ns"]
        text = asked(gate, "ages", "front")
        assert re.search(r"^front +8( +[\d.]+m?s){4} +stale 8$", text, re.MULTILINE), text


def test_status_is_as_described() -> None:
    with Backend("echo") as backend, Tidegate(tcp_config([backend.address], workers=2)) as gate:
        document = json.loads(asked(gate, "status", "--json"))
        page = (DOCS / "status.md").read_text()
        described = set(re.findall(r"`(\w+)`", page))
        parts = [document, *document["workers"], *document["listeners"], *document["clusters"][0]["backends"]]
        for part in parts:
            assert set(part) <= described, set(part) - described
        text = asked(gate, "status")
        assert f"process {gate.supervisor_pid}," in text
        assert all(len(line) < 80 for line in text.splitlines())
        assert {line.split()[2] for line in asked(gate, "workers").splitlines()[1:]} == {"active"}
        assert [one["pid"] for one in json.loads(asked(gate, "workers", "--json"))] == gate.worker_pids()
        assert json.loads(asked(gate, "ctl", "status"))["pid"] == gate.supervisor_pid


def test_drain_of_a_worker_and_of_all() -> None:
    with Backend("echo") as backend, Tidegate(tcp_config([backend.address], workers=2)) as gate:
        before = gate.worker_pids()
        assert "worker 1" in asked(gate, "drain", "--worker", "1")
        wait_until(lambda: not alive(before[1]), 10, "the drained worker to end")
        wait_until(
            lambda: {one["state"] for one in gate.status()["workers"]} == {"active"}, 10, "its successor"
        )
        assert gate.worker_pids()[0] == before[0]
        assert "numbered" in asked(gate, "drain", "--worker", "7", code=1)
        asked(gate, "drain")
        assert gate.wait() == 0
        assert "no tidegate answers" in asked(gate, "status", code=3)


def test_drain_waits_for_the_end_when_told_to() -> None:
    with Backend("echo") as backend, Tidegate(tcp_config([backend.address], workers=2)) as gate:
        before = gate.worker_pids()
        asked(gate, "drain", "--worker", "1", "--wait")
        assert not alive(before[1])
        assert "numbered" in asked(gate, "drain", "--worker", "7", "--wait", code=1)
        wait_until(
            lambda: {one["state"] for one in gate.status()["workers"]} == {"active"}, 10, "its successor"
        )
        with LineClient(gate.port()) as lasting:
            assert lasting.ask("here") == "here"
            waiting = subprocess.Popen(
                [python(), "-m", "tidegate_tools", "drain", "--wait", "--control", gate.control],
                env=python_env(), stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            assert waiting.stdout is not None
            assert "draining" in waiting.stdout.readline()
            assert lasting.ask("still") == "still"
            assert waiting.poll() is None
        assert waiting.wait(20) == 0
        waiting.stdout.close()
        assert gate.wait() == 0


def test_reload_says_what_is_wrong_and_keeps_serving() -> None:
    with Backend("echo") as backend:
        config = tcp_config([backend.address])
        with Tidegate(config) as gate:
            config["listener"][0]["stale_after"] = "2s"
            gate.write_config(config)
            asked(gate, "reload")
            assert gate.listener()["stale_after_ms"] == 2000
            config["listener"][0]["stale_aftr"] = "3s"
            gate.write_config(config)
            errors = asked(gate, "reload", code=1)
            assert "stale_aftr" in errors
            assert "stale_after" in errors
            assert gate.listener()["stale_after_ms"] == 2000
            del config["listener"][0]["stale_aftr"]
            gate.write_config(config)


def test_top_and_record_see_it(tmp_path: Path) -> None:
    with Backend("echo") as backend, Tidegate(tcp_config([backend.address], stale_after="200ms")) as gate:
        port = gate.port()
        out = tmp_path / "a.rec"
        with ExitStack() as stack:
            with stopped(*gate.worker_pids()):
                stack.enter_context(closing(socket.create_connection(("127.0.0.1", port))))
                screen = asked(gate, "top", "--size", "80x24", "--interval", "0.3")
                (line,) = [line.split() for line in screen.splitlines() if line.startswith("front ")]
                assert line[1:3] == ["1", "0"]
                assert all(len(line) <= 80 for line in screen.splitlines())
            wait_until(lambda: gate.listener()["dropped"]["stale"] == 1, 10, "it to be refused")
        with ExitStack() as stack:

            def connect_later() -> None:
                begun = lambda: out.exists() and out.read_text().count("\n") > 1  # noqa: E731
                wait_until(begun, 20, "the first interval")
                for _ in range(5):
                    stack.enter_context(closing(socket.create_connection(("127.0.0.1", port))))

            thread = threading.Thread(target=connect_later)
            thread.start()
            asked(gate, "record", "front", "--out", str(out), "--interval", "0.1", "--duration", "3")
            thread.join()
        name = f"127.0.0.1:{port} front"
        entries = [frame.listeners[name] for frame in read(out) if name in frame.listeners]
        assert sum(entry.accepted for entry in entries) == 5
        assert sum(sum(entry.taken.values()) for entry in entries) == 5
        assert sum(sum(entry.dropped.values()) for entry in entries) == 0  # the stale one was before it
