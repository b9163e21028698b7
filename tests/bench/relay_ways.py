"""Two ways for userspace to relay one stream, side by side: recv and send, or splice(2) through a pipe.

Both as bare as can be, in Python as tidegate is, so that the difference is the kernel's. It is why tidegate
copies where it does not splice by sockmap.

Run from tests/:  ../.venv/bin/python -m bench.relay_ways [--seconds 3] [--rounds 3]
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click
from harness.backends import NativeBackend
from harness.load import drive
from harness.processes import cpu_seconds, machine_busy_seconds

CHUNK = 65536
PIPE = 1 << 20
_F_SETPIPE_SZ = 1031


def copy(source: socket.socket, target: socket.socket) -> None:
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    while size := source.recv_into(buffer):
        target.sendall(view[:size])


def splice(source: socket.socket, target: socket.socket) -> None:
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, _F_SETPIPE_SZ, PIPE)
    while size := os.splice(source.fileno(), write_end, PIPE):
        while size:
            size -= os.splice(read_end, target.fileno(), size)


WAYS = {"copy": copy, "splice": splice}


def relay(way: str, backend: tuple[str, int], listener: socket.socket, direction: str) -> None:
    while True:
        front, _ = listener.accept()
        back = socket.create_connection(backend)
        try:
            if direction == "up":
                WAYS[way](front, back)
            else:
                select.select([back], [], [], 5)
                WAYS[way](back, front)
        except OSError:
            pass
        front.close()
        back.close()


@contextmanager
def running(way: str, backend: str, direction: str) -> Iterator[tuple[int, int]]:
    """(pid, port) of a relay in a process of its own."""
    host, port = backend.rsplit(":", 1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pid = os.fork()
        if pid == 0:
            try:
                relay(way, (host, int(port)), listener, direction)
            finally:
                os._exit(0)
        try:
            yield pid, listener.getsockname()[1]
        finally:
            os.kill(pid, 9)
            os.waitpid(pid, 0)


@click.command()
@click.option("--seconds", default=3.0, show_default=True)
@click.option("--rounds", default=3, show_default=True)
def main(seconds: float, rounds: int) -> None:
    """One stream each way: MB/s, CPU seconds per GB of the machine and of the relay."""
    for direction in ("up", "down"):
        for _ in range(rounds):
            for way in WAYS:
                with (
                    NativeBackend("discard" if direction == "up" else "source") as backend,
                    running(way, backend.address, direction) as (pid, port),
                ):
                    busy, used = machine_busy_seconds(), cpu_seconds([pid])
                    mode = "push" if direction == "up" else "pull"
                    load = drive("127.0.0.1", port, mode, connections=1, seconds=seconds, size=CHUNK)
                    gigabytes = max(load.count / 0.9, 1) / 1e9
                    busy = (machine_busy_seconds() - busy) / gigabytes
                    used = (cpu_seconds([pid]) - used) / gigabytes
                rate = load.rate / 1e6
                click.echo(
                    f"{direction:5} {way:7} {rate:6.0f} MB/s  {busy:5.2f} s/GB  relay {used:5.2f} s/GB"
                )
                sys.stdout.flush()


if __name__ == "__main__":
    main()
