"""What reading a connection's queue age costs, beside other socket options.

Run from tests/, as root:  ../.venv/bin/python -m bench.age_cost [--quick] [--json FILE]
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable

import click
from harness import native
from harness.rounds import Figures, host_line, play, table, write_json

from tidegate.kernel.half import KernelHalf
from tidegate.kernel.queue_age import read_bpf, read_tcp_info
from tidegate.kernel.records import QUEUE_AGE, QUEUE_AGE_SIZE, SOL_TIDEGATE

REFERENCE = "SO_ERROR, no hook"
INFO_SIZE = 104


def accepted() -> tuple[socket.socket, socket.socket, socket.socket]:
    """A listener, a client, and what accept() gave."""
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listener.getsockname())
    return listener, client, listener.accept()[0]


def per_call(call: Callable[[], object], calls: int) -> float:
    """Time of a call in ns, the empty loop taken off."""
    numbers = range(calls)
    begun = time.perf_counter_ns()
    for _ in numbers:
        call()
    took = time.perf_counter_ns() - begun
    begun = time.perf_counter_ns()
    for _ in numbers:
        pass
    return (took - (time.perf_counter_ns() - begun)) / calls


def in_c(sock: socket.socket, level: int, option: int, size: int, calls: int) -> float:
    """The same by a C program that inherits the socket."""
    fd = sock.fileno()
    done = subprocess.run(
        [str(native.build("getsockopt_cost")), *map(str, (fd, level, option, size, calls))],
        pass_fds=[fd], capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return float(done.stdout)


@click.command()
@click.option("--rounds", default=9, show_default=True)
@click.option("--calls", default=200_000, show_default=True, help="Per measurement.")
@click.option("--quick", is_flag=True, help="Three short rounds.")
@click.option("--json", "json_path", default="", help="Write all figures to a file, or - for stdout.")
def main(rounds: int, calls: int, quick: bool, json_path: str) -> None:
    """The cost of the queue age against other getsockopt calls, in Python and in C."""
    if quick:
        rounds, calls = 3, 50_000
    outside = accepted()
    half = KernelHalf.start(f"bench-{os.getpid()}")
    try:
        listener = socket.create_server(("127.0.0.1", 0))
        half.mark_listener(listener, half.allocate_slot(), 128)
        client = socket.create_connection(listener.getsockname())
        ours = listener.accept()[0]
        plain = outside[2]
        reads: dict[str, tuple[Callable[[], object], tuple[socket.socket, int, int, int] | None]] = {
            REFERENCE: (
                lambda: plain.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR),
                (plain, socket.SOL_SOCKET, socket.SO_ERROR, 4),
            ),
            "SO_ERROR, our sockets": (
                lambda: ours.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR),
                (ours, socket.SOL_SOCKET, socket.SO_ERROR, 4),
            ),
            "TCP_INFO, no hook": (
                lambda: plain.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, INFO_SIZE),
                (plain, socket.IPPROTO_TCP, socket.TCP_INFO, INFO_SIZE),
            ),
            "queue age, bytes": (
                lambda: ours.getsockopt(SOL_TIDEGATE, QUEUE_AGE, QUEUE_AGE_SIZE),
                (ours, SOL_TIDEGATE, QUEUE_AGE, QUEUE_AGE_SIZE),
            ),
            "queue age, typed record": (lambda: read_bpf(ours), None),
            "TCP_INFO, typed record": (lambda: read_tcp_info(plain), None),
        }

        def one(name: str) -> Figures:
            call, arguments = reads[name]
            figures = {"python": per_call(call, calls)}
            if arguments:
                figures["c"] = in_c(*arguments, calls)
            return figures

        result = play({name: (lambda n=name: one(n)) for name in reads}, rounds)  # type: ignore[misc]
        for sock in (listener, client, ours, *outside):
            sock.close()
    finally:
        half.close()
    if json_path != "-":
        columns = [("c", "C ns", ".0f"), ("python", "Python ns", ".0f")]
        click.echo(table(result, "ns per read", columns, ratio_of="python", reference=REFERENCE))
        click.echo("ratio: in Python, to SO_ERROR of a socket without the hook; target 1.2")
        click.echo(host_line(result))
    if json_path:
        write_json(json_path, "age_cost", result.to_json())


if __name__ == "__main__":
    main()
