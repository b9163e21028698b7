"""Bulk streams: bytes per second, and CPU time of the whole machine per gigabyte.

The CPU time is of everything, softirq and kernel threads included, client and backend too: what moves in the
kernel costs there and not in the proxy's process. Other work on the machine is in it as well.

Run from tests/:  ../.venv/bin/python -m bench.throughput [--quick] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import click
from harness.backends import NativeBackend
from harness.gate_peer import Gate
from harness.load import drive
from harness.peers import HAProxy, Nginx
from harness.processes import cpu_seconds, machine_busy_seconds
from harness.rounds import Figures, host_line, play, table, write_json

REFERENCE = "haproxy splice"
CHUNK = 65536
COLUMNS = [
    ("rate", "MB/s", ".0f"),
    ("machine", "CPU s/GB", ".2f"),
    ("process", "proxy s/GB", ".2f"),
    ("errors", "errors", ".0f"),
]

Maker = Callable[[str], AbstractContextManager[Any]]
# streams, direction, pace: flat out, where what a saturated machine does decides; and no faster than a
# network is, where the rates are equal and the CPU time tells
LOADS = [
    (1, "down", 0),
    (1, "up", 0),
    (64, "down", 0),
    (64, "up", 0),
    (1, "down", 250_000_000),
    (64, "down", 4_000_000),
]

MAKERS: dict[str, Maker] = {
    "haproxy splice": lambda address: HAProxy(address, splice=True),
    "haproxy copy": HAProxy,
    "nginx stream": Nginx,
    "tidegate splice": lambda address: Gate(address, splice="auto"),
    "tidegate copy": lambda address: Gate(address, splice="off"),
}


def measure(make: Maker, direction: str, streams: int, pace: int, seconds: float) -> Figures:
    """`direction` is "down" (the backend sends) or "up"; `pace`: of each stream down, bytes/s, 0: none."""
    with (
        NativeBackend("source" if direction == "down" else "discard", pace=pace) as backend,
        make(backend.address) as peer,
    ):
        busy, used = machine_busy_seconds(), cpu_seconds(peer.pids)
        load = drive(
            peer.host, peer.port, "pull" if direction == "down" else "push",
            connections=streams, seconds=seconds, size=CHUNK,
        )  # fmt: skip
        busy, used = machine_busy_seconds() - busy, cpu_seconds(peer.pids) - used
    # the warm-up's tenth uses CPU but is not counted
    gigabytes = max(load.count / 0.9, 1) / 1e9
    return {
        "rate": load.rate / 1e6,
        "machine": busy / gigabytes,
        "process": used / gigabytes,
        "errors": load.errors,
    }


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=3.0, show_default=True)
@click.option("--quick", is_flag=True, help="Two short rounds, one stream.")
@click.option("--only", default="", help="Names of contestants, comma-separated.")
@click.option("--json", "json_path", default="", help="Write all figures to a file, or - for stdout.")
def main(rounds: int, seconds: float, quick: bool, only: str, json_path: str) -> None:
    """Throughput and CPU per gigabyte, 1 and 64 streams, both directions, flat out and paced."""
    everything: dict[str, Any] = {}
    names = only.split(",") if only else list(MAKERS)
    if quick:
        rounds, seconds = 2, 1.0
    for streams, direction, pace in LOADS[:2] if quick else LOADS:
        result = play(
            {
                name: (lambda n=name, load=(direction, streams, pace): measure(MAKERS[n], *load, seconds))  # type: ignore[misc]
                for name in names
            },
            rounds,
        )
        title = f"{streams} stream{'s' * (streams > 1)} {direction}"
        if pace:
            title += f", {pace // 1_000_000} MB/s each"
        everything[title] = result.to_json()
        if json_path != "-":
            reference = REFERENCE if REFERENCE in names else names[0]
            click.echo(table(result, title, COLUMNS, ratio_of="rate", reference=reference))
            click.echo()
    if json_path != "-":
        click.echo(host_line(result))
    if json_path:
        write_json(json_path, "throughput", everything)


if __name__ == "__main__":
    main()
