"""A blocking client that speaks in lines, for tests that go step by step."""

from __future__ import annotations

import socket
import struct
from types import TracebackType
from typing import Self


class LineClient:
    """One connection. `end()` tells how the other side ended it."""

    def __init__(self, port: int, host: str = "127.0.0.1", timeout_s: float = 10.0) -> None:
        self._buffer = b""
        self._reset = False
        self.sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.sock.settimeout(timeout_s)
        try:
            self.sock.connect((host, port))
        except ConnectionResetError:  # made, and ended before we looked: `end` tells
            self._reset = True
        else:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self.sock.close()

    def __del__(self) -> None:
        # a test that fails half-way leaves clients behind: the failure is the news, not the open socket
        if hasattr(self, "sock"):
            self.sock.close()

    def say(self, line: str) -> Self:
        self.sock.sendall(line.encode() + b"\n")
        return self

    def hear(self) -> str:
        """The next line, without its end (LF or CR LF).

        Raises:
            EOFError: the connection ended before one was whole.
            OSError: it was reset, or nothing came in time.
        """
        while b"\n" not in self._buffer:
            data = self.sock.recv(65536)
            if not data:
                raise EOFError(f"after {self._buffer!r}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.rstrip(b"\r").decode()

    def ask(self, line: str) -> str:
        return self.say(line).hear()

    def finish(self) -> Self:
        """Half-closes: FIN, but still reads."""
        self.sock.shutdown(socket.SHUT_WR)
        return self

    def reset(self) -> None:
        """Leaves by RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def end(self, timeout_s: float = 10.0) -> str:
        """Waits for the other side: "eof", "reset", or "open" when it did neither in time."""
        if self._reset:
            return "reset"
        self.sock.settimeout(timeout_s)
        try:
            while data := self.sock.recv(65536):
                self._buffer += data
        except TimeoutError:
            return "open"
        except OSError:
            return "reset"
        return "eof"
