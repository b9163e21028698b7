"""`tidegate record`: queue ages over time, to a file for `tidegate plot`."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from pathlib import Path

import click

from tidegate.config.errors import BadValueError
from tidegate.config.units import parse_size
from tidegate_tools import ages_view, client, namespaces, owners, table
from tidegate_tools.ages_view import Row, Selection
from tidegate_tools.recording import Entry, Frame, Writer
from tidegate_tools.snapshot import Reader

_SMALLEST = 4096


@click.command(
    epilog="""\b
Examples:
  tidegate record --out ages.rec 8080
  tidegate record --out ages.rec --interval 0.1 --duration 600
  tidegate plot ages.rec --out ages.html
"""
)
@click.argument("listener", nargs=-1)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="File to write.")
@click.option("--interval", type=click.FloatRange(0.05, 3600), default=1.0, show_default=True,
              metavar="SECONDS", help="Time between looks.")  # fmt: skip
@click.option("--duration", type=click.FloatRange(0.05), metavar="SECONDS",
              help="Stop after this time (default: until interrupted).")  # fmt: skip
@click.option("--max-size", default="16MiB", show_default=True, metavar="SIZE",
              help="The file's bound: past it, it gets coarser, not longer.")  # fmt: skip
@client.control_option
def command(
    listener: tuple[str, ...],
    out: Path,
    interval: float,
    duration: float | None,
    max_size: str,
    control: str | None,
) -> None:
    """Record queue ages to a file of bounded size, until interrupted.

    Takes, once per interval, the ages of what waits at each TCP listener, and of tidegate's own also the ages
    at accept and what was dropped. LISTENER selects as in `tidegate ages`. A file that exists is replaced.
    """
    try:
        limit = parse_size(max_size)
    except BadValueError as error:
        raise click.BadParameter(f"{max_size!r} {error}", param_hint="--max-size") from None
    if limit < _SMALLEST:
        raise click.BadParameter(f"less than {_SMALLEST} bytes hold nothing", param_hint="--max-size")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ExitStack() as stack:
        reader = Reader(namespaces.every())
        stack.callback(reader.close)
        recorder = Recorder(reader, control, Selection(listener))
        writer = stack.enter_context(Writer(out, limit))
        frames = 0
        try:
            start = time.monotonic()
            while duration is None or time.monotonic() - start < duration:
                time.sleep(max(0.0, start + (frames + 1) * interval - time.monotonic()))
                writer.add(recorder.frame())
                frames += 1
        except KeyboardInterrupt:
            pass
    written = table.several(frames, "interval")
    click.echo(f"{written} in {out}; draw it with: tidegate plot {out} --out {out.stem}.html")


class Recorder:
    """Turns looks into frames: what tidegate counts since it started becomes what happened in between."""

    def __init__(self, reader: Reader, control: str | None, selection: Selection) -> None:
        self._reader = reader
        self._control = control
        self._selection = selection
        self._said = client.Said()
        self._before: dict[str, Row] = {}
        self._at = time.monotonic()
        self.frame()  # what was counted before is not of the recording

    def frame(self) -> Frame:
        """The interval since the last call."""
        snapshot = self._reader.read()
        status, unasked = client.known(self._control)
        self._said.note(unasked)
        held = owners.Owners()
        if self._selection.patterns:  # only to select by
            held = owners.find({one.inode for queue in snapshot.queues for one in queue.sockets})
        view = ages_view.build(snapshot, held, status, self._selection)
        now = time.monotonic()
        rows = {_name(row): row for row in view.rows}
        listeners = {name: entry(row, self._before.get(name)) for name, row in rows.items()}
        frame = Frame(time.time(), now - self._at, listeners)
        self._before, self._at = rows, now
        return frame


def _name(row: Row) -> str:
    place = f"{row.queue.netns}/" if row.queue.netns else ""
    return f"{place}{row.queue.address}" + (
        f" {row.name}" if row.name and row.name != row.queue.address else ""
    )


def entry(row: Row, before: Row | None) -> Entry:
    """A listener's part of a frame."""
    queued: dict[int, int] = {}
    for waiter in row.queue.waiters:
        bucket = max(0, waiter.age_ns.bit_length() - 1)
        queued[bucket] = queued.get(bucket, 0) + 1
    out = Entry(row.queue.waiting, row.queue.gone, row.queue.oldest_ns or 0, queued)
    drops = row.queue.drops - (before.queue.drops if before else row.queue.drops)
    if drops > 0:
        out.dropped["kernel"] = drops
    if row.served is None:
        return out
    out.stale_after_ns = int(row.served["stale_after_ms"] * 1_000_000)
    if before is None or before.served is None:
        return out
    # smaller than before: tidegate started anew
    earlier = before.served if row.served["accepted"] >= before.served["accepted"] else None
    out.accepted = row.served["accepted"] - (earlier["accepted"] if earlier else 0)
    for reason, number in row.served["dropped"].items():
        fresh = number - (earlier["dropped"].get(reason, 0) if earlier else 0)
        if fresh > 0:
            out.dropped[reason] = fresh
    old = (
        earlier["age_histogram"]["buckets"] if earlier else [0] * len(row.served["age_histogram"]["buckets"])
    )
    for bucket, number in enumerate(row.served["age_histogram"]["buckets"]):
        if number > old[bucket]:
            out.taken[bucket] = number - old[bucket]
    return out
