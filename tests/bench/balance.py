"""How evenly lasting sessions spread over workers, while short ones come and go.

Run from tests/:  ../.venv/bin/python -m bench.balance [--quick] [--json FILE]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import click
from harness.backends import NativeBackend
from harness.client import Client
from harness.gate_peer import Gate
from harness.peers import HAProxy, Nginx
from harness.plan import Plan, Then
from harness.rounds import Figures, host_line, play, table, write_json
from harness.sessions import excess, sessions_by_pid

PER_WORKER = 50  # lasting sessions
LONG_RATE = 200  # new ones a second
SHORT_RATE = 200

COLUMNS = [
    ("excess", "largest above mean %", ".1f"),
    ("most", "most", ".0f"),
    ("least", "least", ".0f"),
    ("failed", "failed", ".0f"),
]

Maker = Callable[[str, int], AbstractContextManager[Any]]
MAKERS: dict[str, Maker] = {
    "tidegate p2c": lambda address, n: Gate(address, workers=n, top={"steer": "p2c"}),
    "tidegate least_queue": lambda address, n: Gate(address, workers=n, top={"steer": "least_queue"}),
    "tidegate hash": lambda address, n: Gate(address, workers=n, top={"steer": "hash"}),
    "plain reuseport": lambda address, n: Gate(address, workers=n, top={"queue_age": "tcp_info"}),
    "nginx shared queue": lambda address, n: Nginx(address, workers=n),
    "nginx reuseport": lambda address, n: Nginx(address, workers=n, reuseport=True),
    "haproxy processes": lambda address, n: HAProxy(address, processes=n),
}


def measure(make: Maker, workers: int) -> Figures:
    """The excess of the fullest worker over the mean, in per cent, when all lasting sessions are there."""
    count = PER_WORKER * workers
    lasts_s = count / LONG_RATE
    with NativeBackend("echo") as backend, make(backend.address, workers) as peer:
        lasting = Plan(
            peer.host,
            peer.port,
            rate=LONG_RATE,
            count=count,
            then=Then.HOLD,
            hold_ns=int((lasts_s + 2) * 1e9),
        )
        passing = Plan(peer.host, peer.port, rate=SHORT_RATE, count=int(SHORT_RATE * lasts_s))
        with Client(lasting) as long_client, Client(passing) as short_client:
            long_client.go()
            short_client.go()
            short = short_client.result()
            time.sleep(0.2)
            counts = list(sessions_by_pid(peer.pids, peer.port).values())
            answered = long_client.result().outcomes()["answered"] + short.outcomes()["answered"]
    return {
        "excess": excess(counts) * 100,
        "most": max(counts),
        "least": min(counts),
        "failed": count + len(short.attempts) - answered,
    }


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--quick", is_flag=True, help="Two rounds, two and four workers.")
@click.option("--json", "json_path", default="", help="Write all figures to a file, or - for stdout.")
def main(rounds: int, quick: bool, json_path: str) -> None:
    """The largest worker's share of lasting sessions above the mean."""
    everything: dict[str, Any] = {}
    for workers in (2, 4) if quick else (2, 4, 8):
        makers = {name: (lambda m=make, n=workers: measure(m, n)) for name, make in MAKERS.items()}
        result = play(makers, 2 if quick else rounds)
        everything[str(workers)] = result.to_json()
        if json_path == "-":
            continue
        click.echo(
            table(
                result,
                f"{workers} workers, {PER_WORKER * workers} lasting sessions, {SHORT_RATE} short ones/s",
                COLUMNS,
            )
        )
        worst = {name: max(result.values(name, "excess")) for name in result.contestants}
        click.echo("worst round: " + ", ".join(f"{worst[n]:.0f}" for n in result.contestants) + " %\n")
    if json_path != "-":
        click.echo(host_line(result))
    if json_path:
        write_json(json_path, "balance", everything)


if __name__ == "__main__":
    main()
