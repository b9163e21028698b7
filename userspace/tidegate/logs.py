"""One line per event: `2026-11-23T22:13:00.123Z level=info event=ready workers=2`, or the same as JSON.

Everything goes through stdlib logging, so a plain `log.info("ready", extra={"kv": {...}})` comes out the
same way. What a client sent can reach a log line: control bytes, quotes and line ends are escaped here, in
one place, so that no value can forge a line or a field or drive a terminal.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Final, TextIO

ROOT: Final = "tidegate"
LEVELS: Final[Mapping[str, int]] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
FORMATS: Final = ("text", "json")
MAX_VALUE: Final = 4096
"""Characters of one value that are shown; a longer one is cut and the cut is said."""

_RESERVED: Final = frozenset({"time", "level", "event", "logger", "exception"})
_BARE: Final = re.compile(r"[A-Za-z0-9_./:@+,%*~\[\]-]+")
_NOT_A_KEY: Final = re.compile(r"[^A-Za-z0-9_.-]")
_SHORT_ESCAPES: Final = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_NS: Final = 1_000_000_000


def event(logger: logging.Logger, level: int, name: str, /, **kv: object) -> None:
    """Log one event with its fields.

    When the level is off nothing is made but the keyword dict of the call itself: no record, no text. A
    caller for whom that dict is too much asks `logger.isEnabledFor(level)` first.
    """
    if logger.isEnabledFor(level):
        # makeRecord, not log(): looking up the caller's file and line costs more than the whole rest
        logger.handle(logger.makeRecord(logger.name, level, "", 0, name, (), None, extra={"kv": kv}))


def setup(level: str = "info", format: str = "text", stream: TextIO | None = None) -> None:  # noqa: A002
    """Send all logging to `stream` (stderr by default), ours from `level` up, other libraries' warnings.

    Calling it again replaces what it set up before. Raises ValueError for an unknown level or format.
    """
    if level not in LEVELS:
        raise ValueError(f"unknown log level {level!r}: one of {', '.join(LEVELS)}")
    if format not in FORMATS:
        raise ValueError(f"unknown log format {format!r}: one of {', '.join(FORMATS)}")
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, LineHandler):
            root.removeHandler(handler)
    handler = LineHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    root.addHandler(handler)
    logging.getLogger(ROOT).setLevel(LEVELS[level])


class LineHandler(logging.Handler):
    """Writes one line at a time and never raises.

    A log that cannot be written (full disk, closed pipe, a non-blocking terminal) must not end a session:
    the lines are counted, and the first one that gets through again is preceded by `event=log_lost`.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.stream = stream
        self.lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            if self.lost:
                note = logging.LogRecord(ROOT, logging.WARNING, "", 0, "log_lost", (), None)
                note.kv = {"lines": self.lost}
                line = f"{self.format(note)}\n{line}"
            self.stream.write(line + "\n")
            self.stream.flush()
        except RecursionError:
            raise
        except Exception:  # whatever it is, the log is not worth a worker
            self.lost += 1
        else:
            self.lost = 0


class TextFormatter(logging.Formatter):
    """key=value, one line."""

    def format(self, record: logging.LogRecord) -> str:
        parts = [
            _timestamp(record.created),
            f"level={_level(record)}",
            f"event={text_value(_message(record))}",
        ]
        parts += [f"{key}={text_value(value)}" for key, value in _fields(record)]
        if record.exc_info:
            parts.append(f"exception={text_value(self.formatException(record.exc_info))}")
        return " ".join(parts)


class JsonFormatter(logging.Formatter):
    """One JSON object per line, ASCII only."""

    def format(self, record: logging.LogRecord) -> str:
        out: dict[str, object] = {
            "time": _timestamp(record.created),
            "level": _level(record),
            "logger": record.name,
            "event": _cut(_message(record)),
        }
        for key, value in _fields(record):
            out[key] = _json_value(value)
        if record.exc_info:
            out["exception"] = self.formatException(record.exc_info)
        return json.dumps(out)


