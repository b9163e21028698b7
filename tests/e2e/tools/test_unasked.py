"""Verbs that show the kernel's figures do so without tidegate's, and say why those are missing."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from harness.processes import Child, python, python_env

from tidegate_tools.recording import read

pytestmark = pytest.mark.root
FORBIDDEN = "may not ask the tidegate at {} (needs root)"
ABSENT = "no tidegate answers at {} (No such file or directory)"


@pytest.fixture(name="forbidden")
def a_control_socket_of_root(tmp_path: Path) -> Iterator[str]:
    for directory in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        directory.chmod(0o755)
    path = tmp_path / "control.sock"
    with closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind(str(path))
        path.chmod(0o600)
        server.listen()
        yield str(path)


@pytest.fixture(name="port")
def a_listener() -> Iterator[int]:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield server.getsockname()[1]


def run(where: Path, user: str, *arguments: str, code: int = 0, control: str = "") -> str:
    """All it printed. `control` as the environment has it."""
    (where / "log").unlink(missing_ok=True)
    child = Child(
        [python(), "-m", "tidegate_tools", *arguments], where / "log",
        env=python_env({"TIDEGATE_CONTROL": control} if control else {}), user=user,
    )  # fmt: skip
    status = child.wait(30)
    said = child.output()
    assert (status, "Traceback" in said) == (code, False), said
    return said


@pytest.mark.parametrize(("user", "why"), [("nobody", FORBIDDEN), ("", ABSENT)])
def test_without_tidegates_answer(tmp_path: Path, forbidden: str, port: int, user: str, why: str) -> None:
    control = forbidden if user else str(tmp_path / "nosuch.sock")
    note = why.format(control)
    said = run(tmp_path, user, "ages", str(port), control=control)
    assert f"127.0.0.1:{port}" in said
    assert said.count(f"note: {note}") == 1
    document = run(tmp_path, user, "ages", str(port), "--json", control=control)
    assert note in json.loads(document)["notes"]
    assert note in " ".join(run(tmp_path, user, "top", "--size", "200x24", control=control).split())
    out = tmp_path / "out"
    out.mkdir()
    os.chown(out, 65534, 65534)
    arguments = ("record", "--out", str(out / "a.rec"), "--interval", "0.1", "--duration", "0.3")
    said = run(tmp_path, user, *arguments, control=control)
    assert said.count(note) == 1
    assert list(read(out / "a.rec"))
    run(tmp_path, user, "status", code=3, control=control)


def test_only_one_thing_is_said_when_nothing_matches(tmp_path: Path) -> None:
    said = run(tmp_path, "", "ages", "nosuch", code=3, control="")
    assert said.count("no TCP listener") == 1
    assert "no TCP listener matches nosuch" in said


def test_a_listener_behind_watch(tmp_path: Path) -> None:
    assert "tidegate ages 8180 --watch" in run(tmp_path, "", "ages", "--watch", "8180", code=2)


def test_a_network_namespace_that_may_not_be_looked_at(tmp_path: Path) -> None:
    said = run(tmp_path, "nobody", "ages", "--netns", f"pid:{os.getpid()}", code=2)
    assert "no permission" in said
    assert "run it as root" in said
