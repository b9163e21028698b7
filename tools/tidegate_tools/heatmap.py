"""A recording as one HTML page: for each listener time against age on a log scale, drops below. No I/O.

Plain SVG within the page: nothing to install, nothing fetched, and it prints.
"""

from __future__ import annotations

import html
import math
import time
from collections.abc import Mapping, Sequence

from tidegate_tools.recording import Entry, Frame, merge
from tidegate_tools.table import duration, reasons, several

MAX_COLUMNS = 360
_WIDTH, _HEIGHT, _LEFT, _TOP, _STRIP, _GAP = 900, 360, 64, 8, 60, 10
_AXIS = 22
# viridis at nine points: even to the eye, and to those who do not see red and green
_COLOURS = (
    (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141),
    (39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37),
)  # fmt: skip
_STYLE = """
body { font: 14px system-ui, sans-serif; margin: 24px; color: #1a1a1a; background: #fff; }
h2 { font-size: 16px; margin: 28px 0 4px; } p { margin: 4px 0; color: #555; }
svg text { font-size: 11px; fill: #444; } .axis { stroke: #ccc; } .drop { fill: #d62728; }
.oldest { fill: none; stroke: #111; stroke-width: 1.2; } .stale { stroke: #d62728; stroke-dasharray: 5 4; }
"""


def page(frames: Sequence[Frame], title: str, listeners: Sequence[str] = ()) -> str:
    """The page; `listeners` limits it to names that contain one of these texts.

    Raises:
        ValueError: nothing to draw.
    """
    names = busiest(frames, listeners)
    if not names:
        raise ValueError("nothing happened at these listeners while it was recorded")
    columns = thinned(frames, MAX_COLUMNS)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{_when(frames[0].at - frames[0].seconds)} to {_when(frames[-1].at)}, "
        f"{several(len(frames), 'interval')}. Colour: connections per second of that age, on a log scale; "
        "of accepted ones where tidegate counts them, else of those that wait. Line: the oldest that waits. "
        "Dashed: stale_after. Red bars: dropped per second.</p>",
    ]
    parts += [_chart(name, columns) for name in names]
    return "\n".join(parts) + "\n</html>\n"


def busiest(frames: Sequence[Frame], wanted: Sequence[str], most: int = 12) -> list[str]:
    """Names of the listeners with the most to show."""
    weight: dict[str, int] = {}
    for frame in frames:
        for name, entry in frame.listeners.items():
            if not entry.idle and (not wanted or any(text in name for text in wanted)):
                total = entry.accepted + entry.waiting + sum(entry.dropped.values())
                weight[name] = weight.get(name, 0) + total
    return sorted(weight, key=lambda name: (-weight[name], name))[:most]


def thinned(frames: Sequence[Frame], most: int) -> list[Frame]:
    """At most so many frames, by merging neighbours."""
    step = -(-len(frames) // most)
    out = []
    for first in range(0, len(frames), step):
        merged = frames[first]
        for frame in frames[first + 1 : first + step]:
            merged = merge(merged, frame)
        out.append(merged)
    return out


def cells(entry: Entry, seconds: float) -> dict[int, float]:
    """Bucket -> per second: ages at accept, or the ages of those that wait where nobody counts accepts."""
    if entry.taken:
        return {bucket: number / seconds for bucket, number in entry.taken.items()}
    return {bucket: float(number) for bucket, number in entry.queued.items()}


def colour(share: float) -> str:
    """Of 0..1."""
    place = min(max(share, 0.0), 1.0) * (len(_COLOURS) - 1)
    index = min(int(place), len(_COLOURS) - 2)
    mixed = (
        round(a + (b - a) * (place - index))
        for a, b in zip(_COLOURS[index], _COLOURS[index + 1], strict=True)
    )
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def _chart(name: str, frames: Sequence[Frame]) -> str:
    entries = [frame.listeners.get(name, Entry()) for frame in frames]
    shades = [cells(one, max(frame.seconds, 1e-3)) for one, frame in zip(entries, frames, strict=True)]
    low, high = age_range(entries, shades)
    scale = _Scale(frames, low, high)
    top = max((number for column in shades for number in column.values()), default=1.0)
    bottom = min((number for column in shades for number in column.values()), default=1.0)
    total = _TOP + _HEIGHT + _GAP + _STRIP + _AXIS
    parts = [
        f"<h2>{html.escape(name)}</h2><p>{html.escape(totals(entries))}</p>",
        f'<svg viewBox="0 0 {_LEFT + _WIDTH + 10} {total}" width="{_LEFT + _WIDTH + 10}" role="img" '
        f'aria-label="ages at {html.escape(name, quote=True)}">',
        *_axes(scale),
    ]
    for index, column in enumerate(shades):
        x, wide = scale.x(index), scale.x(index + 1) - scale.x(index)
        for bucket, number in sorted(column.items()):
            span = math.log(top / bottom) if top > bottom else 1.0
            share = math.log(number / bottom) / span if top > bottom else 1.0
            y = scale.y(2.0 ** (bucket + 1))
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide + 0.2:.1f}" height="{scale.row:.1f}" '
                f'fill="{colour(0.08 + 0.92 * share)}"><title>{_when(frames[index].at)}  '
                f"{duration(2**bucket)} to {duration(2 ** (bucket + 1))}: {number:.3g}/s</title></rect>"
            )
    parts += _lines(entries, scale)
    parts += _drops(entries, frames, scale)
    return "\n".join([*parts, "</svg>"])


