"""Listeners and clients for tests of the kernel half, and a network namespace to misbehave in."""

from __future__ import annotations

import ctypes
import fcntl
import os
import pickle
import select
import socket
import struct
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from harness.waiting import wait_until
from tidegate.kernel.half import KernelHalf

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1
_libc = ctypes.CDLL(None, use_errno=True)

V4 = "127.0.0.1"
V6 = "::1"


def listen(host: str = V4, port: int = 0, backlog: int = 128, reuseport: bool = False) -> socket.socket:
    """A non-blocking listener."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    if reuseport:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind((host, port))
    sock.listen(backlog)
    sock.setblocking(False)
    return sock


def connect(listener: socket.socket, timeout_s: float = 5.0) -> socket.socket:
    """A connected client."""
    host, port = listener.getsockname()[:2]
    return socket.create_connection((host, port), timeout=timeout_s)


def connect_timed(half: KernelHalf, listener: socket.socket, slot: int) -> tuple[socket.socket, int, int]:
    """(client, ns before connect(), ns when its arrival was seen): the handshake ended within them."""
    arrived = half.slots.arrived(slot)
    before = time.monotonic_ns()
    client = connect(listener)
    wait_arrived(half, [slot], arrived + 1)
    return client, before, time.monotonic_ns()


def reset(sock: socket.socket) -> None:
    """Closes with a RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def accept(listener: socket.socket, timeout_s: float = 5.0) -> socket.socket:
    """The connection that waits first. BlockingIOError when none comes.

    A client's connect() may return before the ACK it sends has been dealt with on our side.
    """
    select.select([listener], [], [], timeout_s)
    return listener.accept()[0]


def wait_arrived(half: KernelHalf, slots: Iterable[int], count: int) -> None:
    """Until that many connections have arrived in these slots, all told."""
    chosen = list(slots)
    wait_until(
        lambda: sum(half.slots.arrived(slot) for slot in chosen) >= count, 5, f"{count} arrivals", 0.0005
    )


class Members:
    """Listeners of one reuseport group, each marked with a slot of its own."""

    def __init__(self, half: KernelHalf, count: int, backlog: int = 1024) -> None:
        self.half = half
        self.listeners = [listen(backlog=backlog, reuseport=True)]
        port = self.listeners[0].getsockname()[1]
        self.listeners += [listen(port=port, backlog=backlog, reuseport=True) for _ in range(count - 1)]
        self.slots = []
        for listener in self.listeners:
            slot = half.allocate_slot()
            half.mark_listener(listener, slot, backlog)
            self.slots.append(slot)

    @property
    def pairs(self) -> list[tuple[socket.socket, int]]:
        return list(zip(self.listeners, self.slots, strict=True))

    def beat(self, *positions: int) -> None:
        """Heartbeats now, of all or of those at `positions`."""
        for position in positions or range(len(self.slots)):
            self.half.slots.heartbeat(self.slots[position], time.monotonic_ns())

    def waiting(self) -> list[int]:
        return [self.half.slots.waiting(slot) for slot in self.slots]

    def close(self) -> None:
        for listener, slot in self.pairs:
            if listener.fileno() >= 0:
                self.half.unmark_listener(listener)
                listener.close()
            self.half.reset_slot(slot)


def in_netns(function: Callable[[], T], sysctls: dict[str, str] | None = None) -> T:
    """Runs `function` in a forked child with a network namespace of its own, loopback up.

    Its result, or AssertionError with the child's traceback. The child stays in our cgroup.
    """
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read_end)
            if _libc.unshare(_CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "unshare")
            with socket.socket() as probe:
                fcntl.ioctl(probe, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP))
            for name, value in (sysctls or {}).items():
                Path("/proc/sys", *name.split(".")).write_text(value)
            answer = (True, function())
        except BaseException:
            answer = (False, traceback.format_exc())
        with os.fdopen(write_end, "wb") as pipe:
            pickle.dump(answer, pipe)
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    assert data, "the child ended without an answer"
    succeeded, result = pickle.loads(data)
    assert succeeded, result
    return result
