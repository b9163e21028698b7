"""Out of file descriptors: no spinning, no dead listener, service again by itself."""

from __future__ import annotations

import socket
import time

from harness.backends import Backend
from harness.client import run
from harness.plan import Plan
from harness.proc import Tidegate, tcp_config
from harness.processes import cpu_seconds, stat
from harness.waiting import wait_until

NOFILE = 128
FLOOD = 400
WATCHED_S = 1.5
# A loop that spins on a readable listener turns tens of thousands of times a second. One that waits turns
# for its heartbeat (20/s), its other timers, and each refused connection.
TURNS_PER_S = 1000


def turns(gate: Tidegate) -> int:
    """Iterations of the worker's loop so far."""
    (worker,) = gate.status()["workers"]
    return int(worker["loop_iterations"])


def flood(port: int, count: int) -> list[socket.socket]:
    sockets = []
    for _ in range(count):
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(("127.0.0.1", port))
        sockets.append(sock)
    return sockets


def test_the_loop_does_not_spin_and_service_resumes() -> None:
    with Backend("counting") as backend:
        config = tcp_config(
            [backend.address], max_connections=4096, accept_queue=4096, stale_after="60s", backlog=1024
        )
        with Tidegate(config, nofile=NOFILE) as gate:
            (worker,) = gate.worker_pids()
            sockets = flood(gate.port(), FLOOD)
            try:
                wait_until(lambda: gate.listener()["dropped"]["fd_exhausted"] > 0, 10, "fds to run out")
                turned, cpu, begun = turns(gate), cpu_seconds([worker]), time.monotonic()
                while time.monotonic() - begun < WATCHED_S:
                    sockets += flood(gate.port(), 1)
                    time.sleep(0.02)
                elapsed = time.monotonic() - begun
                assert (turns(gate) - turned) / elapsed < TURNS_PER_S
                assert (cpu_seconds([worker]) - cpu) / elapsed < 0.5
                logged = gate.events("fd_exhausted")
                assert 1 <= len(logged) <= 3 + elapsed, "one line a second at most"
            finally:
                for sock in sockets:
                    sock.close()
            wait_until(lambda: gate.listener()["sessions"] == 0, 10, "the flood's sessions to end")
            assert run(Plan("127.0.0.1", gate.port(), rate=200, count=40)).outcomes() == {"answered": 40}
            seen = stat(worker)
            assert seen is not None and seen.state != "Z", "the same worker serves"
            assert gate.worker_pids() == [worker]
