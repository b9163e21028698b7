"""A tidegate whose HTTP bodies are spliced, and messages with bodies worth it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from harness.http_wire import HttpClient, ScriptedBackend, Wire, read_request
from harness.pattern import Pattern
from harness.proc import Tidegate, tcp_config
from harness.waiting import wait_until


def pattern(seed: int, size: int) -> bytes:
    return b"".join(bytes(piece) for piece in Pattern(seed).chunks(size))


def length(size: int, *fields: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {size}", *fields, "", ""]
    return "\r\n".join(lines).encode()


def put(size: int, *fields: str) -> bytes:
    lines = ["PUT / HTTP/1.1", "Host: a.example", f"Content-Length: {size}", *fields, "", ""]
    return "\r\n".join(lines).encode()


def serve(wire: Wire) -> None:
    """GET /N: N bytes of the pattern N; PUT: how many came, and whether they were the pattern of so many."""
    wire.recording = False
    while True:
        request = read_request(wire)
        if request.method == "GET":
            size = int(request.target[1:])
            wire.send(length(size) + pattern(size, size))
        else:
            size = len(request.body)
            verdict = f"{size} {request.body == pattern(size, size)}".encode()
            wire.send(length(len(verdict)) + verdict)


@contextlib.contextmanager
def site(
    script: Callable[[Wire], None] = serve, **listener: Any
) -> Iterator[tuple[Tidegate, ScriptedBackend]]:
    """A tidegate that has moved something by the kernel when the block ends."""
    with ScriptedBackend(script) as backend:
        config = tcp_config([backend.address], protocol="http", splice="on", splice_after="64KiB", **listener)
        with Tidegate(config) as gate:
            assert gate.status()["splice"]["by"] == "kernel"
            yield gate, backend
            wait_until(lambda: gate.listener()["spliced"] > 0, 5, "something to be spliced")
            assert gate.listener()["ended"]["internal_error"] == 0


def quiet(gate: Tidegate, timeout_s: float = 20.0) -> HttpClient:
    client = HttpClient(gate.port(), timeout_s=timeout_s)
    client.recording = False
    return client
