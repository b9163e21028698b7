"""New connections per second and echo latency, one worker or thread each.

Run from tests/:  ../.venv/bin/python -m bench.connections [--quick] [--json FILE]
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
from harness.processes import cpu_seconds
from harness.rounds import Figures, host_line, play, table, write_json

SIZE = 64  # bytes of a message: what is measured is the way, not the copying
REFERENCE = "haproxy tcp"

Peer = Any  # host, port, pids


def measure(peer: Peer, seconds: float, connections: int) -> Figures:
    """Figures of one peer in one round; times in us."""
    figures: Figures = {}
    before = cpu_seconds(peer.pids)
    fresh = drive(peer.host, peer.port, "connect", connections=connections, seconds=seconds, size=SIZE)
    used = cpu_seconds(peer.pids) - before
    figures |= {
        "rate": fresh.rate,
        "p50": fresh.p50_ns / 1e3,
        "p99": fresh.p99_ns / 1e3,
        "errors": fresh.errors,
    }
    # the warm-up's tenth uses CPU as well but is not in the count
    figures["cpu"] = used * 0.9 * 1e6 / max(1, fresh.count)
    for many in (1, connections):
        before = cpu_seconds(peer.pids)
        echo = drive(peer.host, peer.port, "echo", connections=many, seconds=seconds / 2, size=SIZE)
        used = cpu_seconds(peer.pids) - before
        tag = "one" if many == 1 else "many"
        figures |= {f"echo_{tag}": echo.rate, f"echo_{tag}_p50": echo.p50_ns / 1e3}
        figures |= {
            f"echo_{tag}_p99": echo.p99_ns / 1e3,
            f"echo_{tag}_cpu": used * 0.9e6 / max(1, echo.count),
        }
        figures["errors"] += echo.errors
    return figures


def contestants(backend: NativeBackend) -> dict[str, Callable[[], AbstractContextManager[Peer]]]:
    address = backend.address
    return {
        "haproxy tcp": lambda: HAProxy(address),
        "nginx stream": lambda: Nginx(address),
        "tidegate": lambda: Gate(address),
        "tidegate, no bpf": lambda: Gate(address, top={"queue_age": "tcp_info"}),
    }


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=3.0, show_default=True, help="Of each measurement.")
@click.option("--connections", default=32, show_default=True, help="Open at a time.")
@click.option("--quick", is_flag=True, help="Two short rounds: does it run, roughly how fast.")
@click.option("--only", default="", help="Names of contestants, comma-separated.")
@click.option("--json", "json_path", default="", help="Write all figures to a file, or - for stdout.")
def main(rounds: int, seconds: float, connections: int, quick: bool, only: str, json_path: str) -> None:
    """New connections per second and echo latency, in turn, as ratios to HAProxy."""
    if quick:
        rounds, seconds = 2, 1.0
    with NativeBackend("echo") as backend:
        makers = contestants(backend)
        if only:
            makers = {name: makers[name] for name in only.split(",")}

        def one(make: Callable[[], AbstractContextManager[Peer]]) -> Figures:
            with make() as peer:
                return measure(peer, seconds, connections)

        result = play({name: (lambda m=make: one(m)) for name, make in makers.items()}, rounds)  # type: ignore[misc]
        direct = drive("127.0.0.1", backend.port, "connect", connections=connections, seconds=1, size=SIZE)
    reference = REFERENCE if REFERENCE in makers else next(iter(makers))
    if json_path != "-":
        click.echo(
            table(
                result,
                f"New connections, {SIZE} bytes echoed on each, {connections} at a time (us)",
                [("rate", "conn/s", ".0f"), ("p50", "p50", ".0f"), ("p99", "p99", ".0f"),
                 ("cpu", "CPU each", ".1f"), ("errors", "errors", ".0f")],
                ratio_of="rate", reference=reference,
            )
        )  # fmt: skip
        for tag, many in (("one", 1), ("many", connections)):
            click.echo()
            click.echo(
                table(
                    result,
                    f"Echo of {SIZE} bytes on {many} lasting connection{'s' * (many > 1)} (us)",
                    [(f"echo_{tag}", "msg/s", ".0f"), (f"echo_{tag}_p50", "p50", ".0f"),
                     (f"echo_{tag}_p99", "p99", ".0f"), (f"echo_{tag}_cpu", "CPU each", ".1f")],
                    ratio_of=f"echo_{tag}", reference=reference,
                )
            )  # fmt: skip
        click.echo(f"\nThe client and the backend without a proxy: {direct.rate:.0f} connections/s.")
        click.echo(host_line(result))
    if json_path:
        write_json(json_path, "connections", {**result.to_json(), "direct": direct.rate})


if __name__ == "__main__":
    main()
