"""What `tidegate trace` adds to a connection, by the kernel's own statistics of BPF programs.

Run from tests/, as root:  ../.venv/bin/python -m bench.trace_cost [--quick] [--json FILE]

The statistics cost something themselves, at every run of a program, and nothing is taken off for it: programs
that do nothing show how much that is.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import click
from harness.rounds import Figures, host_line, play, table, write_json
from harness.traces import cgroup, listener

from tidegate.kernel import bpf
from tidegate.kernel.bpf import AttachType, ProgType
from tidegate.kernel.tracing import Tracer

ACCEPT = (AttachType.CGROUP_INET4_GETPEERNAME, AttachType.CGROUP_INET6_GETPEERNAME)
# r0 = 1; exit
NOTHING = struct.pack("<BBhi", 0xB7, 0, 0, 1) + struct.pack("<BBhi", 0x95, 0, 0, 0)

Stats = Callable[[], tuple[int, int]]  # ns, runs


@contextmanager
def doing_nothing(path: Path, established: bool) -> Iterator[Stats]:
    """Programs that do nothing where trace's are attached, `established`: those that count as well."""
    with ExitStack() as stack:
        directory = os.open(path, os.O_RDONLY)
        stack.callback(os.close, directory)
        programs = []
        kinds = [(ProgType.CGROUP_SOCK_ADDR, attach, attach) for attach in ACCEPT]
        if established:
            kinds.append((ProgType.SOCK_OPS, AttachType.NONE, AttachType.CGROUP_SOCK_OPS))
        for kind, loaded, attach in kinds:
            fd, _ = bpf.prog_load(kind, NOTHING, "nothing", loaded)
            stack.callback(os.close, fd)
            stack.callback(os.close, bpf.link_create(fd, directory, attach))
            programs.append(fd)

        def stats() -> tuple[int, int]:
            found = [bpf.prog_run_stats(fd) for fd in programs]
            return sum(one.run_ns for one in found), sum(one.runs for one in found)

        yield stats


@contextmanager
def tracing(path: Path, counts: bool, checks: bool) -> Iterator[Stats]:
    with Tracer(path) as tracer:
        tracer.counts_arrivals = counts
        tracer.check_all(checks)

        def stats() -> tuple[int, int]:
            costs = tracer.cost()
            return sum(cost.run_ns for cost in costs), sum(cost.runs for cost in costs)

        yield stats


@click.command()
@click.option("--rounds", default=15, show_default=True)
@click.option("--connections", default=1000, show_default=True, help="Per measurement.")
@click.option("--quick", is_flag=True, help="Three short rounds.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--json", "json_path", default="", help="Write all figures to a file, or - for stdout.")
def main(rounds: int, connections: int, quick: bool, host: str, json_path: str) -> None:
    """Nanoseconds per connection of trace's programs, and of programs that do nothing in their place."""
    if quick:
        rounds, connections = 3, 300
    with cgroup() as path, listener(path, host, backlog=128) as server, ExitStack() as stack:
        stack.callback(os.close, bpf.enable_stats())

        def one(programs: Callable[[], object]) -> Figures:
            with programs() as stats:  # type: ignore[attr-defined]
                before = stats()
                for _ in range(connections):
                    with closing(socket.create_connection(server.getsockname()[:2])):
                        server.accept()[0].close()
                after = stats()
            return {
                "ns": (after[0] - before[0]) / connections,
                "runs": (after[1] - before[1]) / connections,
            }

        ways = {
            "accept: doing nothing": lambda: doing_nothing(path, False),
            "trace, service known": lambda: tracing(path, False, False),
            "trace, service asks again": lambda: tracing(path, False, True),
            "both: doing nothing": lambda: doing_nothing(path, True),
            "trace, service not known": lambda: tracing(path, True, True),
        }
        result = play({name: (lambda w=way: one(w)) for name, way in ways.items()}, rounds)  # type: ignore[misc]
    if json_path != "-":
        columns = [("ns", "ns", ".0f"), ("runs", "runs", ".1f")]
        click.echo(table(result, "per connection", columns, ratio_of="ns", reference="accept: doing nothing"))
        click.echo(host_line(result))
    if json_path:
        write_json(json_path, "trace_cost", result.to_json())


if __name__ == "__main__":
    main()
