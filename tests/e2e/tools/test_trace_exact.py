"""What `tidegate trace` counts and times where it is not plain: questions, data, mixed services, cost."""

from __future__ import annotations

import ctypes
import json
import socket
import subprocess
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from harness.ports import free_port
from harness.processes import python, python_env
from harness.traces import Trace, attached, cgroup, inside, listener, network_namespace, traced
from harness.waiting import wait_until

from tidegate.kernel.sock_diag import info_resolution_ns
from tidegate_tools.arrivals import RECHECK_NS

pytestmark = [pytest.mark.bpf, pytest.mark.root]

_libc = ctypes.CDLL(None, use_errno=True)
_SO_PEERNAME = 28


def serve(server: socket.socket, number: int = 1) -> None:
    """Connects, accepts with the address, closes, so many times."""
    for _ in range(number):
        with closing(socket.create_connection(server.getsockname()[:2])):
            server.accept()[0].close()


def accept_without_asking(server: socket.socket) -> socket.socket:
    fd = _libc.accept(server.fileno(), None, None)
    assert fd >= 0
    return socket.socket(fileno=fd)


def ages(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [python(), "-m", "tidegate_tools", "ages", "--json", "--connections", *arguments],
        env=python_env(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    (found,) = json.loads(done.stdout)["listeners"]
    assert isinstance(found, dict)
    return found


def until(trace: Trace, what: str, path: Path, programs: int) -> None:
    wait_until(lambda: trace.next() and attached(path) == programs, 20, what)


def test_the_costlier_program_goes_once_the_service_is_known() -> None:
    with cgroup() as path, listener(path) as server, traced("--cgroup", str(path), "--cost") as trace:
        assert attached(path) == 1
        serve(server, 63)
        trace.next()
        assert attached(path) == 1, "not known yet"
        serve(server, 1)
        until(trace, "the program to go", path, 0)
        serve(server, 2000)
        summary = trace.finish()
    assert (summary["arrived"], summary["accepted"], summary["untimed"]) == (2064, 2064, 0)
    runs: dict[str, int] = {}
    for cost in summary["cost"]:
        runs[cost["name"]] = runs.get(cost["name"], 0) + cost["runs"]
    assert runs["trace_accept"] == 2064, "one run each"
    assert runs["trace_sockops"] < 5 * 200
    per_connection = sum(cost["run_ns"] for cost in summary["cost"]) / summary["arrived"]
    print(f"trace: {per_connection:.0f} ns per connection")


def test_one_that_never_asks_is_counted_to_the_end() -> None:
    with cgroup() as path, listener(path) as server, traced("--cgroup", str(path)) as trace:
        for _ in range(150):
            client = socket.create_connection(server.getsockname())
            with closing(client), closing(accept_without_asking(server)) as accepted:
                accepted.getpeername()  # asks later: that is no accept
        trace.next()
        trace.next()
        assert attached(path) == 1
        summary = trace.finish()
    assert (summary["arrived"], summary["accepted"], summary["untimed"]) == (150, 0, 150)


def test_a_second_server_that_does_not_ask_is_found_out() -> None:
    with (
        cgroup() as path,
        listener(path) as asks,
        listener(path) as other,
        traced("--cgroup", str(path)) as trace,
        ExitStack() as stack,
    ):
        serve(asks, 70)
        until(trace, "the program to go", path, 0)

        def once() -> None:
            stack.enter_context(closing(socket.create_connection(other.getsockname())))
            stack.enter_context(closing(accept_without_asking(other)))

        def kept() -> bool:
            """Whether each one is counted for good: for longer than it is tried."""
            begun = time.monotonic_ns()
            while time.monotonic_ns() - begun < RECHECK_NS + 500_000_000:
                once()
                trace.next()
                if attached(path) == 0:
                    return False
            return True

        wait_until(kept, 40, "it to be found out")
        serve(asks, 100)
        trace.next()
        summary = trace.finish()
    assert summary["accepted"] == 170
    assert summary["untimed"] > 0
    assert summary["arrived"] == summary["accepted"] + summary["untimed"]


@pytest.mark.parametrize("known", [False, True])
def test_who_asks_again_is_counted_once(known: bool) -> None:
    with (
        cgroup() as path,
        listener(path) as server,
        traced("--cgroup", str(path)) as trace,
        ExitStack() as stack,
    ):
        if known:
            serve(server, 70)
            until(trace, "the program to go", path, 0)
        accepted = []
        for _ in range(10):
            stack.enter_context(closing(socket.create_connection(server.getsockname())))
            accepted.append(stack.enter_context(closing(server.accept()[0])))
        time.sleep(0.05)
        for sock in accepted:
            sock.getpeername()
            sock.getsockopt(socket.SOL_SOCKET, _SO_PEERNAME, 16)
            sock.sendall(b"x")
        with inside(path):  # what the service connects to is not what it accepts
            for _ in range(10):
                with closing(socket.create_connection(server.getsockname())) as out:
                    out.getpeername()
                    stack.enter_context(closing(server.accept()[0]))
        summary = trace.finish()
    number = 20 + 70 * known
    assert (summary["arrived"], summary["accepted"], summary["untimed"]) == (number, number, 0)
    assert summary["ages"]["max_ns"] < 50_000_000


def test_what_waits_when_it_begins_is_timed_from_its_own_begin() -> None:
    with cgroup() as path, listener(path) as server, ExitStack() as stack:
        bounds = []
        for _ in range(4):
            start = time.monotonic_ns()
            stack.enter_context(closing(socket.create_connection(server.getsockname())))
            bounds.append((start, time.monotonic_ns()))
        with traced("--cgroup", str(path)) as trace:
            before = time.monotonic_ns()
            for _ in range(4):
                stack.enter_context(closing(server.accept()[0]))
            after = time.monotonic_ns()
            summary = trace.finish()
    assert (summary["arrived"], summary["accepted"], summary["waiting"]) == (0, 4, 0)
    assert sum(before - end for _, end in bounds) <= summary["ages"]["sum_ns"] + 4000
    assert summary["ages"]["sum_ns"] <= sum(after - start for start, _ in bounds) + 4000


@pytest.mark.parametrize(
    ("bind", "connect"), [("127.0.0.1", "127.0.0.1"), ("::", "127.0.0.1"), ("::1", "::1")]
)
def test_data_and_fins_change_no_age(bind: str, connect: str) -> None:
    with cgroup() as path, listener(path, bind) as server, ExitStack() as stack:
        port = server.getsockname()[1]
        with traced("--cgroup", str(path)) as trace:
            bounds = {}
            for number in range(4):
                start = time.monotonic_ns()
                client = stack.enter_context(closing(socket.create_connection((connect, port))))
                bounds[client.getsockname()[1]] = (start, time.monotonic_ns())
                for _ in range(10 * number):
                    client.sendall(b"x" * 1000)  # all of it within any window, or a FIN would wait
                    time.sleep(0.002)
                if number == 3:
                    client.shutdown(socket.SHUT_WR)
            time.sleep(0.05)
            seen = ages(str(port))
            assert seen["source"] == "attached"
            for entry in seen["connections"]:
                low, high = bounds[int(entry["client"].rpartition(":")[2])]
                assert low - 1000 <= entry["established_ns"] <= high
            early = time.monotonic_ns()
            for _ in range(4):
                stack.enter_context(closing(server.accept()[0]))
            late = time.monotonic_ns()
            summary = trace.finish()
    assert (summary["accepted"], summary["half_closed"]) == (4, 1)
    low = sum(early - high for _, high in bounds.values())
    high = sum(late - low for low, _ in bounds.values()) + 4000
    assert low <= summary["ages"]["sum_ns"] <= high


def test_a_reused_port_is_a_new_connection() -> None:
    """The same four-tuple twice: the second is no older than itself."""
    with (
        cgroup() as path,
        listener(path) as server,
        traced("--cgroup", str(path)) as trace,
        ExitStack() as stack,
    ):
        port = free_port("127.0.0.1")  # none that others' connections may have
        for _ in range(4):
            client = stack.enter_context(closing(socket.socket()))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.bind(("127.0.0.1", port))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.connect(server.getsockname())
            server.accept()[0].close()
            client.close()  # a reset: the port is free at once
            time.sleep(0.2)
        summary = trace.finish()
    assert summary["accepted"] == 4
    assert summary["ages"]["max_ns"] < 150_000_000


def test_ages_of_one_cgroup_are_exact_when_asked_for() -> None:
    with (
        cgroup() as path,
        cgroup() as elsewhere,
        listener(path) as server,
        listener(elsewhere) as other,
        ExitStack() as stack,
    ):
        bounds = {}
        for sock in (server, other):
            start = time.monotonic_ns()
            client = stack.enter_context(closing(socket.create_connection(sock.getsockname())))
            bounds[client.getsockname()[1]] = (start, time.monotonic_ns())
        for sock, source, off in ((server, "attached", 1000), (other, "tcp_info", info_resolution_ns())):
            port = str(sock.getsockname()[1])
            (entry,) = ages(port, "--attach", str(path))["connections"]
            low, high = bounds[int(entry["client"].rpartition(":")[2])]
            assert entry["source"] == source
            assert low - off <= entry["established_ns"] <= high + off + 20_000_000 * (off > 1000)
        assert attached(path) == 0


_IN_NAMESPACE = """
import socket, sys
listener = socket.socket(); listener.bind(("127.0.0.1", 8080)); listener.listen(77)
print("ready", flush=True)
clients, accepted = [], []
for line in sys.stdin:
    if line == "connect\\n":
        clients.append(socket.create_connection(("127.0.0.1", 8080)))
    elif line == "accept\\n":
        accepted.append(listener.accept())
    print("done", flush=True)
"""


def test_a_service_in_a_network_namespace_of_its_own() -> None:
    with cgroup() as path, network_namespace() as name, ExitStack() as stack:
        with inside(path):
            child = subprocess.Popen(
                ["ip", "netns", "exec", name, python(), "-c", _IN_NAMESPACE],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        stack.callback(child.communicate, "")
        assert child.stdin is not None and child.stdout is not None

        def do(what: str) -> tuple[int, int]:
            start = time.monotonic_ns()
            child.stdin.write(what + "\n")
            child.stdin.flush()
            assert child.stdout.readline() == "done\n"
            return start, time.monotonic_ns()

        assert child.stdout.readline() == "ready\n"
        with traced("--pid", str(child.pid)) as trace:
            low, high = do("connect")
            do("connect")
            seen = ages("8080", "--netns", name)
            assert (seen["waiting"], seen["source"]) == (2, "attached")
            oldest = max(seen["connections"], key=lambda entry: entry["age_ns"])
            assert low <= oldest["established_ns"] <= high
            do("accept")
            summary = trace.finish()
    assert (summary["arrived"], summary["accepted"], summary["waiting"]) == (2, 1, 1)
