"""Options and calls that every verb shares which talks to the running tidegate."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import click

from tidegate.config.defaults import CONTROL as DEFAULT_CONTROL
from tidegate.control import client
from tidegate.control.protocol import ErrorCode
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


class Known(NamedTuple):
    """The running tidegate's status. `note` says why there is none, unless none runs and none was named."""

    status: dict[str, Any] | None
    note: str = ""


def known(control: str | None) -> Known:
    """Asks for the status, for verbs that have something to show without it."""
    whom = f"the tidegate at {control or DEFAULT_CONTROL}"
    forbidden = Known(None, f"may not ask {whom} (needs root)")
    try:
        return Known(call(control, "status", timeout_s=2.0))
    except client.ControlForbidden:
        return forbidden
    except client.ControlAbsent as error:
        return Known(None, error.message if control else "")
    except client.ControlUnreachable as error:
        return Known(None, error.message)
    except client.ControlError as error:
        return forbidden if error.code == ErrorCode.FORBIDDEN else Known(None, f"{whom} said: {error}")


class Said:
    """Tells a note on standard error when it is another than the last one."""

    def __init__(self) -> None:
        self._last = ""

    def note(self, text: str, *, again: bool = False) -> None:
        """`again`: also when it was said, the screen being cleared meanwhile."""
        if text and (again or text != self._last):
            click.echo(f"note: {clean(text)}", err=True)
        self._last = text


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
