"""HTTP by hand: a client and a server that put any bytes on the wire and say exactly what came.

The server runs in threads of the test, so a test can script every byte a backend sends and when.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

Fields = list[tuple[str, str]]


class Wire:
    """One connection, read by lines and lengths.

    Reads raise EOFError at the end, OSError when it is reset or nothing comes in time.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = b""  # everything, for judges, while `recording`
        self.recording = True
        self._buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self.close()

    def __del__(self) -> None:
        # a test that fails half-way leaves connections behind: the failure is the news, not the open socket
        if hasattr(self, "sock"):
            self.sock.close()

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def more(self) -> bytes:
        data = self.sock.recv(65536)
        if not data:
            raise EOFError(f"after {self._buffer[-200:]!r}")
        if self.recording:
            self.received += data
        self._buffer += data
        return data

    def until(self, mark: bytes) -> bytes:
        while (at := self._buffer.find(mark)) < 0:
            self.more()
        at += len(mark)
        taken, self._buffer = self._buffer[:at], self._buffer[at:]
        return taken

    def exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self.more()
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken

    def rest(self) -> bytes:
        """All until the other side ends; a reset counts as an end."""
        with contextlib.suppress(EOFError, ConnectionResetError):
            while True:
                self.more()
        taken, self._buffer = self._buffer, b""
        return taken

    def chunked(self) -> tuple[bytes, bytes]:
        """Body and trailer section."""
        body = b""
        while size := int(self.until(b"\r\n").split(b";")[0], 16):
            body += self.exactly(size)
            assert self.exactly(2) == b"\r\n"
        trailers = b""
        while (line := self.until(b"\r\n")) != b"\r\n":
            trailers += line
        return body, trailers

    @property
    def ended(self) -> bool:
        """Whether the other side has closed: waits for it as long as the socket's timeout."""
        try:
            return not self._buffer and self.sock.recv(1) == b""
        except ConnectionResetError:
            return True


@dataclass(slots=True)
class Message:
    """A request or response as it came."""

    start: str
    fields: Fields
    body: bytes = b""
    trailers: bytes = b""
    interim: list[Message] = field(default_factory=list)

    @property
    def status(self) -> int:
        return int(self.start.split(" ")[1])

    @property
    def method(self) -> str:
        return self.start.split(" ")[0]

    @property
    def target(self) -> str:
        return self.start.split(" ")[1]

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.fields if key.lower() == name.lower()]

    def get(self, name: str) -> str | None:
        values = self.all(name)
        return values[0] if values else None


def read_head(wire: Wire) -> Message:
    lines = wire.until(b"\r\n\r\n").decode("latin-1").split("\r\n")
    fields = []
    for line in lines[1:-2]:
        name, _, value = line.partition(":")
        fields.append((name, value.strip()))
    return Message(lines[0], fields)


def read_request(wire: Wire) -> Message:
    message = read_head(wire)
    if message.get("expect"):
        wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    _read_body(wire, message)
    return message


def _read_body(wire: Wire, message: Message) -> bool:
    if message.get("transfer-encoding"):
        message.body, message.trailers = wire.chunked()
    elif length := message.get("content-length"):
        message.body = wire.exactly(int(length))
    else:
        return False
    return True


class Arrived(Wire):
    """Bytes that have all come, read as if from a connection that ends behind them."""

    def __init__(self, data: bytes) -> None:
        self.received = self._buffer = data
        self.recording = False

    def __del__(self) -> None:
        pass

    def close(self) -> None:
        pass

    @property
    def left(self) -> bool:
        """Whether there is more to read."""
        return bool(self._buffer)

    def more(self) -> bytes:
        raise EOFError(f"after {self._buffer[-200:]!r}")


def read_response(wire: Wire, method: str = "GET") -> Message:
    """The next final response, the interim ones before it in `interim`."""
    interim = []
    while (message := read_head(wire)).status < 200 and message.status != 101:
        interim.append(message)
    message.interim = interim
    no_body = method == "HEAD" or message.status in (101, 204, 304)
    if not no_body and not _read_body(wire, message):
        message.body = wire.rest()
    return message


class HttpClient(Wire):
    """A client connection."""

    def __init__(self, port: int, host: str = "127.0.0.1", timeout_s: float = 10.0, source: str = "") -> None:
        super().__init__(
            socket.create_connection((host, port), timeout_s, source_address=(source, 0) if source else None)
        )
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def response(self, method: str = "GET") -> Message:
        return read_response(self, method)

    def ask(self, request: bytes, method: str = "GET") -> Message:
        self.send(request)
        return self.response(method)

    def get(self, target: str = "/", *lines: str, method: str = "GET") -> Message:
        head = "\r\n".join([f"{method} {target} HTTP/1.1", "Host: a.example", *lines, "", ""])
        return self.ask(head.encode("latin-1"), method)


def turned_away(port: int, data: bytes = b"", source: str = "") -> bytes:
    """All that a client got that the proxy may reset whenever it likes: connect() may already fail by it.

    Raises TimeoutError when the connection is not ended.
    """
    with contextlib.suppress(ConnectionError), HttpClient(port, source=source) as client:
        with contextlib.suppress(ConnectionError):
            client.send(data)
        return client.rest()
    return b""


def answer_ok(wire: Wire) -> None:
    """Answers every request with what it asked for."""
    while True:
        request = read_request(wire)
        body = b"" if request.method == "HEAD" else f"{request.method} {request.target}".encode()
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


class ScriptedBackend:
    """Runs `script` for each connection, in a thread of its own; `wires` are all connections so far."""

    def __init__(self, script: Callable[[Wire], None] = answer_ok, rcvbuf: int = 0) -> None:
        self.script = script
        self.wires: list[Wire] = []
        self._listener = socket.socket()
        if rcvbuf:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(1024)
        self.port = self._listener.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._listener.close()
        for wire in self.wires:
            with contextlib.suppress(OSError):
                wire.sock.shutdown(socket.SHUT_RDWR)
            wire.close()

    @property
    def seen(self) -> bytes:
        """All bytes that all connections brought."""
        return b"".join(wire.received for wire in self.wires)

    def _accept(self) -> None:
        while True:
            try:
                sock, _peer = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            wire = Wire(sock)
            self.wires.append(wire)
            threading.Thread(target=self._one, args=(wire,), daemon=True).start()

    def _one(self, wire: Wire) -> None:
        with contextlib.suppress(EOFError, OSError, ValueError):
            self.script(wire)
        with contextlib.suppress(OSError):
            wire.sock.shutdown(socket.SHUT_RDWR)
        wire.close()
