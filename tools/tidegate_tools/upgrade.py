"""`tidegate upgrade`: hand over to the version that is installed now."""

from __future__ import annotations

import click

from tidegate_tools import client


@click.command()
@client.control_option
@client.json_option
@click.option("--timeout", type=click.FloatRange(1), default=90.0, show_default=True, metavar="SECONDS",
              help="How long to wait for the successor to serve.")  # fmt: skip
def command(control: str | None, as_json: bool, timeout: float) -> None:
    """Hand over to the tidegate that is installed now.

    The successor gets the listeners, with all that waits in them, and the kernel side; this one finishes its
    sessions and ends. When the successor does not start, this one serves on and the exit status is 1. The
    same as SIGUSR2, which cannot answer.
    """
    answer = client.call(control, "upgrade", timeout_s=timeout)
    client.show_answer(answer, as_json, "handed over")
