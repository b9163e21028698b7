"""What the BPF programs cost per run, by the kernel's own statistics (kernel.bpf_stats_enabled).

Run from tests/, as root:  ../.venv/bin/python -m bench.steer_cost [--quick] [--json FILE]
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from harness.backends import NativeBackend
from harness.gate_peer import Gate
from harness.load import drive
from harness.rounds import Figures, host_line, play, table, write_json

_SWITCH = Path("/proc/sys/kernel/bpf_stats_enabled")
COLUMNS = [
    ("select", "select", ".0f"),
    ("sock_ops", "sockops", ".0f"),
    ("getsockopt", "getsockopt", ".0f"),
    ("per_connection", "all, per conn", ".0f"),
    ("connections", "conns", ".0f"),
]
# program types as bpftool names them
TYPES = {"sk_reuseport": "select", "sock_ops": "sock_ops", "cgroup_sockopt": "getsockopt"}


@contextmanager
def statistics_on() -> Iterator[None]:
    """Costs some ns per program run, machine-wide, while it lasts."""
    before = _SWITCH.read_text()
    _SWITCH.write_text("1")
    try:
        yield
    finally:
        _SWITCH.write_text(before)


def programs(gate: Gate) -> dict[str, tuple[int, int]]:
    """Time in ns and number of runs so far, by kind."""
    totals: dict[str, tuple[int, int]] = {}
    for number in gate.gate.objects_held().ids["prog"]:
        done = subprocess.run(
            ["bpftool", "prog", "show", "id", str(number), "-j"], capture_output=True, text=True, check=True
        )
        shown: dict[str, Any] = json.loads(done.stdout)
        kind = TYPES.get(shown["type"], shown["type"])
        took, runs = totals.get(kind, (0, 0))
        totals[kind] = (took + shown.get("run_time_ns", 0), runs + shown.get("run_cnt", 0))
    return totals


def measure(policy: str, workers: int, seconds: float) -> Figures:
    """Ns a run of each kind, and of all of them per connection."""
    with (
        NativeBackend("echo") as backend,
        Gate(backend.address, workers=workers, top={"steer": policy}) as gate,
    ):
        before = programs(gate)
        load = drive(gate.host, gate.port, "connect", connections=32, seconds=seconds, size=64)
        after = programs(gate)
    figures: Figures = {"connections": load.count}
    total = 0
    for kind, (took, runs) in after.items():
        took_before, runs_before = before.get(kind, (0, 0))
        if runs > runs_before:
            figures[kind] = (took - took_before) / (runs - runs_before)
            total += took - took_before
    # the warm-up's tenth is not in the count
    figures["per_connection"] = total * 0.9 / max(1, load.count)
    return figures


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds", default=2.0, show_default=True)
@click.option("--quick", is_flag=True, help="One round of one second.")
@click.option("--json", "json_path", default="", help="Write all figures to a file, or - for stdout.")
def main(rounds: int, seconds: float, quick: bool, json_path: str) -> None:
    """Ns per selection with 2, 8 and 64 workers."""
    if quick:
        rounds, seconds = 1, 1.0
    cases = [("p2c", 2), ("p2c", 8), ("p2c", 64), ("least_queue", 64), ("hash", 64), ("cpu", 64)]
    with statistics_on():
        result = play(
            {
                f"{policy}, {workers} workers": (lambda p=policy, w=workers: measure(p, w, seconds))  # type: ignore[misc]
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
