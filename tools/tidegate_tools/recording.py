"""Recordings of queue ages: one JSON line per interval, in a file that never outgrows its bound.

The first line is a header, each other a frame. A listener is left out of a frame in which nothing happened.
When the file passes its bound, neighbouring frames are merged two by two: it covers the same time more
coarsely. Described in docs/tools/record.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from tidegate.errors import EXIT_USAGE, OperatorError

FORMAT = 1
_K = TypeVar("_K", int, str)


class RecordingError(OperatorError):
    """Not a recording, or one that cannot be written."""

    exit_code = EXIT_USAGE


@dataclass(slots=True)
class Entry:
    """One listener in one frame. Histograms: log2 bucket -> number; bucket b holds [2^b, 2^(b+1)) ns."""

    waiting: int = 0  # at the look; the most of them when merged
    gone: int = 0
    oldest_ns: int = 0
    queued: dict[int, int] = field(default_factory=dict)  # ages of those that wait
    accepted: int = 0  # in the interval
    taken: dict[int, int] = field(default_factory=dict)  # their ages
    dropped: dict[str, int] = field(default_factory=dict)
    stale_after_ns: int = 0

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.accepted or self.dropped)


@dataclass(slots=True)
class Frame:
    """`at` is Unix time, s, of the interval's end."""

    at: float
    seconds: float
    listeners: dict[str, Entry]


def encode(frame: Frame) -> str:
    """A frame as one line; zeros and empty things are left out."""
    listeners = {}
    for name, entry in frame.listeners.items():
        if entry.idle:
            continue
        full = {
            "w": entry.waiting, "g": entry.gone, "o": entry.oldest_ns, "q": entry.queued,
            "n": entry.accepted, "b": entry.taken, "x": entry.dropped, "s": entry.stale_after_ns,
        }  # fmt: skip
        listeners[name] = {key: value for key, value in full.items() if value}
    out = {"t": round(frame.at, 3), "d": round(frame.seconds, 3), "l": listeners}
    return json.dumps(out, separators=(",", ":"))


def decode(line: str) -> Frame:
    """ValueError, KeyError or TypeError for anything else than a frame."""
    raw = json.loads(line)
    listeners = {
        str(name): Entry(
            waiting=int(one.get("w", 0)),
            gone=int(one.get("g", 0)),
            oldest_ns=int(one.get("o", 0)),
            queued=_histogram(one.get("q", {})),
            accepted=int(one.get("n", 0)),
            taken=_histogram(one.get("b", {})),
            dropped={str(reason): int(number) for reason, number in one.get("x", {}).items()},
            stale_after_ns=int(one.get("s", 0)),
        )
        for name, one in raw["l"].items()
    }
    return Frame(float(raw["t"]), float(raw["d"]), listeners)


def _histogram(raw: Mapping[str, Any]) -> dict[int, int]:
    return {int(bucket): int(number) for bucket, number in raw.items()}


def merge(first: Frame, second: Frame) -> Frame:
    """One frame for both: what happened is added, of who waited the worse look is kept."""
    listeners: dict[str, Entry] = {}
    for name in [*first.listeners, *(name for name in second.listeners if name not in first.listeners)]:
        a, b = first.listeners.get(name, Entry()), second.listeners.get(name, Entry())
        worse = a if (a.oldest_ns, a.waiting) >= (b.oldest_ns, b.waiting) else b
        listeners[name] = Entry(
            waiting=max(a.waiting, b.waiting),
            gone=max(a.gone, b.gone),
            oldest_ns=worse.oldest_ns,
            queued=dict(worse.queued),
            accepted=a.accepted + b.accepted,
            taken=_added(a.taken, b.taken),
            dropped=_added(a.dropped, b.dropped),
            stale_after_ns=b.stale_after_ns or a.stale_after_ns,
        )
    return Frame(second.at, first.seconds + second.seconds, listeners)


def _added(a: Mapping[_K, int], b: Mapping[_K, int]) -> dict[_K, int]:
    return {key: a.get(key, 0) + b.get(key, 0) for key in {**a, **b}}


def halve(frames: list[Frame]) -> list[Frame]:
    """Neighbours merged two by two; an odd last one stays."""
    pairs = [merge(a, b) for a, b in zip(frames[::2], frames[1::2], strict=False)]
    return pairs + frames[len(pairs) * 2 :]


class Writer:
    """Writes a recording of at most `max_bytes`. A file that exists is replaced when it is opened."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max = max_bytes
        try:
            self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise RecordingError(f"cannot write {path}: {error.strerror}") from None
        self._size = 0
        self._put(_header())

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, frame: Frame) -> None:
        """Appends a frame, and makes the file coarser when it passes its bound."""
        line = encode(frame)
        if self._size + len(line) + 1 > self._max:
            self._coarsen(len(line) + 1)
        self._put(line)

    def _put(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()
        self._size += len(line) + 1

    def _coarsen(self, needed: int) -> None:
        self._file.close()
        frames = list(read(self._path))
        while True:
            count = len(frames)
            frames = halve(frames)
            lines = [_header(), *map(encode, frames)]
            size = sum(len(line) + 1 for line in lines)
            if size + needed <= self._max // 2 or len(frames) == count:
                break
        # whoever reads meanwhile sees the old file or the new one
        fresh = self._path.with_name(self._path.name + ".new")
        fresh.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        os.replace(fresh, self._path)
        self._file = self._path.open("a", encoding="utf-8")
        self._size = size


def _header() -> str:
    return json.dumps({"tidegate_recording": FORMAT})


def read(path: Path) -> Iterator[Frame]:
    """The frames; a last line that was cut off is left out.

    Raises:
        RecordingError: the file cannot be read, or is something else.
    """
    try:
        with path.open(encoding="utf-8") as file:
            yield from _frames(file, path)
    except (OSError, UnicodeDecodeError) as error:
        raise RecordingError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _frames(lines: Iterable[str], path: Path) -> Iterator[Frame]:
    what = f"{path} is not a recording of `tidegate record`"
    number = 0
    for number, line in enumerate(lines, start=1):
        try:
            if number == 1:
                version = json.loads(line)["tidegate_recording"]
                if version != FORMAT:
                    raise RecordingError(f"{path} has format {version}; this tidegate reads {FORMAT}")
                continue
            yield decode(line)
        except (ValueError, KeyError, TypeError, AttributeError):
            if number > 1 and not line.endswith("\n"):
                return
            raise RecordingError(f"{what} (line {number})") from None
    if number == 0:
        raise RecordingError(f"{what}: it is empty")
