"""A running `tidegate trace`, and services in cgroups of their own for it to look at."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from harness.processes import python, python_env
from harness.waiting import wait_until
from tidegate.kernel import bpf
from tidegate.kernel.cgroup import mount_point, own_cgroup


@contextmanager
def cgroup() -> Iterator[Path]:
    """A cgroup of the test's own, below the one it runs in."""
    path = mount_point() / own_cgroup().lstrip("/") / f"tgtrace{os.getpid()}-{time.monotonic_ns() % 10**6}"
    path.mkdir()
    try:
        yield path
    finally:
        wait_until(lambda: not (path / "cgroup.procs").read_text(), 5, "the cgroup to be empty")
        path.rmdir()


@contextmanager
def inside(path: Path) -> Iterator[None]:
    """This process is in the cgroup while the block runs: what it starts and opens is, too."""
    back = mount_point() / own_cgroup().lstrip("/")
    (path / "cgroup.procs").write_text(f"{os.getpid()}")
    try:
        yield
    finally:
        (back / "cgroup.procs").write_text(f"{os.getpid()}")


class Trace:
    """A running `tidegate trace --json`."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [python(), "-m", "tidegate_tools", "trace", "--json", "--interval", "0.1", *arguments],
            env=python_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.next()  # it is attached by then

    def next(self) -> dict[str, Any]:
        """The next interval."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.stderr and self.process.stderr.read()
        out: dict[str, Any] = json.loads(line)
        return out

    def finish(self) -> dict[str, Any]:
        """Interrupts it; its summary."""
        self.process.send_signal(signal.SIGINT)
        out, errors = self.process.communicate(timeout=20)
        assert (self.process.returncode, errors) == (0, ""), (self.process.returncode, errors)
        summary: dict[str, Any] = json.loads(out.splitlines()[-1])
        assert summary["kind"] == "summary"
        return summary


@contextmanager
def traced(*arguments: str) -> Iterator[Trace]:
    trace = Trace(*arguments)
    try:
        yield trace
    finally:
        if trace.process.poll() is None:
            trace.process.kill()
        trace.process.communicate()


@contextmanager
def listener(path: Path, host: str = "127.0.0.1", backlog: int = 64) -> Iterator[socket.socket]:
    with inside(path):
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    with closing(sock):
        sock.bind((host, 0))
        sock.listen(backlog)
        yield sock


def attached(path: Path) -> int:
    directory = os.open(path, os.O_RDONLY)
    try:
        return len(bpf.cgroup_prog_ids(directory, bpf.AttachType.CGROUP_SOCK_OPS))
    finally:
        os.close(directory)


@contextmanager
def network_namespace() -> Iterator[str]:
    name = f"tg{os.getpid()}{time.monotonic_ns() % 10**6}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)
