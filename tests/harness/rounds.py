"""Contestants in turn, several rounds in one run, ratios taken within each round.

What else the machine does changes from minute to minute: figures are compared only with those of the same
round, and the spread of these ratios over the rounds says how far to trust them.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import click

Figures = dict[str, float]


@dataclass(slots=True)
class Rounds:
    """Figures by contestant, one entry a round."""

    contestants: list[str]
    figures: dict[str, list[Figures]] = field(default_factory=dict)
    started: float = field(default_factory=time.time)
    load_before: float = field(default_factory=lambda: os.getloadavg()[0])

    def values(self, who: str, what: str) -> list[float]:
        return [entry[what] for entry in self.figures.get(who, []) if what in entry]

    def median(self, who: str, what: str) -> float:
        values = self.values(who, what)
        return statistics.median(values) if values else float("nan")

    def ratios(self, who: str, reference: str, what: str) -> list[float]:
        """`who` by `reference`, round by round."""
        pairs = zip(self.values(who, what), self.values(reference, what), strict=True)
        return [mine / theirs for mine, theirs in pairs if theirs]

    def to_json(self) -> dict[str, Any]:
        return {
            "started": self.started,
            "cpus": os.cpu_count(),
            "load_before": self.load_before,
            "load_after": os.getloadavg()[0],
            "figures": self.figures,
        }


def play(contestants: Mapping[str, Callable[[], Figures]], rounds: int, *, quiet: bool = False) -> Rounds:
    """Runs each contestant once a round. Every other round goes through them backwards, so that a machine
    that grows slower or faster in the meantime favours nobody.
    """
    result = Rounds(list(contestants))
    for number in range(rounds):
        order = list(contestants.items())
        if number % 2:
            order.reverse()
        for name, measure in order:
            if not quiet and sys.stderr.isatty():
                click.echo(f"\rround {number + 1}/{rounds}  {name:<40}", nl=False, err=True)
            result.figures.setdefault(name, []).append(measure())
    if not quiet and sys.stderr.isatty():
        click.echo("\r" + " " * 60 + "\r", nl=False, err=True)
    return result


def table(
    result: Rounds,
    title: str,
    columns: Sequence[tuple[str, str, str]],
    *,
    ratio_of: str = "",
    reference: str = "",
) -> str:
    """Medians under 80 columns: columns are (figure, heading, format); then the ratio of one figure."""
    width = max(len(name) for name in result.contestants) + 1
    head = " " * width + "".join(f"{heading:>{_width(heading)}}" for _, heading, _ in columns)
    if ratio_of:
        head += f"{'ratio':>7}{'spread':>12}"
    lines = [title, head]
    for who in result.contestants:
        line = f"{who:<{width}}"
        for what, heading, form in columns:
            value = result.median(who, what)
            line += f"{'-' if value != value else format(value, form):>{_width(heading)}}"
        if ratio_of and result.values(who, ratio_of):
            ratios = result.ratios(who, reference, ratio_of)
            line += f"{statistics.median(ratios):>7.2f}{f'{min(ratios):.2f}-{max(ratios):.2f}':>12}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _width(heading: str) -> int:
    return max(len(heading) + 1, 8)


def host_line(result: Rounds) -> str:
    """What to know before believing the figures."""
    return (
        f"{os.cpu_count()} CPUs, load average {result.load_before:.1f} before and "
        f"{os.getloadavg()[0]:.1f} after; medians, ratio and spread are taken within rounds"
    )


def write_json(path: str, name: str, content: Mapping[str, Any]) -> None:
    """To a file, or to stdout for "-"."""
    text = json.dumps({"bench": name, **content}, indent=1)
    if path == "-":
        click.echo(text)
    else:
        with open(path, "w") as sink:
            sink.write(text + "\n")
