"""`tidegate errors`: the last messages that were refused, each with the byte to blame."""

from __future__ import annotations

import shutil
import time
from typing import Any

import click

from tidegate_tools import client
from tidegate_tools.table import clean

_INDENT = "    "


@click.command(
    epilog="""\b
Examples:
  tidegate errors
  tidegate errors --limit 1 --json | jq '.errors[0].byte'
"""
)
@click.option("--limit", type=click.IntRange(1, 64), default=10, show_default=True,
              help="How many of the last ones.")  # fmt: skip
@client.control_option
@client.json_option
def command(limit: int, control: str | None, as_json: bool) -> None:
    """Show the last HTTP messages and PROXY headers that were refused.

    Newest first: whose it was, why it was refused, and the bytes around the one to blame, with ^ below it.
    Bytes that do not print are written as \\xNN.
    """
    answer = client.call(control, "errors", {"limit": limit})
    if as_json:
        client.show_json(answer)
        return
    width = shutil.get_terminal_size().columns - 1
    for error in answer["errors"]:
        click.echo("\n".join(lines(error, width)))
    click.echo(totals(answer))
    for note in answer["notes"]:
        click.echo(f"note: {clean(str(note))}", err=True)


def totals(answer: dict[str, Any]) -> str:
    """How many were refused: of the workers that answered, which are not all while some hang."""
    shown = f"{answer['total']}; shown: {len(answer['errors'])}"
    workers, answered = answer.get("workers", 0), answer.get("answered", 0)
    if answered == workers:
        return f"refused since the workers started: {shown}"
    silent = f"{workers - answered} of {workers} workers did not answer"
    return f"refused by those that answered: {shown}; {silent}" if answered else f"not known: {silent}"


def lines(error: dict[str, Any], width: int) -> list[str]:
    """One refused message for people, in at most `width` columns where its own words allow."""
    clock = time.strftime("%H:%M:%S", time.localtime(error["time"]))
    excerpt, mark = clean(error["excerpt"]), error["mark"]
    where = "" if mark is None else f" at byte {error['position']} (0x{error['byte']:02x})"
    client_name = clean(error["client"])
    sender = client_name if error["side"] == "client" else f"the backend, for {client_name}"
    out = [
        f"{clock} {clean(error['listener'])}: {clean(error['fault'])}{where}",
        f"{_INDENT}from {sender}: {clean(error['message'])}",
    ]
    room = max(20, width - len(_INDENT))
    if mark is None:
        return [*out, _INDENT + excerpt[:room]] if excerpt else out
    start, end = mark
    # the window around the byte, so that more stands before it than behind it
    first = max(0, min(start - room * 2 // 3, len(excerpt) - room))
    return [
        *out,
        _INDENT + excerpt[first : first + room],
        _INDENT + " " * (start - first) + "^" * (end - start),
    ]
