"""The screens of `tidegate top`, as lines of text for a given size. No I/O."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from tidegate_tools import table
from tidegate_tools.histogram import bars
from tidegate_tools.status import worker_rows
from tidegate_tools.table import Column
from tidegate_tools.top_model import SORTS, History, ListenerRow, ordered


class Style(StrEnum):
    PLAIN = "plain"
    HEAD = "head"
    SELECTED = "selected"
    BAD = "bad"
    DIM = "dim"


class Line(NamedTuple):
    text: str
    style: Style = Style.PLAIN


class Screen(StrEnum):
    OVERVIEW = "overview"
    LISTENER = "listener"
    SESSIONS = "sessions"
    HELP = "help"


@dataclass(slots=True)
class Controls:
    """What the keys set."""

    screen: Screen = Screen.OVERVIEW
    sort: str = SORTS[0]
    selected: str = ""  # key of a listener; "" is the first
    paused: bool = False
    interval_s: float = 1.0
    ascii_only: bool = False
    clock: str = ""


_NOTE_LINES = 3  # of why there is no status, at most

HELP = """\
up, down     choose a listener        enter  look into it      esc  back
s            next order               p      pause, and go on
+ -          look more, less often    e      sessions by age (tidegate)
?            this page                q      quit

WAITING is what accept() has not taken yet, OLDEST the age of its oldest.
P99 is of the ages at accept since the look before. AGE draws the greater
of the two for each look, on a log scale from 0.1 ms (flat) to 10 s (full).
"""


def frame(history: History, controls: Controls, width: int, height: int) -> list[Line]:
    """The screen: at most `height` lines of at most `width` columns."""
    lines = _head(history, controls, width)
    room = height - len(lines) - 1
    match controls.screen:
        case Screen.HELP:
            lines += [Line(text) for text in HELP.splitlines()]
        case Screen.SESSIONS:
            lines += _sessions(history, width, room)
        case Screen.LISTENER:
            lines += _listener(history, controls, width, room)
        case _:
            lines += _overview(history, controls, width, room)
    lines = lines[: height - 1]
    lines.append(Line("q quit  s sort  p pause  enter look into  e sessions  ? help", Style.DIM))
    return [Line(table.clean(line.text)[:width].rstrip(), line.style) for line in lines]


def _head(history: History, controls: Controls, width: int) -> list[Line]:
    status = history.last.status
    rows = history.listeners()
    right = "PAUSED  " if controls.paused else ""
    right += f"by {controls.sort}  every {controls.interval_s:g}s  {controls.clock}"
    waiting = sum(row.waiting for row in rows)
    gone = sum(row.gone for row in rows)
    notes: list[str] = []
    if status is None:
        left = "the TCP listeners of this host"
        notes = textwrap.wrap(table.clean(history.last.note), width, break_on_hyphens=False)[:_NOTE_LINES]
        second = f"waiting {table.count(waiting)}, of them gone {table.count(gone)}"
    else:
        left = f"tidegate {status['version']}  up {table.duration(status['uptime_s'] * 1e9)}"
        left += f"  ages by {status['queue_age']['source']}"
        accepted = sum(row.accepted_rate or 0 for row in rows)
        dropped = sum(row.dropped_rate for row in rows)
        sessions = sum(one["sessions"] for one in status["listeners"])
        second = (
            f"accepted {rate(accepted)}/s  dropped {rate(dropped)}/s  sessions {table.count(sessions)}  "
            f"waiting {table.count(waiting)}, of them gone {table.count(gone)}"
        )
    room = width - len(right) - 2
    first = Line(f"{left[:room]:<{room}}  {right}", Style.HEAD)
    return [first, *(Line(one, Style.HEAD) for one in notes), Line(second), Line("")]


def rate(per_second: float | None) -> str:
    """At most five characters; "-" for None."""
    if per_second is None:
        return "-"
    return f"{per_second:.1f}" if 0 < per_second < 10 else table.count(round(per_second))


def _overview(history: History, controls: Controls, width: int, room: int) -> list[Line]:
    status = history.last.status
    workers: list[Line] = []
    clusters: list[Line] = []
    drops: list[Line] = []
    if status is not None:
        drops = [Line(""), *_drops(history)]
        free = room - len(drops) - 2  # empty lines, one below the workers and one above the backends
        listeners = len(history.listeners()) + 1
        backends = 1 + sum(len(cluster["backends"]) for cluster in status["clusters"])
        # each may take what the others leave, and a quarter in any case
        share = max(3, room // 4)
        workers = [*_workers(status, width, max(share, free - listeners - backends)), Line("")]
        below = free - listeners - (len(workers) - 1)
        clusters = [Line(""), *_clusters(status, width, max(share, below))]
    left = room - len(workers) - len(clusters) - len(drops)
    return [*workers, *_listeners(history, controls, width, max(3, left)), *drops, *clusters]


def _lines(text: str, limit: int) -> list[Line]:
    """A table's lines, the heading in its style; what does not fit is counted."""
    lines = [
        Line(one, Style.HEAD if index == 0 else Style.PLAIN) for index, one in enumerate(text.splitlines())
    ]
    if len(lines) > limit:
        hidden = len(lines) - limit + 1
        lines = [*lines[: limit - 1], Line(f"... {hidden} more", Style.DIM)]
    return lines


