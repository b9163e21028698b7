"""Options and calls that every verb shares which talks to the running tidegate."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import click

from tidegate.config.defaults import CONTROL as DEFAULT_CONTROL
from tidegate.control import client
from tidegate_tools.table import clean

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def control_option(function: Decorated) -> Decorated:
    """--control PATH, or TIDEGATE_CONTROL from the environment."""
    return click.option(
        "--control",
        metavar="PATH",
        envvar="TIDEGATE_CONTROL",
        help=f"Control socket of the tidegate meant (default {DEFAULT_CONTROL}; or set TIDEGATE_CONTROL).",
    )(function)


def json_option(function: Decorated) -> Decorated:
    """--json."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(function)


def call(
    control: str | None, verb: str, args: dict[str, Any] | None = None, timeout_s: float = 5.0
) -> dict[str, Any]:
    """The verb's result. Raises ControlUnreachable (exit code 3) or ControlError (1)."""
    return client.call(control or DEFAULT_CONTROL, verb, args, timeout_s)


def ask(
    control: str | None, verb: str, args: dict[str, Any] | None = None, timeout_s: float = 5.0
) -> AbstractContextManager[client.Asked]:
    """As `call`, of a verb that may stream: the answer is there while the block lasts."""
    return client.ask(control or DEFAULT_CONTROL, verb, args, timeout_s)


def status_if_any(control: str | None) -> dict[str, Any] | None:
    """The running tidegate's status; None when none runs and none was named.

    Raises:
        ControlUnreachable: the one that was named does not answer.
    """
    try:
        return call(control, "status", timeout_s=2.0)
    except client.ControlUnreachable:
        if control:
            raise
        return None


def show_json(value: object, *, indent: int | None = 2) -> None:
    """On one line when `indent` is None: a stream of frames is one a line."""
    click.echo(json.dumps(value, indent=indent))


def show_answer(answer: dict[str, Any], as_json: bool, done: str) -> None:
    """What a verb that changes something says: its own message when it has one."""
    if as_json:
        show_json(answer)
        return
    click.echo(clean(str(answer.get("message") or done)))
    for note in answer.get("notes", ()):
        click.echo(f"note: {clean(str(note))}")
