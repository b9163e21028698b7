"""`tidegate plot`: a recording as a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from tidegate.errors import OperatorError
from tidegate_tools import heatmap, heatmap_png, recording, table


class PlotError(OperatorError):
    """Nothing to draw, or nowhere to write it."""


def _page(frames: Sequence[recording.Frame], title: str, listeners: Sequence[str]) -> bytes:
    return heatmap.page(frames, title, listeners).encode()


_WAYS = {".html": _page, ".htm": _page, ".png": heatmap_png.image}


@click.command(
    epilog="""\b
Examples:
  tidegate plot ages.rec --out ages.html
  tidegate plot ages.rec --out web.html 127.0.0.1:8080
  tidegate plot ages.rec --out ages.png
"""
)
@click.argument("recorded", metavar="RECORDING", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("listener", nargs=-1)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True,
              help="File to write: .html, or .png.")  # fmt: skip
@click.option("--title", default="Accept queue ages", show_default=True, help="Heading of the page.")
def command(recorded: Path, listener: tuple[str, ...], out: Path, title: str) -> None:
    """Draw a recording of `tidegate record` as a heat map.

    Time goes to the right, age upwards on a log scale, and colour is how many connections per second; drops
    are bars below. LISTENER limits it to names that contain one of these texts. A page needs no network and
    no script; a PNG needs matplotlib, the extra tidegate[plot].
    """
    draw = _WAYS.get(out.suffix.lower())
    if draw is None:
        raise click.BadParameter(f"{out.name} is none of {', '.join(_WAYS)}", param_hint="--out")
    frames = list(recording.read(recorded))
    try:
        drawn = draw(frames, title, listener)
    except ValueError as error:
        raise PlotError(str(error), "tidegate record --out FILE, while there is traffic") from None
    try:
        out.write_bytes(drawn)
    except OSError as error:
        raise PlotError(f"cannot write {out}: {error.strerror}") from None
    click.echo(f"{table.several(len(frames), 'interval')} drawn in {out}")
