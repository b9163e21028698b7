"""`tidegate ctl`: any verb of the control socket, as JSON."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from typing import Any

import click

from tidegate.control.client import ControlUnreachable
from tidegate.errors import EXIT_USAGE, OperatorError
from tidegate_tools import client

_PAUSE_S = 0.1  # before the successor is asked, so that nothing that keeps ending spins


class ArgumentError(OperatorError):
    """An argument that is not name=value."""

    exit_code = EXIT_USAGE


@click.command(
    epilog="""\b
Examples:
  tidegate ctl status
  tidegate ctl drain worker=1
  tidegate ctl events level=warning | jq -r .event
  tidegate ctl events 'event=["worker_died","backend_ejected"]'
"""
)
@click.argument("verb")
@click.argument("arguments", metavar="[NAME=VALUE]...", nargs=-1)
@client.control_option
@click.option("--timeout", type=click.FloatRange(0.1), default=5.0, show_default=True, metavar="SECONDS",
              help="How long to wait for the answer.")  # fmt: skip
def command(verb: str, arguments: tuple[str, ...], control: str | None, timeout: float) -> None:
    """Send VERB to the control socket and print the answer as JSON.

    A VALUE is JSON when it reads as JSON (3, true, ["a"]) and text when not.

    The verb `events` goes on: one line of JSON per event until Ctrl-C, or until tidegate ends. It follows
    the successor after an upgrade. Both are said on standard error.
    """
    args = parse_arguments(arguments)
    with suppress(KeyboardInterrupt):
        if not _show(control, verb, args, timeout):
            return
        while True:
            time.sleep(_PAUSE_S)  # after an upgrade the successor listens where its predecessor did
            try:
                ended = _show(control, verb, args, timeout, again=True)
            except ControlUnreachable:
                click.echo("tidegate has ended", err=True)
                return
            if not ended:
                return


def _show(
    control: str | None, verb: str, args: dict[str, Any], timeout_s: float, again: bool = False
) -> bool:
    """Prints the answer and the events that follow it; True when tidegate ended the stream of them."""
    with client.ask(control, verb, args, timeout_s) as asked:
        if not asked.result.get("streaming"):
            client.show_json(asked.result)
            return False
        whose = "its successor's" if again else "tidegate's"
        click.echo(f"following {whose} events from level {asked.result['level']} up; Ctrl-C ends", err=True)
        for event in asked.events(reader_fd=sys.stdout.fileno()):
            client.show_json(event.get("event", event), indent=None)
        return asked.ended


def parse_arguments(arguments: tuple[str, ...]) -> dict[str, Any]:
    """{name: value}; "a.b=1" makes {"a": {"b": 1}}."""
    out: dict[str, Any] = {}
    for argument in arguments:
        path, equals, text = argument.partition("=")
        if not equals or not path:
            raise ArgumentError(f"{argument!r} is not name=value", "for example worker=1")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        *parents, name = path.split(".")
        into = out
        for parent in parents:
            below = into.setdefault(parent, {})
            if not isinstance(below, dict):
                raise ArgumentError(f"{argument!r}: {parent} has a value already")
            into = below
        into[name] = value
    return out
