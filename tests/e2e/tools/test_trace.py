"""`tidegate trace` on services that know nothing of it, by counts and by the test's own clock."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import struct
import subprocess
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from harness.peers import HAProxy, Nginx
from harness.processes import Child, python, python_env, stopped
from harness.traces import attached, cgroup, inside, listener, traced
from harness.waiting import wait_until

from tidegate.kernel.cgroup import mount_point

pytestmark = [pytest.mark.bpf, pytest.mark.root]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_ages_at_accept_by_the_tests_clock(host: str) -> None:
    with cgroup() as path, listener(path, host) as server, traced("--cgroup", str(path)) as trace:
        bounds = []
        with ExitStack() as stack:
            before = []
            for _ in range(6):
                start = time.monotonic_ns()
                stack.enter_context(closing(socket.create_connection(server.getsockname()[:2])))
                before.append((start, time.monotonic_ns()))
            time.sleep(0.25)
            for start, connected in before:
                early = time.monotonic_ns()
                stack.enter_context(closing(server.accept()[0]))
                bounds.append((early - connected, time.monotonic_ns() - start))
        summary = trace.finish()
    assert (summary["arrived"], summary["accepted"], summary["waiting"], summary["untimed"]) == (6, 6, 0, 0)
    ages = summary["ages"]
    assert sum(low for low, _ in bounds) <= ages["sum_ns"] <= sum(high for _, high in bounds)
    assert max(low for low, _ in bounds) <= ages["max_ns"] <= max(high for _, high in bounds)
    assert sum(ages["buckets"]) == 6


def test_gone_waiting_and_high_water() -> None:
    with (
        cgroup() as path,
        listener(path) as server,
        traced("--cgroup", str(path)) as trace,
        ExitStack() as stack,
    ):
        clients = [
            stack.enter_context(closing(socket.create_connection(server.getsockname()))) for _ in range(5)
        ]
        since = time.monotonic_ns()
        clients[0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        clients[0].close()
        clients[1].shutdown(socket.SHUT_WR)
        seen = wait_until(lambda: (one := trace.next())["waiting"] == 5 and one, 10, "five to wait")
        assert seen["waiting_gone"] == 2
        for _ in range(3):
            stack.enter_context(closing(server.accept()[0]))
        time.sleep(0.3)
        least = time.monotonic_ns() - since
        summary = trace.finish()
    assert (summary["arrived"], summary["accepted"], summary["waiting"]) == (5, 3, 2)
    assert (summary["gone"], summary["half_closed"], summary["waiting_gone"]) == (1, 1, 0)
    assert summary["high_water_ns"] >= least - 10_000_000


def test_what_waited_before_is_told_apart() -> None:
    with cgroup() as path, listener(path) as server, ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(closing(socket.create_connection(server.getsockname())))
        with traced("--cgroup", str(path)) as trace:
            for _ in range(3):
                stack.enter_context(closing(server.accept()[0]))
            summary = trace.finish()
    assert (summary["arrived"], summary["accepted"], summary["waited_before"]) == (0, 3, 3)


@pytest.mark.parametrize("peer", [Nginx, HAProxy])
def test_a_stalled_proxy_by_its_pid(peer: type[Nginx] | type[HAProxy]) -> None:
    with cgroup() as path, closing(socket.create_server(("127.0.0.1", 0))) as backend:
        with inside(path):
            proxy = peer(f"127.0.0.1:{backend.getsockname()[1]}")
            proxy.__enter__()
        try:
            with traced("--pid", str(proxy.pids[0])) as trace, ExitStack() as stack:
                with stopped(*proxy.pids) as span:
                    for _ in range(8):
                        address = (proxy.host, proxy.port)
                        stack.enter_context(closing(socket.create_connection(address)))
                    made = time.monotonic_ns()
                    time.sleep(0.3)
                wait_until(lambda: trace.next()["waiting"] == 0, 10, "the proxy to catch up")
                summary = trace.finish()
                assert (summary["arrived"], summary["accepted"], summary["untimed"]) == (8, 8, 0)
                assert summary["ages"]["max_ns"] >= span.until_ns - made
                assert summary["ages"]["p50_ns"] >= 134_217_728 > 0.3e9 / 4  # their bucket's lower bound
        finally:
            proxy.__exit__(None, None, None)


def test_ages_uses_the_stamps() -> None:
    with cgroup() as path, listener(path) as server, ExitStack() as stack:
        port = server.getsockname()[1]

        def connect() -> tuple[int, int]:
            start = time.monotonic_ns()
            stack.enter_context(closing(socket.create_connection(("127.0.0.1", port))))
            return start, time.monotonic_ns()

        earlier = connect()
        with traced("--cgroup", str(path)) as trace:
            later = connect()
            done = subprocess.run(
                [python(), "-m", "tidegate_tools", "ages", "--json", "--connections", str(port)],
                env=python_env(), capture_output=True, text=True, check=True,
            )  # fmt: skip
            trace.finish()
        (row,) = json.loads(done.stdout)["listeners"]
        first, second = row["connections"]
        assert (first["source"], second["source"]) == ("tcp_info", "attached")
        assert later[0] <= second["established_ns"] <= later[1]
        assert first["established_ns"] >= earlier[0] - 10_000_000
        assert row["source"] == "tcp_info"  # the least exact of its ages


def test_a_server_that_does_not_ask_is_said_to_be_untimed() -> None:
    with (
        cgroup() as path,
        listener(path) as server,
        traced("--cgroup", str(path)) as trace,
        ExitStack() as stack,
    ):
        libc = ctypes.CDLL(None, use_errno=True)
        for _ in range(3):
            stack.enter_context(closing(socket.create_connection(server.getsockname())))
            fd = libc.accept(server.fileno(), None, None)
            assert fd >= 0
            stack.callback(os.close, fd)
        summary = trace.finish()
    assert (summary["arrived"], summary["accepted"], summary["untimed"]) == (3, 0, 3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_nothing_stays_attached(number: signal.Signals) -> None:
    with cgroup() as path, traced("--cgroup", str(path)) as trace:
        assert attached(path) == 1
        trace.process.send_signal(number)
        trace.process.communicate(timeout=20)
        assert trace.process.returncode == (-9 if number is signal.SIGKILL else 0)
        wait_until(lambda: attached(path) == 0, 5, "the kernel to detach")


def test_cost_is_said(tmp_path: Path) -> None:
    with cgroup() as path, listener(path) as server, traced("--cgroup", str(path), "--cost") as trace:
        for _ in range(200):
            with closing(socket.create_connection(server.getsockname())):
                server.accept()[0].close()
        summary = trace.finish()
    assert {cost["name"]: cost["runs"] >= 200 for cost in summary["cost"] if cost["runs"]} == {
        "trace_sockops": True, "trace_accept": True,
    }  # fmt: skip
    per_connection = sum(cost["run_ns"] for cost in summary["cost"]) / summary["arrived"]
    print(f"trace: {per_connection:.0f} ns per connection, {len(summary['cost'])} programs")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "name the service"),
        (["--cgroup", "/x", "--pid", "1"], 2, "one of them"),
        (["--cgroup", str(mount_point())], 2, "root cgroup"),
        (["--cgroup", "/nonexistent/cgroup"], 1, "/nonexistent/cgroup"),
        (["--cgroup", "/tmp"], 1, "/tmp is not a cgroup v2 directory"),
        (["--pid", "4194304"], 1, "no process"),
    ],
)
def test_refusals(arguments: list[str], code: int, words: str) -> None:
    done = subprocess.run(
        [python(), "-m", "tidegate_tools", "trace", *arguments],
        env=python_env(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (code, False)
    assert words in done.stderr


def test_without_root(tmp_path: Path) -> None:
    with cgroup() as path:
        child = Child(
            [python(), "-m", "tidegate_tools", "trace", "--cgroup", str(path)], tmp_path / "log",
            env=python_env(), user="nobody",
        )  # fmt: skip
        assert child.wait(30) == 1
        assert "root" in child.output()
        assert "Traceback" not in child.output()
