"""A stall of two seconds: how many dead requests are passed on to the backend afterwards.

The serving process is held by SIGSTOP under a constant stream of new connections. A request is dead when its
client had given up before the backend was given it; those of connections made before the stop do not count.

Run from tests/:  ../.venv/bin/python -m bench.stall [--quick] [--json FILE]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import click
from harness.backends import Backend
from harness.client import Client
from harness.gate_peer import Gate
from harness.peers import HAProxy, Nginx
from harness.plan import GiveUp, Outcome, Plan, quantile
from harness.processes import stopped
from harness.rounds import Figures, host_line, play, table, write_json

RATE = 200
STALL_S = 2.0
PATIENCE_MS = 500
MS = 1_000_000

COLUMNS = [
    ("dead", "dead", ".0f"),
    ("passed_on", "passed on", ".0f"),
    ("answered", "in time", ".0f"),
    ("refused", "refused", ".0f"),
    ("p99", "p99 ms", ".0f"),
    ("lag", "own lag ms", ".1f"),
]

Maker = Callable[[str], AbstractContextManager[Any]]
MAKERS: dict[str, Maker] = {
    "haproxy tcp": HAProxy,
    "haproxy abortonclose": lambda address: HAProxy(address, extra="option abortonclose"),
    "nginx stream": Nginx,
    "tidegate": lambda address: Gate(
        address, stale_after=f"{PATIENCE_MS}ms", abort_on_close=True, top={"hang_after": "10s"}
    ),
}


def measure(make: Maker, give_up: GiveUp) -> Figures:
    """One stall."""
    with Backend("counting") as backend, make(backend.address) as peer:
        plan = Plan(
            peer.host, peer.port, rate=RATE, count=int(RATE * (STALL_S + 1.5)),
            patience_ns=PATIENCE_MS * MS, give_up=give_up,
        )  # fmt: skip
        with Client(plan) as client:
            client.go()
            time.sleep(0.5)
            with stopped(*peer.pids) as span:
                time.sleep(STALL_S)
            result = client.result()
        seen = {request.line: request.seen_ns for request in backend.seen()}
    gave_up = result.of(Outcome.TIMEOUT)
    dead = [a for a in gave_up if seen.get(a.id, a.outcome_ns) >= a.outcome_ns]
    # one that had a session already when the proxy was stopped is not a matter of the queue
    dead = [a for a in dead if a.before_connect_ns >= span.since_ns]
    passed_on = [a for a in dead if a.id in seen]
    answered = [a.latency_ns for a in result.of(Outcome.ANSWERED)]
    return {
        "dead": len(dead),
        "passed_on": len(passed_on),
        "answered": len(answered),
        "refused": len(result.attempts) - len(gave_up) - len(answered),
        "p99": quantile(answered, 0.99) / 1e6,
        "lag": result.lag_ns(0.99) / 1e6,
    }


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--quick", is_flag=True, help="One round.")
@click.option("--json", "json_path", default="", help="Write all figures to a file, or - for stdout.")
def main(rounds: int, quick: bool, json_path: str) -> None:
    """Dead requests passed on after a stall, by what clients do when they give up."""
    rounds = 1 if quick else rounds
    everything: dict[str, Any] = {}
    for give_up, how in (
        (GiveUp.SILENT, "without a sign (NAT, crashed host)"),
        (GiveUp.FIN, "by FIN, after their request"),
        (GiveUp.RESET, "by RST"),
    ):
        makers = {name: (lambda m=make, g=give_up: measure(m, g)) for name, make in MAKERS.items()}
        result = play(makers, rounds)
        everything[give_up.value] = result.to_json()
        if json_path == "-":
            continue
        click.echo(
            table(
                result,
                f"{RATE} new connections/s, a stall of {STALL_S:g} s, patience {PATIENCE_MS} ms;\n"
                f"clients give up {how}",
                COLUMNS,
            )
        )
        click.echo()
    if json_path != "-":
        click.echo(host_line(result))
    if json_path:
        write_json(json_path, "stall", everything)


if __name__ == "__main__":
    main()
