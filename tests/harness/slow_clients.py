"""Slow-loris: clients that send a head a byte at a time and never end it, in a process of their own.

`python -m harness.slow_clients HOST PORT COUNT INTERVAL_MS` connects them, says {"ready": true}, sends each a
byte every interval, evenly spread, and answers each line on stdin with what it counted so far. It ends with
its stdin. Use it through `SlowClients`.
"""

from __future__ import annotations

import json
import resource
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from harness.processes import Child, python, python_env

_HEAD = b"GET / HTTP/1.1\r\nHost: slow.example\r\nX-Slow: "
_TICK_S = 0.01


class SlowClients:
    """`count` of them, connected when the block begins; `counts()` says what became of them."""

    def __init__(self, port: int, count: int, interval_ms: int, host: str = "127.0.0.1") -> None:
        self._arguments = [host, str(port), str(count), str(interval_ms)]
        self._directory = tempfile.TemporaryDirectory(prefix="tg-slow-")
        self._child: Child | None = None

    def __enter__(self) -> Self:
        self._child = Child(
            [python(), "-m", "harness.slow_clients", *self._arguments],
            Path(self._directory.name) / "log",
            env=python_env(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._read()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        assert self._child is not None
        self._child.kill()
        self._directory.cleanup()

    def counts(self) -> dict[str, int]:
        """`open`, `sent` (bytes after the first ones), `answered_408` and otherwise, `ended` unanswered."""
        assert self._child is not None and self._child.process.stdin is not None
        self._child.process.stdin.write(b"counts\n")
        self._child.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._child is not None and self._child.process.stdout is not None
        line = self._child.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the slow clients died: {self._child.output()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class _Clients:
    def __init__(self, host: str, port: int, count: int, interval_s: float) -> None:
        self._interval_s = interval_s
        self._by_fd: dict[int, socket.socket] = {}
        self._due: deque[tuple[float, int]] = deque()
        self._answered: dict[int, bytes] = {}
        self._epoll = select.epoll()
        self._counts = {"sent": 0, "answered_408": 0, "answered_otherwise": 0, "ended": 0}
        begun = time.monotonic()
        for at in range(count):
            sock = socket.create_connection((host, port), 10)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(_HEAD)
            sock.setblocking(False)
            self._by_fd[sock.fileno()] = sock
            self._answered[sock.fileno()] = b""
            self._epoll.register(sock.fileno(), select.EPOLLIN)
            self._due.append((begun + interval_s * at / count, sock.fileno()))
        self._epoll.register(sys.stdin.fileno(), select.EPOLLIN)

    def run(self) -> None:
        while True:
            for fd, _mask in self._epoll.poll(_TICK_S):
                if fd != sys.stdin.fileno():
                    self._hear(fd)
                elif sys.stdin.readline():
                    print(json.dumps({"open": len(self._by_fd), **self._counts}), flush=True)
                else:
                    return
            now = time.monotonic()
            while self._due and self._due[0][0] <= now:
                due, fd = self._due.popleft()
                if fd in self._by_fd:
                    self._trickle(fd)
                    self._due.append((due + self._interval_s, fd))

    def _trickle(self, fd: int) -> None:
        try:
            self._by_fd[fd].send(b"x")
            self._counts["sent"] += 1
        except BlockingIOError:
            pass
        except OSError:
            self._end(fd)

    def _hear(self, fd: int) -> None:
        try:
            data = self._by_fd[fd].recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._answered[fd] += data
        else:
            self._end(fd)

    def _end(self, fd: int) -> None:
        answer = self._answered.pop(fd)
        if answer.startswith(b"HTTP/1.1 408 "):
            self._counts["answered_408"] += 1
        elif answer:
            self._counts["answered_otherwise"] += 1
        else:
            self._counts["ended"] += 1
        self._epoll.unregister(fd)
        self._by_fd.pop(fd).close()


def main() -> None:
    host, port, count, interval_ms = sys.argv[1:]
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    clients = _Clients(host, int(port), int(count), int(interval_ms) / 1000)
    print(json.dumps({"ready": True}), flush=True)
    clients.run()


if __name__ == "__main__":
    main()
