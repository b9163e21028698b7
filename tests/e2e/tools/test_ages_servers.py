"""`tidegate ages` in front of real servers, against the test's own clock and counts."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness.peers import HAProxy, Nginx
from harness.ports import free_port
from harness.processes import Child, python, python_env, stopped
from harness.traces import network_namespace
from harness.waiting import wait_until

from tidegate.kernel.sock_diag import info_resolution_ns


def ages(*arguments: str, exit_code: int = 0, prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    """The JSON of `tidegate ages`."""
    done = subprocess.run(
        [*prefix, python(), "-m", "tidegate_tools", "ages", "--json", *arguments],
        env=python_env(), capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == exit_code, done.stderr
    out = json.loads(done.stdout)
    assert isinstance(out, dict)
    return out


def one(*arguments: str, prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    """The only listener of the answer, with the answer's `took_ns`."""
    out = ages(*arguments, "--connections", prefix=prefix)
    (listener,) = out["listeners"]
    assert isinstance(listener, dict)
    return listener | {"took_ns": out["took_ns"]}


@dataclass
class Client:
    """A connection, and the test's clock (CLOCK_MONOTONIC, ns) around connect()."""

    sock: socket.socket
    before_ns: int
    after_ns: int

    @property
    def name(self) -> str:
        host, port = self.sock.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextmanager
def clients(host: str, port: int, number: int, apart_s: float = 0.01) -> Iterator[list[Client]]:
    with ExitStack() as stack:
        made = []
        for _ in range(number):
            before = time.monotonic_ns()
            sock = stack.enter_context(socket.create_connection((host, port), timeout=5))
            made.append(Client(sock, before, time.monotonic_ns()))
            time.sleep(apart_s)
        yield made


def assert_ages_agree(listener: dict[str, Any], made: list[Client]) -> None:
    """Each connection was established while its client's connect() ran, give or take what is stated."""
    by_client = {entry["client"]: entry for entry in listener["connections"]}
    assert set(by_client) == {client.name for client in made}
    off = 0 if listener["source"] in ("stamp", "attached") else info_resolution_ns()
    for client in made:
        entry = by_client[client.name]
        assert entry["source"] == listener["source"]
        assert client.before_ns - off <= entry["established_ns"], entry
        assert entry["established_ns"] <= client.after_ns + off + listener["took_ns"], entry
    oldest = max(entry["age_ns"] for entry in by_client.values())
    assert listener["oldest_ns"] == oldest


@contextmanager
def deaf(host: str, backlog: int = 64) -> Iterator[socket.socket]:
    """A listener that never accepts."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family, socket.SOCK_STREAM)) as sock:
        sock.bind((host, 0))
        sock.listen(backlog)
        yield sock


@pytest.mark.parametrize("peer", [Nginx, HAProxy])
def test_stopped_proxy(peer: type[Nginx] | type[HAProxy]) -> None:
    with deaf("127.0.0.1") as backend, peer(f"127.0.0.1:{backend.getsockname()[1]}") as proxy:
        with stopped(*proxy.pids), clients(proxy.host, proxy.port, 12) as made:
            listener = one(str(proxy.port))
            assert_ages_agree(listener, made)
        assert listener["waiting"] == 12
        assert listener["process"]["name"] in ("nginx", "haproxy")
        assert set(proxy.pids) <= set(listener["process"]["pids"])
        wait_until(lambda: one(str(proxy.port))["waiting"] == 0, 10, "the queue to be served")


_BUSY = """
import socket, sys, time
listener = socket.socket(); listener.bind(("127.0.0.1", 0)); listener.listen(128)
print(listener.getsockname()[1], flush=True)
while True:
    client, _ = listener.accept()   # one at a time: a sync worker
    client.recv(100); time.sleep(1000)
