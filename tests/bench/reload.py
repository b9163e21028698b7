"""A reload every second under new connections: who is refused, reset or cut.

Run from tests/:  ../.venv/bin/python -m bench.reload [--quick] [--json FILE]
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
from harness.plan import Outcome, Plan, Then, quantile
from harness.processes import session_pids
from harness.rounds import Figures, host_line, play, table, write_json

HELD = 50  # sessions that last over several reloads
COLUMNS = [
    ("made", "made", ".0f"),
    ("bad", "not answered", ".0f"),
    ("cut", "cut of 50", ".0f"),
    ("p99", "p99 ms", ".1f"),
    ("longest", "longest ms", ".0f"),
    ("processes", "processes", ".0f"),
    ("lag", "own lag ms", ".1f"),
]

Maker = Callable[[str], AbstractContextManager[Any]]
MAKERS: dict[str, Maker] = {
    "tidegate 2 workers": lambda address: Gate(address, workers=2, stale_after="5s"),
    "nginx 2 workers": lambda address: Nginx(address, workers=2),
    "haproxy 2 threads": lambda address: HAProxy(address, threads=2, master=True),
}


def measure(make: Maker, rate: int, seconds: float) -> Figures:
    """Reloads once a second for `seconds` under `rate` new connections a second."""
    with NativeBackend("echo") as backend, make(backend.address) as peer:
        plan = Plan(peer.host, peer.port, rate=rate, count=int(rate * seconds), patience_ns=5 * 10**9)
        held = Plan(
            peer.host, peer.port, rate=HELD, count=HELD, then=Then.HOLD, hold_ns=int(min(seconds, 10) * 5e8),
            patience_ns=5 * 10**9, linger_ns=0, prefix="held",
        )  # fmt: skip
        with Client(plan) as client, Client(held) as holder:
            client.go()
            holder.go()
            processes = 0
            end = time.monotonic() + seconds
            while time.monotonic() < end - 1:
                time.sleep(1)
                peer.reload()
                children = getattr(peer, "children", None) or [peer.gate.child]
                processes = max(processes, sum(len(session_pids(child.pid)) for child in children))
            result, kept = client.result(), holder.result()
    answered = [a.latency_ns for a in result.of(Outcome.ANSWERED)]
    return {
        "made": len(result.attempts),
        "bad": len(result.attempts) - len(answered),
        "cut": sum(1 for a in kept.attempts if a.late or a.outcome is not Outcome.ANSWERED),
        "p99": quantile(answered, 0.99) / 1e6,
        "longest": max(answered, default=0) / 1e6,
        "processes": processes,
        "lag": result.lag_ns(0.99) / 1e6,
    }


@click.command()
@click.option("--rounds", default=1, show_default=True)
@click.option("--rate", default=1000, show_default=True, help="New connections a second.")
@click.option("--seconds", default=30.0, show_default=True)
@click.option("--quick", is_flag=True, help="Six seconds.")
@click.option("--json", "json_path", default="", help="Write all figures to a file, or - for stdout.")
def main(rounds: int, rate: int, seconds: float, quick: bool, json_path: str) -> None:
    """Reloads under load."""
    seconds = 6.0 if quick else seconds
    result = play({name: (lambda m=make: measure(m, rate, seconds)) for name, make in MAKERS.items()}, rounds)  # type: ignore[misc]
    if json_path != "-":
        click.echo(table(result, f"{rate} new connections/s for {seconds:g} s, a reload a second", COLUMNS))
        click.echo(host_line(result))
    if json_path:
        write_json(json_path, "reload", result.to_json())


if __name__ == "__main__":
    main()