class RateLimited:
    """At most `per_second` lines a second for each event name; what it held back is counted and said.

    The first line after a suppression carries `suppressed=N`. `flush()` reports what is still untold, for
    a timer and for the end of the process. Event names are literals of the program: the table of them is
    as small as the program's vocabulary.
    """

    __slots__ = ("_buckets", "_clock_ns", "_logger", "_per_second")

    def __init__(
        self,
        logger: logging.Logger,
        per_second: float = 1,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        if per_second <= 0:
            raise ValueError("per_second must be positive")
        self._logger = logger
        self._per_second = per_second
        self._clock_ns = clock_ns
        self._buckets: dict[str, _Bucket] = {}

    def event(self, level: int, name: str, /, **kv: object) -> bool:
        """Log it or count it; True when it was logged. A level that is off is neither."""
        if not self._logger.isEnabledFor(level):
            return False
        now = self._clock_ns()
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = self._buckets[name] = _Bucket(max(1.0, self._per_second), now)
        if not bucket.take(now, self._per_second):
            bucket.suppressed += 1
            bucket.level = max(bucket.level, level)
            return False
        if bucket.suppressed:
            kv["suppressed"] = bucket.suppressed
            bucket.suppressed = 0
            bucket.level = 0
        event(self._logger, level, name, **kv)
        return True

    def flush(self) -> int:
        """Say what was held back since the last line of each event; the number of them."""
        told = 0
        for name, bucket in self._buckets.items():
            if bucket.suppressed:
                event(self._logger, bucket.level, "suppressed", of=name, count=bucket.suppressed)
                told += bucket.suppressed
                bucket.suppressed = 0
                bucket.level = 0
        return told


class _Bucket:
    """A token bucket: `level` is the highest one among what was suppressed."""

    __slots__ = ("at_ns", "capacity", "level", "suppressed", "tokens")

    def __init__(self, capacity: float, now_ns: int) -> None:
        self.capacity = capacity
        self.tokens = capacity
        self.at_ns = now_ns
        self.suppressed = 0
        self.level = 0

    def take(self, now_ns: int, per_second: float) -> bool:
        self.tokens = min(self.capacity, self.tokens + (now_ns - self.at_ns) * per_second / _NS)
        self.at_ns = now_ns
        if self.tokens < 1.0:
            return False
        self.tokens -= 1.0
        return True


def text_value(value: object) -> str:
    """A value as it stands after `key=`: bare when it is plain, else quoted and escaped."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(map(_text, value)) if isinstance(value, (set, frozenset)) else map(_text, value)
        text = ",".join(items)
    else:
        text = _text(value)
    text = _cut(text)
    if _BARE.fullmatch(text) and text != "-":
        return text
    return f'"{escape(text)}"'


def escape(text: str) -> str:
    """Backslashes, quotes and everything that does not print, as escapes; other characters as they are."""
    if text.isprintable() and '"' not in text and "\\" not in text:
        return text
    return "".join(_escape_character(character) for character in text)


def _escape_character(character: str) -> str:
    short = _SHORT_ESCAPES.get(character)
    if short is not None:
        return short
    if character.isprintable():
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that was not UTF-8 (surrogateescape)
        return f"\\x{code - 0xDC00:02x}"
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value).decode("utf-8", "surrogateescape")
    try:
        return str(value)
    except Exception:  # a broken __str__ must not lose the rest of the line
        return f"<{type(value).__name__}>"


def _json_value(value: object) -> object:
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {_text(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(_text, value))
    return _cut(_text(value))


def _cut(text: str) -> str:
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}...(+{len(text) - MAX_VALUE} characters)"


def _fields(record: logging.LogRecord) -> list[tuple[str, object]]:
    kv = getattr(record, "kv", None)
    if not isinstance(kv, Mapping):
        return []
    fields = []
    for raw, value in kv.items():
        key = _NOT_A_KEY.sub("_", str(raw)) or "_"
        fields.append((f"{key}_" if key in _RESERVED else key, value))
    return fields


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # wrong % arguments in some library
        return str(record.msg)


def _level(record: logging.LogRecord) -> str:
    return record.levelname.lower()


def _timestamp(seconds: float) -> str:
    """Wall clock, UTC, milliseconds (RFC 3339)."""
    millis = math.floor(seconds * 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(millis // 1000))}.{millis % 1000:03d}Z"
