"""`tidegate ctl`: any verb of the control socket, as JSON."""

from __future__ import annotations

import json
from typing import Any

import click

from tidegate.errors import EXIT_USAGE, OperatorError
from tidegate_tools import client


class ArgumentError(OperatorError):
    """An argument that is not name=value."""

    exit_code = EXIT_USAGE


@click.command(
    epilog="""\b
Examples:
  tidegate ctl status
  tidegate ctl drain worker=1
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
    """
    client.show_json(client.call(control, verb, parse_arguments(arguments), timeout))


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
