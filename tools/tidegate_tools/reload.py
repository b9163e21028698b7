"""`tidegate reload`: the configuration is read again, in place."""

from __future__ import annotations

import click

from tidegate_tools import client


@click.command()
@client.control_option
@client.json_option
@click.option("--timeout", type=click.FloatRange(1), default=60.0, show_default=True, metavar="SECONDS",
              help="How long to wait for the answer.")  # fmt: skip
def command(control: str | None, as_json: bool, timeout: float) -> None:
    """Make the running tidegate read its configuration file again.

    Listeners and clusters that did not change keep their sockets, sessions and pools. When the file is wrong
    the old configuration serves on, the errors are shown and the exit status is 1. The same as SIGHUP, which
    cannot answer.
    """
    answer = client.call(control, "reload", timeout_s=timeout)
    client.show_answer(answer, as_json, "reloaded")
