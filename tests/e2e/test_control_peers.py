"""The control socket of a running tidegate under hostile peers: traffic and other operators never notice."""

from __future__ import annotations

import json
import os
import pwd
import random
import socket
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest
from harness.backends import Backend
from harness.line_client import LineClient
from harness.proc import Tidegate, tcp_config
from harness.processes import python, python_env
from harness.waiting import wait_until

from tidegate.control.client import call

ASK = """
import json, os, socket, sys
os.setgroups([]); os.setgid(int(sys.argv[3])); os.setuid(int(sys.argv[2]))
sock = socket.socket(socket.AF_UNIX)
try:
    sock.connect(sys.argv[1])
    try:
        sock.sendall(b'{"v":1,"id":1,"verb":"workers","args":{}}' + bytes([10]))
    except BrokenPipeError:
        pass  # turned away already: the answer says why
    answer = json.loads(sock.makefile().readline())
    print("ok" if answer["ok"] else answer["error"]["code"])
except PermissionError:
    print("EACCES")
"""


@pytest.fixture
def gate() -> Iterator[Tidegate]:
    with Backend("echo") as backend, Tidegate(tcp_config([backend.address], workers=2)) as one:
        yield one


def connect(gate: Tidegate) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(gate.control)
    return sock


def ask_as(gate: Tidegate, user: str) -> str:
    who = pwd.getpwnam(user)
    done = subprocess.run(
        [python(), "-c", ASK, gate.control, str(who.pw_uid), str(who.pw_gid)],
        capture_output=True, text=True, timeout=20, env=python_env(), check=True,
    )  # fmt: skip
    return done.stdout.strip()


@pytest.mark.root
def test_a_stranger_is_kept_out_by_the_mode_and_by_the_list(gate: Tidegate) -> None:
    assert os.stat(gate.control).st_mode & 0o777 == 0o600
    assert ask_as(gate, "nobody") == "EACCES"
    config = gate._config
    assert isinstance(config, dict)
    gate.write_config({**config, "control_users": ["nobody"]})
    gate.call("reload")
    assert ask_as(gate, "nobody") == "ok"
    assert ask_as(gate, "daemon") == "forbidden"
    (refusal,) = gate.events("control_refused")
    assert refusal["uid"] == str(pwd.getpwnam("daemon").pw_uid)
    gate.write_config(config)
    gate.call("reload")
    assert os.stat(gate.control).st_mode & 0o777 == 0o600
    assert ask_as(gate, "nobody") == "EACCES"


def test_a_storm_of_bad_peers_disturbs_nobody(gate: Tidegate) -> None:
    """Malformed, huge, slow, silent, half-closed and vanishing peers, while clients and operators measure."""
    ending = threading.Event()
    random_bytes = random.Random(8).randbytes(65536)

    def storm(kind: int) -> None:
        while not ending.is_set():
            try:
                with connect(gate) as sock:
                    if kind == 0:
                        sock.sendall(random_bytes)
                    elif kind == 1:
                        for _ in range(40):
                            sock.sendall(b"x" * 65536)
                    elif kind == 2:
                        for byte in b'{"v":1,"id"':
                            sock.sendall(bytes([byte]))
                            if ending.wait(0.05):
                                break
                    elif kind == 3:
                        sock.sendall(b'{"v":1,"id":1,"verb":"sessions","args":{}}\n' * 20)
                    elif kind == 4:
                        sock.sendall(b'{"v":1,"id":1,"verb":"status","args":{}}\n')
                        sock.shutdown(socket.SHUT_WR)
                        while sock.recv(65536):
                            pass
                    else:
                        ending.wait(0.5)
            except OSError:
                continue
            ending.wait(0.01)

    threads = [threading.Thread(target=storm, args=(kind,)) for kind in range(6)]
    for thread in threads:
        thread.start()
    try:
        deadline = time.monotonic() + 4
        slowest = 0.0
        while time.monotonic() < deadline:
            begun = time.monotonic()
            assert len(call(gate.control, "workers")["workers"]) == 2
            with LineClient(gate.port()) as client:
                assert client.ask("hello") == "hello"
            slowest = max(slowest, time.monotonic() - begun)
        assert slowest < 2.0
    finally:
        ending.set()
        for thread in threads:
            thread.join(15)
    assert [worker["restarts"] for worker in gate.status()["workers"]] == [0, 0]
    assert "Traceback" not in gate.log()
    wait_until(lambda: len(os.listdir(f"/proc/{gate.supervisor_pid}/fd")) < 200, 5, "their fds to go")


def test_a_hundred_operators_at_once(gate: Tidegate) -> None:
    socks = [connect(gate) for _ in range(100)]
    verbs = ["status", "sessions", "clusters", "errors", "workers"]
    for number, sock in enumerate(socks):
        request = {"v": 1, "id": number, "verb": verbs[number % len(verbs)], "args": {}}
        sock.sendall(json.dumps(request).encode() + b"\n")
    answers = []
    for sock in socks:
        with sock.makefile("rb") as lines:
            answers.append(json.loads(lines.readline()))
        sock.close()
    assert [answer["id"] for answer in answers] == list(range(100))
    # those that ask workers may be told to come again: so many questions are under way at most
    assert {answer["error"]["code"] for answer in answers if not answer["ok"]} <= {"busy"}
    assert sum(answer["ok"] for answer in answers) >= 40
