"""`tidegate top`: a live view in the terminal."""

from __future__ import annotations

import curses
import os
import shutil
import signal
import sys
import time
from contextlib import ExitStack
from typing import Any

import click

from tidegate.control.client import ControlError, ControlUnreachable
from tidegate_tools import client, owners
from tidegate_tools.snapshot import Reader
from tidegate_tools.top_model import SORTS, History, Look, ordered
from tidegate_tools.top_view import Controls, Line, Screen, Style, frame, selected

_ESCAPE, _ENTER = 27, (10, 13, curses.KEY_ENTER)
_INTERVALS = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_SESSIONS_SHOWN = 200


@click.command(
    epilog="""\b
Examples:
  tidegate top
  tidegate top --once --size 80x24     one frame, for a pipe or a report
  tidegate top --host                  every listener, tidegate's or not
"""
)
@client.control_option
@click.option("--interval", type=click.FloatRange(0.1, 60), default=1.0, show_default=True, metavar="SECONDS",
              help="Time between looks.")  # fmt: skip
@click.option("--sort", type=click.Choice(SORTS), default="oldest", show_default=True, help="First order.")
@click.option("--host", is_flag=True, help="Show the listeners of the host even when tidegate runs.")
@click.option("--once", is_flag=True, help="Print one frame and end (so it does without a terminal).")
@click.option("--screen", type=click.Choice([str(one) for one in Screen]), default="overview",
              show_default=True, help="First screen.")  # fmt: skip
@click.option("--size", metavar="WxH", help="Size of the frame of --once, e.g. 80x24.")
@click.option("--ascii", "ascii_only", is_flag=True, help="Draw with ASCII only.")
def command(
    control: str | None,
    interval: float,
    sort: str,
    host: bool,
    once: bool,
    screen: str,
    size: str | None,
    ascii_only: bool,
) -> None:
    """Live view of workers, listeners, what is dropped, and backends.

    Without a running tidegate it shows every TCP listener of the host and who waits there. Keys: ? lists
    them.
    """
    encoding = (sys.stdout.encoding or "").lower()
    controls = Controls(
        screen=Screen(screen), sort=sort, interval_s=interval, ascii_only=ascii_only or "utf" not in encoding
    )
    with ExitStack() as stack:
        reader = Reader()
        stack.callback(reader.close)
        source = _Source(reader, control, host)
        if once or not sys.stdout.isatty() or not sys.stdin.isatty():
            _print_one(source, controls, size)
        else:
            _live(source, controls)


class _Source:
    """Looks at the host and asks the running tidegate."""

    def __init__(self, reader: Reader, control: str | None, host: bool) -> None:
        self._reader = reader
        self._control = control
        self._host = host
        self._lists_sessions = True
        self._answered = False

    def look(self, *, sessions: bool) -> Look:
        status, note = self._status()
        now = time.monotonic_ns()  # of the counters: rates go by them
        snapshot = self._reader.read()
        inodes = {one.inode for queue in snapshot.queues for one in queue.sockets}
        held = owners.find(inodes).by_inode if status is None else {}
        listed = self._sessions() if sessions and status is not None else None
        return Look(now, snapshot.queues, held, status, listed, note, self._host)

    def _status(self) -> tuple[dict[str, Any] | None, str]:
        if self._host:
            return None, "tidegate is left out (--host)"
        status, note = client.known(self._control)
        self._answered = self._answered or status is not None
        if status is None and not note:
            # it may come back: an upgrade, a restart
            note = "tidegate does not answer any more" if self._answered else "no tidegate runs"
        return status, note

    def _sessions(self) -> list[dict[str, object]] | None:
        if not self._lists_sessions:
            return None
        try:
            answer = client.call(self._control, "sessions", {"limit": _SESSIONS_SHOWN}, timeout_s=2.0)
        except ControlUnreachable:
            return None
        except ControlError:
            self._lists_sessions = False
            return None
        found: list[dict[str, object]] = answer["sessions"]
        return found


def _print_one(source: _Source, controls: Controls, size: str | None) -> None:
    history = History()
    wants_sessions = controls.screen is Screen.SESSIONS
    history.add(source.look(sessions=wants_sessions))
    if history.last.status is not None:
        # rates need two looks
        time.sleep(controls.interval_s)
        history.add(source.look(sessions=wants_sessions))
    width, height = _size(size)
    controls.clock = time.strftime("%H:%M:%S")
    for line in frame(history, controls, width, height)[:-1]:
        click.echo(line.text)


