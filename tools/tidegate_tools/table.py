"""Text for people: tables that fit the terminal, durations and sizes in five characters."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_WIDTH = 79  # of a table when the output is no terminal, or a wider one
_MIN_FLEX = 6


@dataclass(frozen=True, slots=True)
class Column:
    """A heading; `right` aligns numbers, `flex` may be cut to make the table fit."""

    title: str
    right: bool = False
    flex: bool = False


def width() -> int:
    """Columns that a table may take: the terminal's less one, 79 for a pipe or a file."""
    if not sys.stdout.isatty():
        return MAX_WIDTH
    return max(40, shutil.get_terminal_size().columns - 1)


def table(columns: Sequence[Column], rows: Iterable[Sequence[object]], limit: int | None = None) -> str:
    """The rows under their headings, two spaces apart where they fit, one where not; "" without rows."""
    cells = [[clean(str(cell)) for cell in row] for row in rows]
    if not cells:
        return ""
    limit = limit or width()
    sizes = [max(len(column.title), *(len(row[i]) for row in cells)) for i, column in enumerate(columns)]
    gap = 2 if sum(sizes) + 2 * (len(columns) - 1) <= limit else 1
    _shrink(sizes, columns, limit - gap * (len(columns) - 1))
    lines = [_line([column.title for column in columns], columns, sizes, gap)]
    lines += [_line(row, columns, sizes, gap) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


def _shrink(sizes: list[int], columns: Sequence[Column], room: int) -> None:
    flexible = [i for i, column in enumerate(columns) if column.flex]
    while flexible and sum(sizes) > room:
        widest = max(flexible, key=lambda i: sizes[i])
        if sizes[widest] <= _MIN_FLEX:
            return
        sizes[widest] -= 1


def _line(cells: Sequence[str], columns: Sequence[Column], sizes: Sequence[int], gap: int) -> str:
    parts = []
    for cell, column, size in zip(cells, columns, sizes, strict=True):
        text = cut(cell, size) if column.flex else cell
        parts.append(text.rjust(size) if column.right else text.ljust(size))
    return (" " * gap).join(parts)


def cut(text: str, size: int) -> str:
    """The text in at most `size` characters; a cut is shown, and both ends kept, for a port is at the end."""
    if len(text) <= size:
        return text
    if size < 4:
        return text[:size]
    tail = (size - 1) // 2
    return f"{text[: size - 1 - tail]}~{text[len(text) - tail :]}"


def clean(text: str) -> str:
    """Control characters replaced: a process may call itself anything, escape sequences included."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else "?" for char in text)


def duration(ns: float | None) -> str:
    """At most five characters: 0, 850us, 45ms, 1.2s, 590s, 120m, 30h, 48d; "-" for None."""
    if ns is None:
        return "-"
    if ns < 1_000:
        return "0"
    for unit, size, top in (("us", 1e3, 1e6), ("ms", 1e6, 1e9)):
        if ns < top:
            value = int(ns / size)  # cut, not rounded: 999.7us is not 1000us
            return f"{value}{unit}"
    seconds = ns / 1e9
    if seconds < 10:
        return f"{int(seconds * 10) / 10:.1f}s"
    for unit, per, top in (("s", 1, 1000), ("m", 60, 60_000), ("h", 3600, 3_600_000)):
        if seconds < top:
            return f"{int(seconds / per)}{unit}"
    return f"{int(seconds / 86400)}d"


def count(number: int | None) -> str:
    """At most five characters: 0, 99999, 123k, 45M; "-" for None."""
    if number is None:
        return "-"
    if abs(number) < 100_000:
        return str(number)
    for unit, size in (("k", 10**3), ("M", 10**6), ("G", 10**9)):
        if abs(number) < 1000 * size:
            return f"{number // size}{unit}"
    return f"{number / 1e12:.0f}T"


def several(number: int, what: str) -> str:
    """1 interval, 2 intervals."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def size(number: int) -> str:
    """Bytes, in binary units: 0B, 999B, 1.5K, 20K, 3.0M."""
    if number < 1024:
        return f"{number}B"
    value = float(number)
    for unit in "KMGT":
        value /= 1024
        if value < 1024 or unit == "T":
            break
    return f"{value:.1f}{unit}" if value < 10 else f"{value:.0f}{unit}"


def reasons(counts: dict[str, int], limit: int = 0) -> str:
    """`stale 12, queue_full 3`, the greatest first, zeros left out; "none" when nothing is left."""
    present = sorted(((number, name) for name, number in counts.items() if number), reverse=True)
    text = ", ".join(f"{name} {number}" for number, name in present)
    return (cut(text, limit) if limit else text) or "none"