"""


def test_busy_sync_worker(tmp_path: Path) -> None:
    script = tmp_path / "busyserver"
    script.write_text(_BUSY)
    server = Child([python(), str(script)], tmp_path / "log", env=python_env())
    try:
        port = int(wait_until(server.output, 10, "its port"))
        with clients("127.0.0.1", port, 9) as made:
            wait_until(lambda: one(str(port))["waiting"] == 8, 5, "the worker to take the first")
            listener = one("busyserver")  # by the name of the process
            assert_ages_agree(listener, made[1:])
            assert listener["process"]["pid"] in (server.pid, *listener["process"]["pids"])
            # what the answer calls received is what was sent
            made[3].sock.sendall(b"x" * 1234)
            seen = wait_until(
                lambda: [c for c in one(str(port))["connections"] if c["received"]], 5, "the bytes to arrive"
            )
            assert [(entry["client"], entry["received"]) for entry in seen] == [(made[3].name, 1234)]
    finally:
        server.kill()


_SLOW_APP = """
import time
def app(environ, start_response):
    time.sleep(1000)
"""


def test_gunicorn_with_its_one_sync_worker_busy(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(_SLOW_APP)
    port = free_port("127.0.0.1")
    server = Child(
        [python(), "-m", "gunicorn", "--workers", "1", "--timeout", "1000", "--graceful-timeout", "1",
         "--bind", f"127.0.0.1:{port}", "--chdir", str(tmp_path), "slow:app"],
        tmp_path / "log", env=python_env(),
    )  # fmt: skip
    try:
        wait_until(lambda: "Booting worker" in server.output(), 20, "the worker")
        with clients("127.0.0.1", port, 9) as made:
            made[0].sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            wait_until(lambda: one(str(port))["waiting"] == 8, 10, "the worker to take the first")
            for client in made[1:]:
                client.sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            made[5].sock.shutdown(socket.SHUT_WR)  # it asked, and may be gone: nobody can tell
            listener = one("gunicorn", "--busy")
            assert (listener["waiting"], listener["sockets"]) == (8, 1)
            assert_ages_agree(listener, made[1:])
            assert {server.pid} <= set(listener["process"]["pids"])
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("bind", "connect"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("0.0.0.0", "127.0.0.7"),
        ("::", "127.0.0.1"),
        ("::", "::1"),
    ],
)
def test_families_and_wildcards(bind: str, connect: str) -> None:
    with deaf(bind) as server:
        port = server.getsockname()[1]
        with clients(connect, port, 3) as made:
            listener = one(str(port))
            assert (listener["waiting"], listener["backlog"], listener["gone"]) == (3, 64, 0)
            assert_ages_agree(listener, made)
            assert listener["process"]["pid"] == os.getpid()


def test_gone_clients_are_told_apart() -> None:
    with deaf("127.0.0.1") as server:
        port = server.getsockname()[1]
        with clients("127.0.0.1", port, 6) as made:
            for client in made[:2]:  # reset
                client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.sock.close()
            made[2].sock.close()  # left without a byte
            made[3].sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            made[3].sock.shutdown(socket.SHUT_WR)  # asked, and waits for its answer
            names = {made[3].name: "half-closed", made[4].name: "open", made[5].name: "open"}

            def settled() -> dict[str, Any] | None:
                seen = one(str(port))
                return seen if seen["gone"] == 3 and "half-closed" in str(seen["connections"]) else None

            listener = wait_until(settled, 5, "the resets to arrive")
            assert (listener["waiting"], listener["reset"], listener["left"]) == (6, 2, 1)
            states = {entry["client"]: entry["state"] for entry in listener["connections"]}
            assert {name: states[name] for name in names} == names
            assert sorted(states.values()) == ["half-closed", "left", "open", "open"]


def test_a_full_queue_shows_its_drops() -> None:
    with deaf("127.0.0.1", backlog=1) as server, ExitStack() as stack:
        port = server.getsockname()[1]
        for _ in range(5):
            sock = stack.enter_context(closing(socket.socket()))
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", port))
        listener = wait_until(lambda: (seen := one(str(port)))["drops"] and seen, 5, "a SYN to be dropped")
        assert listener["waiting"] == 2  # the kernel lets one more in than the backlog says
        assert listener["drops"] >= 3


def test_what_waits_no_longer_is_no_longer_shown() -> None:
    with deaf("127.0.0.1") as server:
        port = server.getsockname()[1]
        with clients("127.0.0.1", port, 4) as made:
            with closing(server.accept()[0]):
                listener = one(str(port))
                assert_ages_agree(listener, made[1:])
            assert ages("--busy", "--min-age", "1h", str(port), exit_code=3)["listeners"] == []


def test_5000_connections_over_200_listeners_in_a_second() -> None:
    script = (
        "import resource, socket, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (12000, 12000))\n"
        "keep = []\n"
        "for _ in range(200):\n"
        "    listener = socket.socket(); listener.bind(('127.0.0.1', 0)); listener.listen(64)\n"
        "    keep.append(listener)\n"
        "    keep += [socket.create_connection(listener.getsockname()) for _ in range(25)]\n"
        "print('ready', flush=True); sys.stdin.read()\n"
    )
    child = subprocess.Popen(
        ["prlimit", "--nofile=12000:12000", python(), "-c", script],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        took = []
        for _ in range(5):
            start = time.monotonic()
            out = ages(str(child.pid))
            took.append(time.monotonic() - start)
        assert len(out["listeners"]) == 200
        assert [listener["waiting"] for listener in out["listeners"]] == [25] * 200
        print(f"5,000 waiting over 200 listeners: {min(took):.3f} to {max(took):.3f} s, interpreter included")
        assert min(took) < 1.0
    finally:
        child.communicate("")


_IN_NAMESPACE = """
import socket, sys, time
listener = socket.socket(); listener.bind(("127.0.0.1", 8080)); listener.listen(77)
clients = [socket.create_connection(("127.0.0.1", 8080)) for _ in range(int(sys.argv[1]))]
print("ready", flush=True); sys.stdin.read()
"""


@pytest.mark.root
def test_two_namespaces() -> None:
    with ExitStack() as stack:
        names = [stack.enter_context(network_namespace()) for _ in range(2)]
        for waiting, name in zip((3, 5), names, strict=True):
            child = subprocess.Popen(
                ["ip", "netns", "exec", name, python(), "-c", _IN_NAMESPACE, str(waiting)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            stack.callback(child.communicate, "")
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        first = one("8080", "--netns", names[0])
        assert (first["netns"], first["waiting"], first["backlog"]) == (names[0], 3, 77)
        assert first["process"] is not None
        everywhere = {
            listener["netns"]: listener["waiting"]
            for listener in ages("8080", "--all-netns")["listeners"]
            if listener["netns"] in names
        }
        assert everywhere == {names[0]: 3, names[1]: 5}
        assert ages("8080", "--netns", names[0], "--netns", names[1])["listeners"][0]["waiting"] in (3, 5)


@pytest.mark.root
def test_without_root_it_shows_what_it_may() -> None:
    with deaf("127.0.0.1") as server:
        port = server.getsockname()[1]
        prefix = ("setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups", "--")
        with clients("127.0.0.1", port, 2) as made:
            listener = one(str(port), prefix=prefix)
            assert_ages_agree(listener, made)
            assert (listener["source"], listener["process"]) == ("tcp_info", None)
            notes = ages(str(port), prefix=prefix)["notes"]
            assert any("stamps" in note for note in notes)
            assert any("processes" in note for note in notes)
            notes = ages(str(port), "--all-netns", prefix=prefix)["notes"]
            assert any("network namespaces" in note for note in notes)


def test_watch_ends_quietly() -> None:
    child = subprocess.Popen(
        [python(), "-m", "tidegate_tools", "ages", "--json", "--watch", "0.1"],
        env=python_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    frames = [json.loads(child.stdout.readline()) for _ in range(3)]
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=10)
    assert frames[0]["monotonic_ns"] < frames[1]["monotonic_ns"] < frames[2]["monotonic_ns"]
    assert (child.returncode, errors) == (130, "")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nosuchserver"], 3, "no TCP listener matches"),
        (["--netns", "nosuchnamespace"], 2, "no network namespace"),
        (["--min-age", "5"], 2, "unit"),
        (["--sort", "colour"], 2, "colour"),
    ],
)
def test_refusals(arguments: list[str], code: int, words: str) -> None:
    done = subprocess.run(
        [python(), "-m", "tidegate_tools", "ages", *arguments],
        env=python_env(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
