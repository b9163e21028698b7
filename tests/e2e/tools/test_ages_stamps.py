"""`tidegate ages` with tidegate's own stamps, while whoever should accept is stopped."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
from harness.processes import Child, python, python_env, stopped
from harness.waiting import wait_until

pytestmark = [pytest.mark.bpf, pytest.mark.root]

_HOLDER = """
import os, signal, socket, sys
from tidegate.kernel.half import KernelHalf
half = KernelHalf.start(f"agestest{os.getpid()}")
signal.signal(signal.SIGTERM, lambda *_: (half.close(), os._exit(0)))
ports = []
for host in ("127.0.0.1", "::1"):
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.bind((host, 0)); sock.listen(64)
    half.mark_listener(sock, half.allocate_slot(), 64)
    ports.append(sock)
print(*(sock.getsockname()[1] for sock in ports), flush=True)
while True:
    signal.pause()
"""


@pytest.fixture(scope="module")
def stamped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Child, list[int]]]:
    """A process with the kernel half and two listeners, IPv4 and IPv6, that it never accepts from."""
    log = tmp_path_factory.mktemp("holder") / "log"
    child = Child([python(), "-c", _HOLDER], log, env=python_env())
    try:
        text = wait_until(child.output, 60, "the ports")
        yield child, [int(word) for word in text.split()]
    finally:
        if child.process.poll() is None:
            child.process.terminate()
            child.wait(10)
        child.kill()


def listener(port: int, *, user: str = "") -> dict[str, Any]:
    prefix = ["setpriv", "--reuid", user, "--regid", "nogroup", "--clear-groups", "--"] if user else []
    done = subprocess.run(
        [*prefix, python(), "-m", "tidegate_tools", "ages", str(port), "--connections", "--json"],
        env=python_env(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    (found,) = json.loads(done.stdout)["listeners"]
    assert isinstance(found, dict)
    return found


def test_stamps_are_exact_and_come_from_outside(stamped: tuple[Child, list[int]]) -> None:
    child, ports = stamped
    with ExitStack() as stack:
        for host, port in zip(("127.0.0.1", "::1"), ports, strict=True):
            bounds = {}
            with stopped(child.pid):
                for _ in range(5):
                    start = time.monotonic_ns()
                    sock = stack.enter_context(closing(socket.create_connection((host, port))))
                    bounds[sock.getsockname()[1]] = (start, time.monotonic_ns())
                    time.sleep(0.02)
                found = listener(port)
            assert (found["waiting"], found["source"], found["gone"]) == (5, "stamp", 0)
            for entry in found["connections"]:
                assert entry["source"] == "stamp"
                low, high = bounds.pop(int(entry["client"].rpartition(":")[2]))
                assert low <= entry["established_ns"] <= high
            assert not bounds


def test_without_root_the_estimate_agrees_with_the_stamp(stamped: tuple[Child, list[int]]) -> None:
    _, ports = stamped
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(closing(socket.create_connection(("127.0.0.1", ports[0])))).sendall(b"x")
        time.sleep(0.1)
        exact = {entry["cookie"]: entry for entry in listener(ports[0])["connections"]}
        rough = listener(ports[0], user="nobody")
        assert rough["source"] == "tcp_info"
        for entry in rough["connections"]:
            # one tick of the kernel, cut to a millisecond, and what passes between answer and clock
            assert abs(entry["established_ns"] - exact[entry["cookie"]]["established_ns"]) < 15_000_000
