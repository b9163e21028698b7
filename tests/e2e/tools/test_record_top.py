"""`tidegate record` and `tidegate top` as programs, at a listener that never accepts."""

from __future__ import annotations

import os
import pty
import select
import signal
import socket
import struct
import subprocess
import termios
import time
from contextlib import ExitStack, closing
from fcntl import ioctl
from pathlib import Path

import pytest
from harness.processes import python, python_env
from harness.waiting import wait_until

from tidegate_tools.recording import Entry, read


def test_recording_what_waits(tmp_path: Path) -> None:
    out = tmp_path / "a.rec"
    with closing(socket.create_server(("127.0.0.1", 0))) as server, ExitStack() as stack:
        port = server.getsockname()[1]
        name = f"127.0.0.1:{port}"
        child = subprocess.Popen(
            [python(), "-m", "tidegate_tools", "record", str(port), "--out", str(out), "--interval", "0.05"],
            env=python_env(), stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        stack.callback(child.wait, 10)
        stack.callback(child.kill)
        wait_until(lambda: out.exists() and out.read_text().count("\n") >= 3, 10, "the first frames")
        start = time.monotonic_ns()
        for _ in range(3):
            stack.enter_context(closing(socket.create_connection(server.getsockname())))
        wait_until(
            lambda: any(frame.listeners.get(name, Entry()).waiting == 3 for frame in read(out)),
            10,
            "three to wait",
        )
        time.sleep(0.2)
        child.send_signal(signal.SIGINT)
        said, _ = child.communicate(timeout=10)
        frames = list(read(out))
        last = frames[-1].listeners[name]
        assert set(frames[0].listeners) == set()
        assert sum(last.queued.values()) == 3
        assert 0.15e9 <= last.oldest_ns <= time.monotonic_ns() - start
        assert said.startswith(f"{len(frames)} intervals in {out}")


class Terminal:
    """A program on a terminal of its own, 80x24."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            env = python_env({"TERM": "xterm", "LC_ALL": "C.UTF-8", "LINES": "24", "COLUMNS": "80"})
            os.execve(python(), [python(), "-m", "tidegate_tools", *arguments], env)
        ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.seen = ""

    def read(self) -> str:
        while select.select([self.fd], [], [], 0)[0]:
            try:
                self.seen += os.read(self.fd, 65536).decode(errors="replace")
            except OSError:  # it ended
                break
        return self.seen

    def press(self, keys: str) -> None:
        self.seen = ""
        os.write(self.fd, keys.encode())

    def end(self) -> int:
        """Its status; killed if it is still there."""
        try:
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                self.read()
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    return os.waitstatus_to_exitcode(status)
                time.sleep(0.02)
            os.kill(self.pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        finally:
            os.close(self.fd)


@pytest.mark.parametrize("how", ["q", "ctrl-c", "sigterm"])
def test_top_lives_on_a_terminal_and_gives_it_back(how: str) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        with closing(socket.create_connection(server.getsockname())):
            terminal = Terminal("top", "--host", "--interval", "0.1")
            try:
                wait_until(lambda: f"127.0.0.1:{port}" in terminal.read(), 10, "the listener on the screen")
                assert "\x1b[?1049h" in terminal.seen  # the other screen
                terminal.press("?")
                wait_until(lambda: "choose a listener" in terminal.read(), 5, "the help")
                if how == "sigterm":
                    os.kill(terminal.pid, signal.SIGTERM)
                else:
                    terminal.press("q" if how == "q" else "\x03")
            finally:
                status = terminal.end()
            assert status == 0
            assert "\x1b[?1049l" in terminal.seen


@pytest.mark.parametrize("size", ["80x24", "120x40"])
def test_top_prints_one_frame_into_a_pipe(size: str) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        with closing(socket.create_connection(server.getsockname())):
            done = subprocess.run(
                [python(), "-m", "tidegate_tools", "top", "--host", "--size", size],
                env=python_env(), capture_output=True, text=True, check=True,
            )  # fmt: skip
    width, height = map(int, size.split("x"))
    lines = done.stdout.splitlines()
    assert len(lines) < height
    assert max(map(len, lines)) <= width
    (row,) = [line.split() for line in lines if f"127.0.0.1:{port} " in line]
    assert row[2] == "1"
    assert "\x1b" not in done.stdout
