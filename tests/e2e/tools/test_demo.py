"""`tidegate demo`, used the way its own text says."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import urllib.request
from pathlib import Path

import pytest
from harness.processes import Child, python, python_env, session_pids
from harness.waiting import wait_until


def started(tmp_path: Path, *arguments: str) -> tuple[Child, str]:
    env = python_env({"TMPDIR": str(tmp_path)})
    demo = Child([python(), "-m", "tidegate_tools", "demo", *arguments], tmp_path / "log", env=env)
    try:
        ended = lambda: demo.process.poll() is not None  # noqa: E731
        wait_until(lambda: "Ctrl-C ends" in demo.output() or ended(), 60, "the demo to be ready")
        assert not ended()
    except BaseException as error:
        error.add_note(demo.output())
        demo.kill()
        raise
    return demo, demo.output()


def proxies(directory: Path) -> list[str]:
    """Command lines of processes that use a file below the directory."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = Path(f"/proc/{pid}/environ").read_bytes() + Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if str(directory).encode() in line and int(pid) != os.getpid():
            found.append(pid)
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_curl_and_a_clean_end(tmp_path: Path, number: signal.Signals) -> None:
    demo, text = started(tmp_path)
    try:
        url = re.search(r"curl (http://127\.0\.0\.1:\d+/)", text)
        assert url is not None
        # which of the two answers is chance: a few would now and then be of one
        answers = {urllib.request.urlopen(f"{url[1]}{i}", timeout=10).read() for i in range(40)}
        assert {answer.split(b":")[0] for answer in answers} == {
            b"hello from backend a", b"hello from backend b",
        }  # fmt: skip
        # the lines it tells people to try, as they are
        for verb in ("ages", "status"):
            line = re.search(rf"^  tidegate ({verb} .*)$", text, re.MULTILINE)
            assert line is not None
            done = subprocess.run(
                [python(), "-m", "tidegate_tools", *line[1].split()],
                env=python_env(), capture_output=True, text=True, check=True,
            )  # fmt: skip
            assert "demo" in done.stdout
        demo.signal(number)
        assert demo.wait(30) == 0
        wait_until(lambda: not session_pids(demo.pid) and not proxies(tmp_path), 5, "all of it to end")
        assert [path.name for path in tmp_path.iterdir()] == ["log"]
        assert "nothing is left behind" in demo.output()
    finally:
        demo.kill()


def test_kill_of_the_demo_ends_the_rest(tmp_path: Path) -> None:
    demo, _ = started(tmp_path, "--workers", "2", "--backends", "1")
    try:
        os.kill(demo.process.pid, signal.SIGKILL)
        demo.wait(10)
        wait_until(lambda: not proxies(tmp_path), 15, "proxy and backends to end")
    finally:
        demo.kill()


@pytest.mark.parametrize(
    ("host", "shown"), [("0.0.0.0", r"0\.0\.0\.0"), ("::1", r"\[::1\]"), ("127.0.0.2", r"127\.0\.0\.2")]
)
def test_it_listens_where_it_is_told(tmp_path: Path, host: str, shown: str) -> None:
    demo, text = started(tmp_path, "--host", host)
    try:
        port = re.search(rf"tidegate listens on {shown}:(\d+),", text)
        assert port is not None
        url = re.search(rf"curl (http://\S+:{port[1]}/)", text)
        assert url is not None
        assert urllib.request.urlopen(url[1], timeout=10).read().startswith(b"hello from backend")
    finally:
        demo.signal(signal.SIGINT)
        demo.wait(30)
        demo.kill()


def test_a_name_is_no_address_to_listen_on() -> None:
    done = subprocess.run(
        [python(), "-m", "tidegate_tools", "demo", "--host", "localhost"],
        capture_output=True, text=True, env=python_env({}), timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "'localhost' is no IP address: write 127.0.0.1 or 0.0.0.0" in done.stderr
