"""Slow-loris: what a thousand clients that trickle their heads cost the others.

Normal clients come at a fixed rate, once alone and once beside the slow ones, through the same process.
Whether descriptors and memory come back is measured after the slow ones have gone; then they come again, for
memory that a first time made ready for use is no leak.

Run from tests/:  ../.venv/bin/python -m bench.slow_clients [--quick] [--json FILE]
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import click
from harness.backends import Backend
from harness.client import run
from harness.gate_peer import Gate
from harness.peers import HAProxy, Nginx
from harness.plan import Outcome, Plan, Result, Send, quantile
from harness.processes import cpu_seconds, stat
from harness.rounds import Figures, host_line, play, table, write_json
from harness.slow_clients import SlowClients
from harness.waiting import wait_until

COLUMNS = [
    ("p50", "p50 ms", ".2f"),
    ("p50_slow", "beside", ".2f"),
    ("p99", "p99 ms", ".2f"),
    ("p99_slow", "beside", ".2f"),
    ("lost", "lost", ".0f"),
    ("cpu", "CPU %", ".1f"),
    ("fds", "fds left", ".0f"),
    ("rss", "KiB left", ".0f"),
]

Maker = Callable[[str], AbstractContextManager[Any]]
MAKERS: dict[str, Maker] = {
    "haproxy http": lambda address: HAProxy(address, mode="http"),
    "nginx http": lambda address: Nginx(address, mode="http"),
    "tidegate http": lambda address: Gate(address, protocol="http", request_timeout="120s"),
}


def files(pids: list[int]) -> int:
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)


def memory(pids: list[int]) -> int:
    return sum(seen.rss_bytes for seen in map(stat, pids) if seen is not None)


def measure(make: Maker, slow: int, interval_ms: int, rate: int, seconds: float) -> Figures:
    """One proxy in one round."""
    with Backend("counting") as backend, make(backend.address) as peer:

        def normal() -> Result:
            return run(Plan(peer.host, peer.port, rate=rate, count=int(rate * seconds), send=Send.HTTP))

        normal()  # whatever is made ready at first use
        alone = normal()
        before = files(peer.pids)

        def come_and_go() -> tuple[Result, float]:
            with SlowClients(peer.port, slow, interval_ms) as clients:
                used = cpu_seconds(peer.pids)
                result = normal()
                used = cpu_seconds(peer.pids) - used
                still = clients.counts()["open"]
                assert still == slow, f"{slow - still} of the slow clients were ended meanwhile"
            wait_until(lambda: files(peer.pids) < before + slow // 10, 20, "the slow ones to be let go")
            return result, used

        beside, used = come_and_go()
        held = memory(peer.pids)
        come_and_go()
        normal()
        left = files(peer.pids) - before
        grown = memory(peer.pids) - held
    times = [[one.latency_ns for one in result.of(Outcome.ANSWERED)] for result in (alone, beside)]
    attempts = len(alone.attempts) + len(beside.attempts)
    return {
        "p50": quantile(times[0], 0.5) / 1e6,
        "p50_slow": quantile(times[1], 0.5) / 1e6,
        "p99": quantile(times[0], 0.99) / 1e6,
        "p99_slow": quantile(times[1], 0.99) / 1e6,
        "ratio": quantile(times[1], 0.99) / max(1, quantile(times[0], 0.99)),
        "lost": attempts - len(times[0]) - len(times[1]),
        "cpu": 100 * used / seconds,
        "fds": left,
        "rss": grown / 1024,
    }


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--slow", default=1000, show_default=True, help="Slow clients.")
@click.option("--interval", default=300, show_default=True, help="Milliseconds between two bytes of one.")
@click.option("--rate", default=200, show_default=True, help="Normal clients per second.")
@click.option("--seconds", default=8.0, show_default=True, help="Of each measurement.")
@click.option("--quick", is_flag=True, help="One round of 3 seconds.")
@click.option("--only", default="", help="Names of contestants, comma-separated.")
@click.option("--json", "json_path", default="", help="Write all figures to a file, or - for stdout.")
def main(
    rounds: int, slow: int, interval: int, rate: int, seconds: float, quick: bool, only: str, json_path: str
) -> None:
    """Latency of normal clients beside a crowd of slow ones."""
    if quick:
        rounds, seconds = 1, 3.0
    names = only.split(",") if only else list(MAKERS)
    result = play(
        {
            name: (lambda n=name: measure(MAKERS[n], slow, interval, rate, seconds))  # type: ignore[misc]
            for name in names
        },
        rounds,
    )
    if json_path != "-":
        click.echo(
            table(
                result,
                f"{rate} clients/s, alone and beside {slow} that send a byte each {interval} ms",
                COLUMNS,
            )
        )
        click.echo("\np99 beside the slow ones by p99 alone, median and spread; goal: at most 2")
        for name in names:
            ratios = result.values(name, "ratio")
            click.echo(f"{name:<16}{result.median(name, 'ratio'):>6.2f}  {min(ratios):.2f}-{max(ratios):.2f}")
        click.echo(host_line(result))
    if json_path:
        write_json(json_path, "slow_clients", result.to_json())


if __name__ == "__main__":
    main()