def _workers(status: dict[str, Any], width: int, limit: int) -> list[Line]:
    lines = _lines(table.table(*worker_rows(status), width), limit)
    for index, one in enumerate(status["workers"][: max(0, len(lines) - 1)], start=1):
        if one["state"] in ("hung", "dead") and not lines[index].text.startswith("..."):
            lines[index] = Line(lines[index].text, Style.BAD)
    return lines


def _listeners(history: History, controls: Controls, width: int, limit: int) -> list[Line]:
    rows = ordered(history.listeners(), controls.sort)
    if not rows:
        return [Line("no TCP listener")]
    chosen = selected(rows, controls)
    served = history.last.status is not None
    # a name is enough for ours: it is the address where the configuration gives none
    columns = [Column("LISTENER" if served else "ADDRESS", flex=True)]
    columns += [] if served else [Column("PROCESS", flex=True)]
    columns += [Column(title, right=True) for title in ("WAITING", "GONE", "OLDEST")]
    columns += [Column(title, right=True) for title in ("ACC/S", "DROP/S", "P99") if served]
    first = max(0, min(rows.index(chosen) - (limit - 2) // 2, len(rows) - (limit - 1)))
    shown = rows[first : first + limit - 1]
    cells = []
    for row in shown:
        cell: list[object] = [row.name] if served else [row.address, row.owner]
        cell += [table.count(row.waiting), table.count(row.gone), table.duration(row.oldest_ns)]
        if served:
            cell += [rate(row.accepted_rate), rate(row.dropped_rate), table.duration(row.p99_ns)]
        cells.append(cell)
    spark = min(30, max(10, width // 5))
    text = table.table(columns, cells, width - spark - 2).splitlines()
    across = max(len(line) for line in text)
    lines = [Line(f"{text[0]:<{across}}  AGE", Style.HEAD)]
    for row, line in zip(shown, text[1:], strict=True):
        mark = history.sparkline(row.key, spark, ascii_only=controls.ascii_only)
        lines.append(Line(f"{line:<{across}}  {mark}", Style.SELECTED if row is chosen else Style.PLAIN))
    return lines


def selected(rows: Sequence[ListenerRow], controls: Controls) -> ListenerRow:
    """The chosen listener, the first when that one is gone."""
    return next((row for row in rows if row.key == controls.selected), rows[0])


def _drops(history: History) -> list[Line]:
    totals: dict[str, float] = {}
    for row in history.listeners():
        for reason, per_second in row.drop_rates.items():
            totals[reason] = totals.get(reason, 0.0) + per_second
    text = "  ".join(
        f"{reason} {rate(number)}" for reason, number in sorted(totals.items(), key=lambda x: -x[1])
    )
    return [Line(f"DROPPED/S  {text or 'nothing'}", Style.BAD if text else Style.PLAIN)]


def _clusters(status: dict[str, Any], width: int, limit: int) -> list[Line]:
    columns = [Column("CLUSTER", flex=True), Column("BACKEND", flex=True)]
    columns += [Column("CONNECTIONS", right=True), Column("FAILURES", right=True)]
    cells = [
        [cluster["name"], backend["address"], table.count(backend["connections"]),
         table.count(backend["connect_failures"])]
        for cluster in status["clusters"]
        for backend in cluster["backends"]
    ]  # fmt: skip
    return _lines(table.table(columns, cells, width), limit)


def _listener(history: History, controls: Controls, width: int, room: int) -> list[Line]:
    rows = history.listeners()
    if not rows:
        return [Line("no TCP listener")]
    row = selected(ordered(rows, controls.sort), controls)
    lines = [
        Line(f"{row.name or row.owner}  {row.address}", Style.HEAD),
        Line(
            f"waiting {table.count(row.waiting)} of {table.count(row.backlog)}, "
            f"gone {table.count(row.gone)}, oldest {table.duration(row.oldest_ns)}"
        ),
    ]
    if row.served is not None:
        rates = "  ".join(f"{reason} {rate(number)}" for reason, number in row.drop_rates.items())
        lines.append(Line(f"dropped  {table.reasons(row.served['dropped'], width - 9)}"))
        lines.append(Line(f"dropped/s  {rates or 'nothing'}", Style.BAD if rates else Style.PLAIN))
        lines.append(Line(f"ended    {table.reasons(row.served['ended'], width - 9)}"))
    spark = history.sparkline(row.key, min(width - 5, 60), ascii_only=controls.ascii_only).strip()
    lines += [Line(f"AGE  {spark}"), Line("")]
    left = room - len(lines)
    waiting = len(row.queue.waiters) if row.queue else 0
    # what the waiting do not need is the histogram's, and half of it in any case
    histogram = _histogram(row.buckets, width, max(4, left - 3 - min(waiting + 1, left // 2)))
    if histogram:
        lines += [Line("AGES AT ACCEPT", Style.HEAD), *histogram, Line("")]
    waiters = sorted(row.queue.waiters, key=lambda one: -one.age_ns) if row.queue else []
    columns = [Column("CLIENT", flex=True), Column("AGE", right=True), Column("RECEIVED", right=True)]
    columns += [Column("STATE"), Column("SOURCE")]
    cells = [
        [one.peer, table.duration(one.age_ns), table.size(one.received), one.state, one.source]
        for one in waiters
    ]
    text = table.table(columns, cells, width)
    return lines + (_lines(text, max(2, room - len(lines))) if text else [Line("nobody waits")])


def _histogram(buckets: Sequence[int], width: int, limit: int) -> list[Line]:
    """Bars from the oldest down; what does not fit is summed in the first line."""
    used = [index for index, number in enumerate(buckets) if number]
    if not used:
        return []
    first = max(used[0], used[-1] - limit + 1)
    merged = [0] * first + [sum(buckets[: first + 1]), *buckets[first + 1 :]]
    below = "<" if used[0] < first else ""
    lines = []
    for index, (low, number, bar) in enumerate(bars(merged, max(10, width - 22))):
        if index == 0 and below:
            low *= 2  # its upper bound
        label = table.duration(low) if low >= 1000 else f"{low}ns"
        lines.append(Line(f"{below + label if index == 0 else label:>8} {number:>9} {bar}"))
    return lines


def _sessions(history: History, width: int, room: int) -> list[Line]:
    sessions = history.last.sessions
    if sessions is None:
        if history.last.left_out:
            return [Line("sessions are tidegate's, which --host leaves out: run top without it")]
        return [Line("sessions are not known: no tidegate that lists them answers")]
    columns = [Column("AGE", right=True), Column("IDLE", right=True), Column("LISTENER", flex=True)]
    columns += [Column("CLIENT", flex=True), Column("BACKEND", flex=True), Column("STATE")]
    cells = [
        [table.duration(one["age_ms"] * 1e6), table.duration(one["idle_ms"] * 1e6), one["listener"],
         one["client"], one["backend"] or "-", one["state"]]
        for one in sorted(sessions, key=lambda one: -one["age_ms"])
    ]  # fmt: skip
    text = table.table(columns, cells, width)
    return _lines(text, room) if text else [Line("no session")]
