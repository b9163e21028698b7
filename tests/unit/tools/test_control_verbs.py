"""The verbs that ask a running tidegate: what they send, what they show, and their exit codes."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tidegate_tools.ctl import parse_arguments
from tidegate_tools.main import main

BUCKETS = [0] * 40
BUCKETS[20] = 99
BUCKETS[30] = 1
STATUS: dict[str, Any] = {
    "version": "0.1.0",
    "pid": 4242,
    "uptime_s": 7261.5,
    "config": "/etc/tidegate/tidegate.toml",
    "control": "/run/tidegate/control.sock",
    "queue_age": {"source": "bpf", "reason": ""},
    "cgroup": "/sys/fs/cgroup/tidegate/main",
    "maps": {"stamps": 1, "slots": 2, "ages": 3},
    "workers": [
        {"index": i, "pid": 4300 + i, "state": state, "heartbeat_age_ms": beat, "restarts": i,
         "sessions": 10**i,
         "queued": 0, "waiting": 5, "thefts": 2}
        for i, (state, beat) in enumerate([("active", 12), ("hung", 2500), ("starting", None)])
    ],
    "listeners": [
        {"name": "a-listener-with-quite-a-long-name", "address": "[2001:db8::1234:5678]:8443",
         "protocol": "tcp",
         "cluster": "app", "slots": [0, 1], "backlog": 4096, "stale_after_ms": 1000, "waiting": 15,
         "accepted": 1234567, "sessions": 111, "queued": 0, "dropped": {"stale": 12345, "client_gone": 3},
         "ended": {}, "age_histogram": {"count": 100, "sum_ns": 1, "max_ns": 1_600_000_000,
                                             "buckets": BUCKETS}},
    ],
    "clusters": [
        {
            "name": "app",
            "backends": [
                {"address": "127.0.0.1:9000", "state": "up", "connections": 3, "connect_failures": 0},
            ],
        }
    ],
}  # fmt: skip


@contextmanager
def control(path: Path, answer: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """A control socket that answers each request by `answer`, and the requests it got."""
    seen: list[dict[str, Any]] = []
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(10)

        def serve() -> None:
            client, _ = listener.accept()
            with client, client.makefile("rb") as lines:
                request = json.loads(lines.readline())
                seen.append(request)
                client.sendall(json.dumps({"v": 1, "id": request["id"], **answer(request)}).encode() + b"\n")

        thread = threading.Thread(target=serve)
        thread.start()
        yield seen
        thread.join(10)


def run(path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--control", str(path)])


def ok(result: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda _: {"ok": True, "result": result}


def refused(code: str, message: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda _: {"ok": False, "error": {"code": code, "message": message}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


def test_status_fits_eighty_columns(path: Path) -> None:
    with control(path, ok(STATUS)) as seen:
        result = run(path, "status")
    assert result.exit_code == 0
    assert seen[0]["verb"] == "status"
    lines = result.output.splitlines()
    assert all(len(line) < 80 for line in lines), result.output
    assert lines[0] == "tidegate 0.1.0, process 4242, up 121m"
    rows = [line.split() for line in lines]
    assert ["0", "4300", "active", "12ms", "ago", "1", "0", "5", "2", "0"] in rows
    assert ["1", "4301", "hung", "2.5s", "ago", "10", "0", "5", "2", "1"] in rows
    assert ["2", "4302", "starting", "-", "100", "0", "5", "2", "2"] in rows
    assert ["app", "127.0.0.1:9000", "up", "3", "0"] in rows
    assert "8443" in result.output
    assert "stale" in result.output


def test_json_is_the_answer(path: Path) -> None:
    with control(path, ok(STATUS)):
        assert json.loads(run(path, "status", "--json").output) == STATUS


def test_workers(path: Path) -> None:
    with control(path, ok(STATUS)):
        text = run(path, "workers").output
    assert [line.split()[0] for line in text.splitlines()] == ["WORKER", "0", "1", "2"]
    path.unlink()
    with control(path, ok(STATUS)):
        assert json.loads(run(path, "workers", "--json").output) == STATUS["workers"]


@pytest.mark.parametrize(
    ("arguments", "verb", "args", "says"),
    [
        (["reload"], "reload", {}, "reloaded"),
        (["drain"], "drain", {}, "draining"),
        (["drain", "--worker", "1"], "drain", {"worker": 1}, "worker 1 is draining"),
        (["upgrade"], "upgrade", {}, "handed over"),
    ],
)
def test_what_changes_something(
    path: Path, arguments: list[str], verb: str, args: dict[str, Any], says: str
) -> None:
    with control(path, ok({})) as seen:
        result = run(path, *arguments)
    assert (result.exit_code, result.output) == (0, f"{says}\n")
    assert (seen[0]["verb"], seen[0]["args"]) == (verb, args)


def test_what_the_answer_says_is_shown(path: Path) -> None:
    with control(path, ok({"message": "reloaded: 2 listeners\x1b[2J", "notes": ["one kept"]})):
        assert run(path, "reload").output == "reloaded: 2 listeners?[2J\nnote: one kept\n"


def test_a_refusal_ends_with_1(path: Path) -> None:
    with control(path, refused("bad_config", "tidegate.toml:3: unknown key")):
        result = run(path, "reload")
    assert result.exit_code == 1
    assert "tidegate: tidegate.toml:3: unknown key" in result.output


@pytest.mark.parametrize("verb", ["status", "workers", "reload", "drain", "upgrade"])
def test_nobody_there_ends_with_3(path: Path, verb: str) -> None:
    result = run(path, verb)
    assert result.exit_code == 3
    assert str(path) in result.output


def test_a_dead_ones_leftover_ends_with_3(path: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as left:
        left.bind(str(path))
    assert run(path, "status").exit_code == 3


def test_ctl_sends_any_verb(path: Path) -> None:
    with control(path, ok({"killed": 2})) as seen:
        result = run(path, "ctl", "sessions.kill", "older=5s", "limit=3", "where.listener=web")
    assert json.loads(result.output) == {"killed": 2}
    assert seen[0]["verb"] == "sessions.kill"
    assert seen[0]["args"] == {"older": "5s", "limit": 3, "where": {"listener": "web"}}


@pytest.mark.parametrize("argument", ["worker", "=1"])
def test_ctl_refuses_what_is_no_argument(path: Path, argument: str) -> None:
    assert run(path, "ctl", "drain", argument).exit_code == 2


def test_arguments_read_as_json_where_they_can() -> None:
    assert parse_arguments(("a=1", "b=true", 'c=["x"]', "d=text", "e=1s", "f=")) == {
        "a": 1, "b": True, "c": ["x"], "d": "text", "e": "1s", "f": "",
    }  # fmt: skip
