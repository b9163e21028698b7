"""Two workers, one of them stopped for three seconds: who waits how long, who is lost.

Clients wait as long as it takes here, so that the longest wait is seen; those who waited longer than a
patience of 500 ms are counted as lost.

Run from tests/:  ../.venv/bin/python -m bench.hung_worker [--quick] [--json FILE]
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
from harness.plan import Outcome, Plan, quantile
from harness.processes import stopped
from harness.rounds import Figures, host_line, play, table, write_json
from harness.threads import thread_stopped, threads

HANG_S = 3.0
PATIENCE_NS = 500_000_000
HANG_AFTER_MS = 200

COLUMNS = [
    ("made", "made", ".0f"),
    ("lost", "lost", ".0f"),
    ("longest", "longest", ".0f"),
    ("p99", "p99", ".1f"),
    ("p50", "p50", ".1f"),
    ("lag", "own lag", ".1f"),
]

Maker = Callable[[str], AbstractContextManager[Any]]


def gate(address: str, **top: str) -> Gate:
    given = {"hang_after": f"{HANG_AFTER_MS}ms", "kill_hung_after": "2h", **top}
    return Gate(address, workers=2, top=given, stale_after="60s")


def plain_reuseport(address: str) -> Gate:
    """The kernel's own hash over the listeners, and nobody looks after a sibling."""
    return gate(address, queue_age="tcp_info", hang_after="1h")


MAKERS: dict[str, Maker] = {
    "tidegate p2c": gate,
    "tidegate least_queue": lambda address: gate(address, steer="least_queue"),
    "plain reuseport": plain_reuseport,
    "nginx 2 workers": lambda address: Nginx(address, workers=2),
    "nginx 2 workers reuseport": lambda address: Nginx(address, workers=2, reuseport=True),
    "haproxy 2 threads": lambda address: HAProxy(address, threads=2),
    "haproxy 2 processes": lambda address: HAProxy(address, processes=2),
}


def hold(peer: Any) -> AbstractContextManager[Any]:
    """Stops one worker, be it a process or a thread."""
    if isinstance(peer, HAProxy) and len(peer.pids) == 1:
        return thread_stopped(threads(peer.pids[0])[-1])
    return stopped(peer.pids[-1])


def measure(make: Maker, rate: int) -> Figures:
    """One hang at `rate` new connections a second."""
    with Backend("counting") as backend, make(backend.address) as peer:
        plan = Plan(peer.host, peer.port, rate=rate, count=int(rate * (HANG_S + 3)), patience_ns=20 * 10**9)
        with Client(plan) as client:
            client.go()
            time.sleep(1.5)
            with hold(peer):
                time.sleep(HANG_S)
            result = client.result()
    answered = [a.latency_ns for a in result.of(Outcome.ANSWERED)]
    return {
        "made": len(result.attempts),
        "lost": len(result.attempts) - sum(1 for latency in answered if latency <= PATIENCE_NS),
        "longest": max(answered, default=0) / 1e6,
        "p99": quantile(answered, 0.99) / 1e6,
        "p50": quantile(answered, 0.5) / 1e6,
        "lag": result.lag_ns(0.99) / 1e6,
    }


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--quick", is_flag=True, help="One round, 200 connections/s only.")
@click.option("--json", "json_path", default="", help="Write all figures to a file, or - for stdout.")
def main(rounds: int, quick: bool, json_path: str) -> None:
    """The longest wait while one of two workers hangs."""
    everything: dict[str, Any] = {}
    for rate in (200,) if quick else (200, 500):
        makers = {name: (lambda m=make, r=rate: measure(m, r)) for name, make in MAKERS.items()}
        result = play(makers, 1 if quick else rounds)
        everything[str(rate)] = result.to_json()
        if json_path == "-":
            continue
        click.echo(
            table(
                result,
                f"{rate} new connections/s, one of two workers stopped for {HANG_S:g} s (ms)",
                COLUMNS,
            )
        )
        click.echo()
    if json_path != "-":
        click.echo(f"lost: waited longer than {PATIENCE_NS / 1e6:.0f} ms; goal for tidegate's longest:")
        click.echo(f"hang_after + 50 ms = {HANG_AFTER_MS + 50} ms")
        click.echo(host_line(result))
    if json_path:
        write_json(json_path, "hung_worker", everything)


if __name__ == "__main__":
    main()
