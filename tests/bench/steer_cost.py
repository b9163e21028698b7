"""What the BPF programs cost per run, by the kernel's own statistics (kernel.bpf_stats_enabled).

The listeners of as many workers as asked for are held by this one process, which keeps their heartbeats
fresh: 64 real workers on a small machine would measure the machine. Connections are made and accepted in
batches, so loads differ between listeners as they do in life.

Run from tests/, as root:  ../.venv/bin/python -m bench.steer_cost [--quick] [--json FILE]
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click
from harness.ports import free_port
from harness.rounds import Figures, host_line, play, table, write_json

from tidegate.config.model import Steer, WhenFull
from tidegate.kernel.half import KernelHalf
from tidegate.kernel.queue_age import read_bpf

_SWITCH = Path("/proc/sys/kernel/bpf_stats_enabled")
HANG_AFTER_NS = 200_000_000
BATCH = 128  # connections waiting at a time
BACKLOG = 1024
COLUMNS = [
    ("select", "select", ".0f"),
    ("sockops", "sockops", ".0f"),
    ("getsockopt", "getsockopt", ".0f"),
    ("per_connection", "all, per conn", ".0f"),
    ("connections", "conns", ".0f"),
]


@contextmanager
def statistics_on() -> Iterator[None]:
    """Costs some ns per program run, machine-wide, while it lasts."""
    before = _SWITCH.read_text()
    _SWITCH.write_text("1")
    try:
        yield
    finally:
        _SWITCH.write_text(before)


def run_statistics(fd: int) -> tuple[int, int]:
    """Time in ns and number of runs of a program so far."""
    fields = {}
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
        key, _, value = line.partition(":")
        fields[key] = value.strip()
    return int(fields["run_time_ns"]), int(fields["run_cnt"])


def programs(half: KernelHalf) -> dict[str, tuple[int, int]]:
    """By what they are for; there is one steered group."""
    names = {"steer.0": "select"}
    return {names.get(name, name): run_statistics(fd) for name, fd in half.program_fds().items()}


def listen(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", port))
    sock.listen(BACKLOG)
    sock.setblocking(False)
    return sock


def measure(policy: Steer, workers: int, connections: int) -> Figures:
    """The ns a run of each program, and of all of them per connection."""
    port = free_port()
    half = KernelHalf.start(f"bench-{os.getpid()}")
    with ExitStack() as closing:
        closing.callback(half.close)
        members = []
        for _ in range(workers):
            sock = closing.enter_context(listen(port))
            slot = half.allocate_slot()
            half.mark_listener(sock, slot, BACKLOG)
            members.append((sock, slot))
        half.steer_listener(0, members, policy=policy, when_full=WhenFull.QUEUE, hang_after_ns=HANG_AFTER_NS)
        before = programs(half)
        made = 0
        while made < connections:
            now = time.monotonic_ns()
            for _, slot in members:
                half.slots.heartbeat(slot, now)
            clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(BATCH)]
            accepted = 0
            for sock, _ in members:
                while True:
                    try:
                        conn, _ = sock.accept()
                    except BlockingIOError:
                        break
                    read_bpf(conn)
                    conn.close()
                    accepted += 1
            assert accepted == BATCH, f"{accepted} of {BATCH} accepted"
            for client in clients:
                client.close()
            made += BATCH
        after = programs(half)
    figures: Figures = {"connections": made}
    total = 0
    for name, (took, runs) in after.items():
        took_before, runs_before = before[name]
        if runs > runs_before:
            figures[name] = (took - took_before) / (runs - runs_before)
            total += took - took_before
    figures["per_connection"] = total / made
    return figures


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--connections", default=12_800, show_default=True, help="Per measurement.")
@click.option("--quick", is_flag=True, help="One short round.")
@click.option("--json", "json_path", default="", help="Write all figures to a file, or - for stdout.")
def main(rounds: int, connections: int, quick: bool, json_path: str) -> None:
    """Time per selection with 2, 8 and 64 workers."""
    if quick:
        rounds, connections = 1, 2560
    cases = [(policy, workers) for workers in (2, 8, 64) for policy in Steer]
    with statistics_on():
        result = play(
            {
                f"{policy}, {workers} workers": (lambda p=policy, w=workers: measure(p, w, connections))  # type: ignore[misc]
                for policy, workers in cases
            },
            rounds,
        )
    if json_path != "-":
        click.echo(table(result, "ns a run, by the kernel's statistics", COLUMNS))
        click.echo("target: below 300 ns a selection with 64 workers")
        click.echo(host_line(result))
    if json_path:
        write_json(json_path, "steer_cost", result.to_json())


if __name__ == "__main__":
    main()
