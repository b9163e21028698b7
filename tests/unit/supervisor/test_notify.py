"""What systemd is told, as datagrams on its socket."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tidegate.supervisor.notify import Notifier
from tidegate.supervisor.upgrade import successor_environment


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(5)
        yield sock


def test_every_message(systemd: socket.socket) -> None:
    notifier = Notifier(systemd.getsockname())
    notifier.ready("2 workers")
    assert systemd.recv(1000) == b"READY=1\nSTATUS=2 workers"
    before = time.monotonic_ns() // 1000
    notifier.reloading()
    said = dict(line.split("=") for line in systemd.recv(1000).decode().splitlines())
    assert said["RELOADING"] == "1"
    assert before <= int(said["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    notifier.stopping("bye")
    assert systemd.recv(1000) == b"STOPPING=1\nSTATUS=bye"
    notifier.status("fine")
    assert systemd.recv(1000) == b"STATUS=fine"
    notifier.watchdog()
    assert systemd.recv(1000) == b"WATCHDOG=1"
    notifier.main_pid(77)
    assert systemd.recv(1000) == b"MAINPID=77"


def test_the_environment_names_the_socket(systemd: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", systemd.getsockname())
    Notifier().ready("x")
    assert systemd.recv(1000).startswith(b"READY=1")


def test_an_abstract_socket() -> None:
    name = f"tidegate-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{name}")
        sock.settimeout(5)
        Notifier(f"@{name}").status("x")
        assert sock.recv(100) == b"STATUS=x"


def test_without_systemd_or_with_a_dead_one_nothing_happens(tmp_path: Path) -> None:
    Notifier().ready("x")
    Notifier("").watchdog()
    Notifier(str(tmp_path / "nobody")).ready("x")


@pytest.mark.parametrize(
    ("usec", "pid", "address", "ns"),
    [
        ("3000000", None, "/x", 1_500_000_000),
        ("3000000", str(os.getpid()), "/x", 1_500_000_000),
        ("3000000", "1", "/x", 0),
        ("3000000", None, "", 0),
        ("", None, "/x", 0),
        ("soon", None, "/x", 0),
    ],
)
def test_the_watchdog_is_fed_at_half_its_limit(
    usec: str, pid: str | None, address: str, ns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    if pid is not None:
        monkeypatch.setenv("WATCHDOG_PID", pid)
    assert Notifier(address).watchdog_ns == ns


def test_a_successor_feeds_the_watchdog_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))  # as systemd says it to us
    environment = successor_environment(7)
    with monkeypatch.context() as its:
        its.setattr(os, "environ", environment)
        its.setattr(os, "getpid", lambda: 1234567)
        assert Notifier("/x").watchdog_ns == 1_500_000_000
