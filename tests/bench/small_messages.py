"""Small messages on lasting connections: latency and rate.

"tidegate" is as configured by default, and hands a session to the kernel when it has moved `splice_after`
bytes; "spliced at once" does so from the first byte on.

Run from tests/:  ../.venv/bin/python -m bench.small_messages [--quick] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import click
from harness.backends import NativeBackend
from harness.gate_peer import Gate
from harness.load import drive
from harness.peers import HAProxy
from harness.processes import cpu_seconds, machine_busy_seconds
from harness.rounds import Figures, host_line, play, table, write_json

REFERENCE = "tidegate copy"
COLUMNS = [
    ("rate", "msg/s", ".0f"),
    ("p50", "p50 us", ".0f"),
    ("p99", "p99 us", ".0f"),
    ("process", "proxy us", ".1f"),
    ("machine", "CPU us", ".1f"),
]
Maker = Callable[[str], AbstractContextManager[Any]]
MAKERS: dict[str, Maker] = {
    "haproxy splice": lambda address: HAProxy(address, splice=True),
    "tidegate": Gate,
    "spliced at once": lambda address: Gate(address, splice="on", splice_after="0"),
    "tidegate copy": lambda address: Gate(address, splice="off"),
}


def measure(make: Maker, connections: int, seconds: float) -> Figures:
    """Messages of 64 bytes, one at a time on each connection, echoed by the backend."""
    with NativeBackend("echo") as backend, make(backend.address) as peer:
        busy, used = machine_busy_seconds(), cpu_seconds(peer.pids)
        load = drive(peer.host, peer.port, "echo", connections=connections, seconds=seconds, size=64)
        busy, used = machine_busy_seconds() - busy, cpu_seconds(peer.pids) - used
    messages = max(1.0, load.count / 0.9)  # the warm-up's tenth uses CPU but is not counted
    return {
        "rate": load.rate,
        "p50": load.p50_ns / 1000,
        "p99": load.p99_ns / 1000,
        "process": used * 1e6 / messages,
        "machine": busy * 1e6 / messages,
    }


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=2.0, show_default=True)
@click.option("--quick", is_flag=True, help="Two short rounds.")
@click.option("--json", "json_path", default="", help="Write all figures to a file, or - for stdout.")
def main(rounds: int, seconds: float, quick: bool, json_path: str) -> None:
    """Echo of 64 bytes, 1 and 32 connections."""
    everything: dict[str, Any] = {}
    if quick:
        rounds, seconds = 2, 0.5
    for connections in (1, 32):
        result = play(
            {
                name: (lambda n=name, c=connections: measure(MAKERS[n], c, seconds))  # type: ignore[misc]
                for name in MAKERS
            },
            rounds,
        )
        everything[str(connections)] = result.to_json()
        if json_path != "-":
            title = f"64 bytes echoed, {connections} connection{'s' * (connections > 1)}"
            click.echo(table(result, title, COLUMNS, ratio_of="rate", reference=REFERENCE))
            click.echo()
    if json_path != "-":
        click.echo(host_line(result))
    if json_path:
        write_json(json_path, "small_messages", everything)


if __name__ == "__main__":
    main()
