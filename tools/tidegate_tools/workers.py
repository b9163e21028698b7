"""`tidegate workers`: the worker processes of the running tidegate."""

from __future__ import annotations

import click

from tidegate_tools import client, status


@click.command(
    epilog="""\b
States: starting, active, draining, hung (its heartbeat is older than
hang_after: the others serve its queue), dead (about to be restarted), ended
(finished, while all of tidegate drains).
"""
)
@client.control_option
@client.json_option
def command(control: str | None, as_json: bool) -> None:
    """Show the workers: state, heartbeat, sessions, queues, thefts, restarts.

    WAITING are connections in the kernel's accept queues, QUEUED those that were accepted and wait for a
    session. THEFTS counts what a worker took from the queue of another that hung, died or was behind.
    """
    answer = client.call(control, "status")
    if as_json:
        client.show_json(answer["workers"])
    else:
        click.echo(status.workers_table(answer) or "no worker")