class _Scale:
    """Time and age to coordinates."""

    def __init__(self, frames: Sequence[Frame], low: int, high: int) -> None:
        self.frames = frames
        self.low, self.high = low, high
        self.row = _HEIGHT / (high - low)

    def x(self, index: int) -> float:
        return _LEFT + _WIDTH * index / len(self.frames)

    def y(self, ns: float) -> float:
        level = math.log2(max(ns, 1.0))
        return _TOP + _HEIGHT - (min(max(level, self.low), self.high) - self.low) * self.row


def age_range(entries: Sequence[Entry], shades: Sequence[Mapping[int, float]]) -> tuple[int, int]:
    """First bucket and the one after the last, at least a few apart."""
    used = [bucket for column in shades for bucket in column]
    levels = [ns.bit_length() for one in entries for ns in (one.oldest_ns, one.stale_after_ns) if ns]
    low, high = min([*used, 20]), max([*used, *levels, 24]) + 1
    return low, max(high, low + 6)


def _axes(scale: _Scale) -> list[str]:
    parts = []
    for text, ns in (("1us", 1e3), ("10us", 1e4), ("100us", 1e5), ("1ms", 1e6), ("10ms", 1e7), ("100ms", 1e8),
                     ("1s", 1e9), ("10s", 1e10), ("100s", 1e11), ("1000s", 1e12)):  # fmt: skip
        if not scale.low <= math.log2(ns) <= scale.high:
            continue
        y = scale.y(ns)
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    y = _TOP + _HEIGHT + _GAP + _STRIP + 14
    for step in range(6):
        index = min(len(scale.frames) - 1, step * len(scale.frames) // 5)
        x = scale.x(index)
        clock = time.strftime("%H:%M:%S", time.localtime(scale.frames[index].at))
        anchor = ("start", "middle", "middle", "middle", "middle", "end")[step]
        parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}">{clock}</text>')
    return parts


def _lines(entries: Sequence[Entry], scale: _Scale) -> list[str]:
    parts = []
    stale = next((one.stale_after_ns for one in reversed(entries) if one.stale_after_ns), 0)
    if stale:
        y = scale.y(stale)
        parts.append(f'<line class="stale" x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
    run: list[tuple[float, float]] = []
    for index, one in enumerate([*entries, Entry()]):
        if one.oldest_ns and index < len(entries):
            run.append((scale.x(index) + _WIDTH / len(entries) / 2, scale.y(one.oldest_ns)))
        elif run:
            run.append((run[-1][0] + 1, run[-1][1]))  # a single look has no length otherwise
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in run)
            parts.append(f'<polyline class="oldest" points="{points}"/>')
            run = []
    return parts


def _drops(entries: Sequence[Entry], frames: Sequence[Frame], scale: _Scale) -> list[str]:
    rates = [
        sum(one.dropped.values()) / max(frame.seconds, 1e-3)
        for one, frame in zip(entries, frames, strict=True)
    ]
    base = _TOP + _HEIGHT + _GAP + _STRIP
    parts = [f'<line class="axis" x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{base}" y2="{base}"/>']
    top = max(rates, default=0.0)
    label = f"{top:.3g}/s" if top else "no drops"
    parts.append(f'<text x="{_LEFT - 6}" y="{base - _STRIP + 10}" text-anchor="end">{label}</text>')
    for index, per_second in enumerate(rates):
        if per_second:
            high = max(1.0, _STRIP * per_second / top)
            x, wide = scale.x(index), max(1.0, scale.x(index + 1) - scale.x(index) - 0.3)
            why = html.escape(reasons(entries[index].dropped))
            parts.append(
                f'<rect class="drop" x="{x:.1f}" y="{base - high:.1f}" width="{wide:.1f}" '
                f'height="{high:.1f}"><title>{_when(frames[index].at)}  {why}</title></rect>'
            )
    return parts


def totals(entries: Sequence[Entry]) -> str:
    """In words."""
    dropped: dict[str, int] = {}
    for one in entries:
        for reason, number in one.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + number
    accepted = sum(one.accepted for one in entries)
    text = f"accepted {accepted}, " if accepted else ""
    text += f"most waiting {max(one.waiting for one in entries)}, "
    text += f"oldest {duration(max(one.oldest_ns for one in entries))}"
    return text + (f"; dropped: {reasons(dropped)}" if dropped else "")


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
