"""HTTP/1.1 requests per second through one worker or thread, kept-alive connections and new ones.

"tidegate compiled" takes part where tools/devlib/compiled.py has made that build.

Run from tests/:  ../.venv/bin/python -m bench.http_requests [--quick] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click
from harness import wrk
from harness.backends import NativeBackend
from harness.gate_peer import Gate
from harness.peers import HAProxy, Nginx
from harness.processes import cpu_seconds
from harness.rounds import Figures, host_line, play, table, write_json

REFERENCE = "haproxy http"
COLUMNS = [
    ("rate", "req/s", ".0f"),
    ("p50", "p50 us", ".0f"),
    ("p99", "p99 us", ".0f"),
    ("cpu", "CPU us", ".1f"),
    ("errors", "errors", ".0f"),
]

COMPILED = Path(__file__).resolve().parents[2] / "build" / "compiled" / "userspace"

Maker = Callable[[str], AbstractContextManager[Any]]
MAKERS: dict[str, Maker] = {
    "haproxy http": lambda address: HAProxy(address, mode="http"),
    "nginx http": lambda address: Nginx(address, mode="http"),
    "tidegate http": lambda address: Gate(address, protocol="http"),
}
if COMPILED.is_dir():  # made by tools/devlib/compiled.py
    MAKERS["tidegate compiled"] = lambda address: Gate(address, source=COMPILED, protocol="http")


def measure(make: Maker, close: bool, connections: int, seconds: float) -> Figures:
    """One peer in one round. `close`: a new client connection for every request."""
    with NativeBackend("http") as backend, make(backend.address) as peer:
        used = cpu_seconds(peer.pids)
        seen = wrk.run(f"http://{peer.address}/", connections=connections, seconds=seconds, close=close)
        used = cpu_seconds(peer.pids) - used
    return {
        "rate": seen.rate,
        "p50": seen.p50_us,
        "p99": seen.p99_us,
        "cpu": used * 1e6 / max(1, seen.requests),
        "errors": seen.errors,
    }


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=3.0, show_default=True)
@click.option("--connections", default=32, show_default=True)
@click.option("--quick", is_flag=True, help="Two rounds of one second.")
@click.option("--only", default="", help="Names of contestants, comma-separated.")
@click.option("--json", "json_path", default="", help="Write all figures to a file, or - for stdout.")
def main(rounds: int, seconds: float, connections: int, quick: bool, only: str, json_path: str) -> None:
    """Requests per second, keep-alive and close, as ratios to HAProxy."""
    everything: dict[str, Any] = {}
    names = only.split(",") if only else list(MAKERS)
    if quick:
        rounds, seconds = 2, 1.0
    for close, title in ((False, "kept-alive connections"), (True, "a new connection for every request")):
        result = play(
            {
                name: (lambda n=name, c=close: measure(MAKERS[n], c, connections, seconds))  # type: ignore[misc]
                for name in names
            },
            rounds,
        )
        everything["close" if close else "keepalive"] = result.to_json()
        if json_path == "-":
            continue
        reference = REFERENCE if REFERENCE in names else names[0]
        heading = f"GET of 128 bytes, {connections} at a time, {title}"
        click.echo(table(result, heading, COLUMNS, ratio_of="rate", reference=reference))
        click.echo()
    if json_path != "-":
        click.echo(host_line(result))
    if json_path:
        write_json(json_path, "http_requests", everything)


if __name__ == "__main__":
    main()