def _size(text: str | None) -> tuple[int, int]:
    if text is None:
        found = shutil.get_terminal_size((79, 1000))
        return found.columns, 1000 if not sys.stdout.isatty() else found.lines
    width, x, height = text.partition("x")
    if not (x and width.isdecimal() and height.isdecimal() and int(width) >= 40 and int(height) >= 10):
        raise click.BadParameter("write it like 80x24, at least 40x10", param_hint="--size")
    return int(width), int(height)


def _live(source: _Source, controls: Controls) -> None:
    os.environ.setdefault("ESCDELAY", "25")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        curses.wrapper(_loop, source, controls)
    except KeyboardInterrupt:
        pass


def _loop(window: curses.window, source: _Source, controls: Controls) -> None:
    styles = _styles()
    history = History()
    due = 0.0
    while True:
        now = time.monotonic()
        if now >= due and (not controls.paused or not history.looks):
            history.add(source.look(sessions=controls.screen is Screen.SESSIONS))
            controls.clock = time.strftime("%H:%M:%S")
            due = now + controls.interval_s if due < now - controls.interval_s else due + controls.interval_s
        height, width = window.getmaxyx()
        _draw(window, frame(history, controls, max(40, width - 1), max(10, height)), styles)
        window.timeout(int(max(10, min(500, (due - time.monotonic()) * 1000))))
        key = window.getch()
        if key == ord("q"):
            return
        if press(key, controls, history):
            due = 0.0


def _styles() -> dict[Style, int]:
    plain = {Style.PLAIN: curses.A_NORMAL, Style.HEAD: curses.A_BOLD, Style.SELECTED: curses.A_REVERSE}
    plain |= {Style.BAD: curses.A_BOLD, Style.DIM: curses.A_DIM}
    curses.curs_set(0)
    if curses.has_colors():
        curses.use_default_colors()
        curses.init_pair(1, curses.COLOR_RED, -1)
        plain[Style.BAD] = curses.color_pair(1) | curses.A_BOLD
    return plain


def _draw(window: curses.window, lines: list[Line], styles: dict[Style, int]) -> None:
    height, width = window.getmaxyx()
    window.erase()
    *body, keys = lines
    for row, line in [*enumerate(body[: height - 1]), (height - 1, keys)]:
        # the last cell of the last line cannot be written without scrolling
        window.addnstr(row, 0, line.text, width - 1, styles[line.style])
    window.refresh()


def press(key: int, controls: Controls, history: History) -> bool:
    """Acts on a key; whether a new look is needed at once."""
    match key:
        case curses.KEY_UP | curses.KEY_DOWN:
            _move(-1 if key == curses.KEY_UP else 1, controls, history)
        case _ if key in _ENTER:
            controls.screen = Screen.LISTENER
        case _ if key in (_ESCAPE, curses.KEY_BACKSPACE, 127):
            controls.screen = Screen.OVERVIEW
        case _ if key == ord("s"):
            controls.sort = SORTS[(SORTS.index(controls.sort) + 1) % len(SORTS)]
        case _ if key in (ord("p"), ord(" ")):
            controls.paused = not controls.paused
        case _ if key in (ord("+"), ord("-")):
            controls.interval_s = _other_interval(controls.interval_s, faster=key == ord("+"))
        case _ if key == ord("e"):
            controls.screen = Screen.OVERVIEW if controls.screen is Screen.SESSIONS else Screen.SESSIONS
            return True
        case _ if key == ord("?"):
            controls.screen = Screen.OVERVIEW if controls.screen is Screen.HELP else Screen.HELP
        case _:
            return False
    return False


def _move(by: int, controls: Controls, history: History) -> None:
    rows = ordered(history.listeners(), controls.sort)
    if rows:
        place = rows.index(selected(rows, controls)) + by
        controls.selected = rows[max(0, min(place, len(rows) - 1))].key


def _other_interval(interval_s: float, *, faster: bool) -> float:
    if faster:
        return max((one for one in _INTERVALS if one < interval_s), default=_INTERVALS[0])
    return min((one for one in _INTERVALS if one > interval_s), default=_INTERVALS[-1])
