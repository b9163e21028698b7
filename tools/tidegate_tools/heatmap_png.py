"""The heat map of heatmap.py as a PNG, by matplotlib, which is an extra of this package."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from itertools import accumulate, pairwise
from typing import Any

from tidegate.errors import OperatorError
from tidegate_tools import heatmap_ticks
from tidegate_tools.heatmap import MAX_COLUMNS, age_range, busiest, cells, thinned, totals
from tidegate_tools.recording import Entry, Frame

# Inches of one chart; below it its drops have a quarter of that.
_WIDTH, _HEIGHT = 10.0, 4.0
_DPI = 120


class MissingExtra(OperatorError):
    """Matplotlib is not installed."""


def image(frames: Sequence[Frame], title: str, listeners: Sequence[str] = ()) -> bytes:
    """As heatmap.page. Raises ValueError when there is nothing to draw, MissingExtra."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra(
            "a PNG needs matplotlib", "pip install 'tidegate[plot]', or write --out FILE.html"
        ) from None
    names = busiest(frames, listeners)
    if not names:
        raise ValueError("nothing happened at these listeners while it was recorded")
    columns = thinned(frames, MAX_COLUMNS)
    figure = Figure(figsize=(_WIDTH, 0.6 + _HEIGHT * len(names)), layout="constrained")
    FigureCanvasAgg(figure)  # no display, no state of a process
    figure.suptitle(title, parse_math=False)
    grid = figure.add_gridspec(2 * len(names), 1, height_ratios=[4, 1] * len(names))
    for row, name in enumerate(names):
        above = figure.add_subplot(grid[2 * row])
        below = figure.add_subplot(grid[2 * row + 1], sharex=above)
        _chart(name, columns, above, below)
    out = BytesIO()
    figure.savefig(out, format="png", dpi=_DPI)
    return out.getvalue()


def _chart(name: str, frames: Sequence[Frame], above: Any, below: Any) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    entries = [frame.listeners.get(name, Entry()) for frame in frames]
    seconds = [max(frame.seconds, 1e-3) for frame in frames]
    shades = [cells(one, length) for one, length in zip(entries, seconds, strict=True)]
    low, high = age_range(entries, shades)
    start = frames[0].at - frames[0].seconds
    edges = list(accumulate(seconds, initial=0.0))
    ages = [2.0**bucket / 1e9 for bucket in range(low, high + 1)]
    nothing = math.nan
    mesh = [[column.get(bucket, nothing) for column in shades] for bucket in range(low, high)]
    numbers = [number for column in shades for number in column.values()]
    if numbers:
        least, most = min(numbers), max(max(numbers), min(numbers) * 1.01)
        norm = LogNorm(least, most)
        drawn = above.pcolormesh(edges, ages, mesh, norm=norm, cmap="viridis")
        bar = above.figure.colorbar(drawn, ax=[above, below], label="connections/s", pad=0.01)
        places, texts = heatmap_ticks.rates(least, most)
        bar.set_ticks(places, labels=texts)
        bar.minorticks_off()
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    oldest = [one.oldest_ns / 1e9 if one.oldest_ns else nothing for one in entries]
    above.plot(middles, oldest, color="black", linewidth=1, marker=".", markersize=2)
    stale = next((one.stale_after_ns for one in reversed(entries) if one.stale_after_ns), 0)
    if stale:
        above.axhline(stale / 1e9, color="tab:red", linestyle="--", linewidth=1)
    above.set_yscale("log")
    above.set_ylim(ages[0], ages[-1])
    above.yaxis.set_major_locator(FixedLocator([10.0**power for power in range(-6, 4)]))
    above.yaxis.set_minor_locator(NullLocator())
    above.yaxis.set_major_formatter(FuncFormatter(lambda s, _: _age(s)))
    above.set_title(f"{name}: {totals(entries)}", fontsize=9, loc="left", parse_math=False)
    above.tick_params(labelbottom=False)
    rates = [sum(one.dropped.values()) / length for one, length in zip(entries, seconds, strict=True)]
    widths = [b - a for a, b in pairwise(edges)]
    below.bar(edges[:-1], rates, width=widths, align="edge", color="tab:red")
    below.set_ylabel("dropped/s", fontsize=8)
    below.set_ylim(0, max(rates) * 1.1 or 1)
    below.set_xlim(edges[0], edges[-1])
    below.set_xticks(*heatmap_ticks.times(start, edges[-1]))


def _age(seconds: float) -> str:
    for size, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= size * 0.999:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds * 1e9:.0f}ns"
