"""Long digest-checked streams through a proxy to an `exchange` backend, with every bad habit of a client."""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from harness.backends import Backend
from harness.pattern import CHUNK, Pattern, digest, new_digest
from harness.waiting import wait_until


@dataclass(slots=True)
class Stream:
    """One session's orders. Sizes in bytes, pauses in ms every so many bytes."""

    id: str
    up: int
    down: int
    seed: int = 1
    write_pause_ms: int = 0
    read_pause_ms: int = 0
    pause_every: int = 1024 * 1024
    backend_write_pause_ms: int = 0
    backend_read_pause_ms: int = 0
    fin_first: str = "client"  # "client" | "backend": who half-closes as soon as it has sent all
    rest_ms: int = 0  # a pause of the client between its FIN and its first read
    reset_after: int = 0  # RST after this many bytes sent; 0: never
    rcvbuf: int = 0
    sndbuf: int = 0

    def order(self) -> bytes:
        order: dict[str, Any] = {"id": self.id, "down": self.down, "seed": self.seed + 1}
        if self.backend_write_pause_ms:
            order |= {"pause_ms": self.backend_write_pause_ms, "pause_every": self.pause_every}
        if self.backend_read_pause_ms:
            order |= {"read_pause_ms": self.backend_read_pause_ms, "read_pause_every": self.pause_every}
        if self.fin_first == "backend":
            order["fin_first"] = True
        return json.dumps(order).encode() + b"\n"


@dataclass(slots=True)
class Done:
    """What the client of a stream saw."""

    stream: Stream
    sent: int = 0
    received: int = 0
    digest: str = ""
    eof: bool = False
    error: str = ""
    took_s: float = 0.0
    resetting: bool = False


@dataclass(slots=True)
class Exchange:
    """Runs streams side by side, one pair of threads each."""

    address: tuple[str, int]
    streams: list[Stream]
    done: list[Done] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        for stream in self.streams:
            record = Done(stream)
            self.done.append(record)
            thread = threading.Thread(target=_run, args=(self.address, stream, record), daemon=True)
            thread.start()
            self._threads.append(thread)

    def join(self, timeout_s: float) -> list[Done]:
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        stuck = [r.stream.id for r, t in zip(self.done, self._threads, strict=True) if t.is_alive()]
        assert not stuck, f"streams that did not end within {timeout_s:g} s: {stuck}"
        return self.done

    def run(self, timeout_s: float) -> list[Done]:
        self.start()
        return self.join(timeout_s)


def assert_intact(done: list[Done], backend: Backend, patience_s: float = 10.0) -> None:
    """Every stream that was not to be reset arrived whole, in order, both ways, and ended by FIN.

    `patience_s`: what is still in the kernel when the clients are done may take so long.

    Raises:
        AssertionError: names each stream that did not, and how far it came.
    """
    wanted = {record.stream.id for record in done if not record.stream.reset_after}
    wait_until(
        lambda: (
            (seen := backend.stats()["done"]) and all(seen.get(name, {}).get("digest") for name in wanted)
        ),
        patience_s,
        "the backend to see the end of every stream",
    )
    seen = backend.stats()["done"]
    wrong = []
    for record in done:
        stream = record.stream
        if stream.reset_after:
            continue
        theirs = seen[stream.id]
        if not (
            record.sent == stream.up
            and record.received == stream.down
            and record.eof
            and record.digest == digest(stream.seed + 1, stream.down)
            and theirs["up"] == stream.up
            and theirs["eof"]
            and theirs["digest"] == digest(stream.seed, stream.up)
        ):
            wrong.append((record, theirs))
    assert not wrong, f"{len(wrong)} of {len(done)} streams damaged: {wrong[:3]}"


def mixed(count: int, size: int, seed: int, *, resets: bool = True) -> list[Stream]:
    """`count` streams of about `size` bytes each way, each with habits drawn from `seed`."""
    draw = random.Random(seed)
    streams = []
    for number in range(count):
        streams.append(
            Stream(
                f"s{number}",
                up=draw.randint(size // 2, size),
                down=draw.randint(size // 2, size),
                seed=seed * 1000 + 2 * number,
                write_pause_ms=draw.choice([0, 0, 3]),
                read_pause_ms=draw.choice([0, 0, 3]),
                backend_write_pause_ms=draw.choice([0, 0, 3]),
                backend_read_pause_ms=draw.choice([0, 0, 3]),
                pause_every=256 * 1024,
                fin_first=draw.choice(["client", "backend"]),
                rest_ms=draw.choice([0, 0, 100]),
                reset_after=draw.randint(1, size // 2) if resets and draw.random() < 0.25 else 0,
            )
        )
    return streams


def _run(address: tuple[str, int], stream: Stream, record: Done) -> None:
    begun = time.monotonic()
    try:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            if stream.rcvbuf:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, stream.rcvbuf)
            if stream.sndbuf:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, stream.sndbuf)
            sock.connect(address)
            writer = threading.Thread(target=_write, args=(sock, stream, record), daemon=True)
            writer.start()
            if stream.rest_ms:
                time.sleep(stream.rest_ms / 1000)
            _read(sock, stream, record)
            writer.join()
    except OSError as error:
        record.error = record.error or error.__class__.__name__
    record.took_s = time.monotonic() - begun


def _write(sock: socket.socket, stream: Stream, record: Done) -> None:
    since_pause = 0
    try:
        sock.sendall(stream.order())
        for chunk in Pattern(stream.seed).chunks(stream.up):
            sock.sendall(chunk)
            record.sent += len(chunk)
            since_pause += len(chunk)
            if stream.reset_after and record.sent >= stream.reset_after:
                record.resetting = True
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.shutdown(socket.SHUT_RD)  # wakes the reader; the RST goes when the last user closes
                return
            if stream.write_pause_ms and since_pause >= stream.pause_every:
                since_pause = 0
                time.sleep(stream.write_pause_ms / 1000)
        sock.shutdown(socket.SHUT_WR)
    except OSError as error:
        record.error = f"writing: {error.__class__.__name__}"


def _read(sock: socket.socket, stream: Stream, record: Done) -> None:
    running = new_digest()
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    since_pause = 0
    try:
        while size := sock.recv_into(buffer):
            if record.resetting:
                return
            running.update(view[:size])
            record.received += size
            since_pause += size
            if stream.read_pause_ms and since_pause >= stream.pause_every:
                since_pause = 0
                time.sleep(stream.read_pause_ms / 1000)
        record.eof = not record.resetting
    except OSError as error:
        record.error = record.error or f"reading: {error.__class__.__name__}"
    record.digest = running.hexdigest()
