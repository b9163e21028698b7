"""`tidegate drain`: let a worker, or everything, finish and stop."""

from __future__ import annotations

import click

from tidegate_tools import client


@click.command(
    epilog="""\b
Examples:
  tidegate drain --worker 1   its sessions finish, then it is replaced
  tidegate drain              all of it finishes and ends, as with SIGTERM
"""
)
@client.control_option
@client.json_option
@click.option("--worker", type=click.IntRange(0), help="Only this worker (its index in `tidegate workers`).")
@click.option("--timeout", type=click.FloatRange(1), default=10.0, show_default=True, metavar="SECONDS",
              help="How long to wait for the answer; draining goes on after it.")  # fmt: skip
def command(control: str | None, as_json: bool, worker: int | None, timeout: float) -> None:
    """Let a worker, or all of tidegate, finish its sessions and stop.

    No new connection is given to it; what it has may finish within the configured drain_timeout.
    Asked again while all of it drains, it changes nothing and says how long remains.
    """
    args = {} if worker is None else {"worker": worker}
    answer = client.call(control, "drain", args, timeout)
    client.show_answer(answer, as_json, "draining" if worker is None else f"worker {worker} is draining")
