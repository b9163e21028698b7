"""`tidegate ages`: how long connections wait, for every TCP listener of the host."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import click

from tidegate.config.errors import BadValueError
from tidegate.config.units import parse_duration
from tidegate.errors import EXIT_UNREACHABLE, OperatorError
from tidegate_tools import ages_view, client, namespaces, owners
from tidegate_tools.ages_view import Selection, View
from tidegate_tools.snapshot import Reader

SORTS = ("oldest", "waiting", "gone", "address", "process")


class NotFoundError(OperatorError):
    """No listener is as the command line says."""

    exit_code = EXIT_UNREACHABLE


class _WatchType(click.FloatRange):
    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return float(super().convert(value, param, ctx))
        except click.BadParameter as error:
            # what stands behind --watch is its number, where a listener may have been meant
            raise click.BadParameter(
                f"{error.message.rstrip('.')}; to watch a listener: tidegate ages {value} --watch", ctx, param
            ) from None


@click.command(
    epilog="""\b
Examples:
  tidegate ages                     every listener of this host
  tidegate ages 8080 nginx          those on port 8080, and those of nginx
  tidegate ages --busy --watch      what waits now, again every second
  tidegate ages 8080 --connections  each waiting connection of one
  tidegate ages --all-netns --json  containers as well, for a program
  tidegate ages --attach /sys/fs/cgroup/system.slice/nginx.service
                                    to the microsecond, for nginx
"""
)
@click.argument("listener", nargs=-1)
@client.control_option
@client.json_option
@click.option("--busy", is_flag=True, help="Only listeners where a connection waits.")
@click.option("--min-age", metavar="TIME", help="Only where one waits for this long, e.g. 500ms.")
@click.option("--sort", type=click.Choice(SORTS), default="oldest", show_default=True, help="Order of rows.")
@click.option("--connections", is_flag=True, help="List each waiting connection, the oldest first.")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True,
              help="Most connections to list.")  # fmt: skip
@click.option("--watch", type=_WatchType(min=0.1, max=3600), is_flag=False, flag_value=1.0,
              metavar="[SECONDS]",
              help="Look again every so many seconds (1) until interrupted; name listeners before it.",
              )  # fmt: skip
@click.option("--attach", type=click.Path(path_type=Path), metavar="CGROUP",
              help="Read exact ages for this cgroup from the sockets themselves (root).",
              )  # fmt: skip
@click.option("--netns", multiple=True, metavar="NAME",
              help="In this network namespace: a name, a path, or pid:NUMBER. May be repeated.")  # fmt: skip
@click.option("--all-netns", is_flag=True, help="In every network namespace that can be found.")
def command(
    listener: tuple[str, ...],
    control: str | None,
    as_json: bool,
    busy: bool,
    min_age: str | None,
    sort: str,
    connections: bool,
    limit: int,
    watch: float | None,
    attach: Path | None,
    netns: tuple[str, ...],
    all_netns: bool,
) -> None:
    """Show how long connections wait in accept queues.

    For each TCP listener of the host: who holds it, how many connections wait of how many that may, how many
    of their clients are gone, and the ages of those that wait now. LISTENER selects by port, address, process
    name or number, or a tidegate listener's name.

    Ages come from tidegate's stamps, from the sockets themselves (`attached`: while a `tidegate trace` of
    their cgroup runs, or with --attach), or from the kernel's tcp_info, in ticks; the last column says which.
    Works with every server, and while its workers hang.
    """
    selection = Selection(listener, busy, _parse_age(min_age), sort, limit if connections else 0)
    with ExitStack() as stack:
        reader = Reader(_where(netns, all_netns))
        stack.callback(reader.close)
        if all_netns and os.geteuid() != 0:
            reader.note("network namespaces of other users' processes are found by root only")
        if attach is not None:
            stack.enter_context(_attach(attach))
        said = client.Said()
        try:
            while True:
                view, unasked = _look(reader, selection, control)
                _show(view, as_json, watch)
                if not as_json:  # which has it among its notes
                    said.note(unasked, again=watch is not None and sys.stdout.isatty())
                if watch is None:
                    break
                time.sleep(watch)
        except KeyboardInterrupt:
            sys.exit(130)
    if listener and not view.rows:
        raise NotFoundError(
            f"no TCP listener matches {' '.join(listener)}", "tidegate ages shows all of them"
        )


def _attach(cgroup: Path) -> AbstractContextManager[object]:
    from tidegate.kernel.queue_times import QueueTimes  # what needs a compiler is not loaded for others

    return QueueTimes(cgroup)


def _where(names: Sequence[str], everywhere: bool) -> list[namespaces.Namespace]:
    if everywhere:
        return namespaces.every()
    return [namespaces.by_name(name) for name in names] or [namespaces.OWN]


def _look(reader: Reader, selection: Selection, control: str | None) -> tuple[View, str]:
    """And why tidegate's own figures are not in it, when that is not because none runs."""
    status, unasked = client.known(control)
    snapshot = reader.read()
    inodes = {one.inode for queue in snapshot.queues for one in queue.sockets}
    return ages_view.build(snapshot, owners.find(inodes), status, selection, unasked), unasked


def _show(view: View, as_json: bool, watch: float | None) -> None:
    if as_json:
        client.show_json(ages_view.as_json(view), indent=None if watch else 2)
        return
    if watch is None and view.selection.patterns and not view.rows:
        for note in view.notes:  # the error that follows says the rest
            click.echo(f"note: {note}", err=True)
        return
    text = ages_view.as_text(view)
    if watch is not None and sys.stdout.isatty():
        click.clear()
    elif watch is not None:
        text += "\n"
    click.echo(text)


def _parse_age(text: str | None) -> int:
    """Ns."""
    if text is None:
        return 0
    try:
        return parse_duration(text)
    except BadValueError as error:
        raise click.BadParameter(f"{text!r} {error}", param_hint="--min-age") from None
