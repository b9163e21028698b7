"""Access log lines: one record in, one line out, as text or JSON. Writing them is somebody else's."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Final

_SECOND_NS: Final = 1_000_000_000

# Text fields are separated by spaces, quoted ones by quotes; a log reader's terminal is not ours to write to.
_UNSAFE: Final = re.compile(r'[^\x20-\x7e]|["\\]')
_UNSAFE_BARE: Final = re.compile(r'[^\x21-\x7e]|["\\]')

_ENCODER: Final = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"))


class Record:
    """One request, or one connection that never became one. Filled by the session, formatted at once.

    Bytes fields are as they came from the peer; durations are nanoseconds, -1 when the event did not happen.
    """

    __slots__ = (
        "backend",
        "bytes_in",
        "bytes_out",
        "client",
        "connect_ns",
        "end_reason",
        "first_byte_ns",
        "host",
        "listener",
        "method",
        "path",
        "queue_age_ns",
        "request_id",
        "retries",
        "reused",
        "status",
        "time_ns",
        "total_ns",
    )

    def __init__(self) -> None:
        self.time_ns = 0  # end of the request, since the epoch
        self.client = ""
        self.listener = ""
        self.method = b""
        self.host = b""
        self.path = b""  # the target as received
        self.status = 0  # 0: none was sent
        self.bytes_in = 0
        self.bytes_out = 0
        self.queue_age_ns = -1
        self.total_ns = -1
        self.connect_ns = -1
        self.first_byte_ns = -1
        self.backend = ""
        self.retries = 0
        self.reused = False  # the backend connection was
        self.end_reason = ""
        self.request_id = b""


def formatter(form: str) -> Callable[[Record], str]:
    """The function for `access_log.format`: "text" or "json"; the lines it makes end in a newline."""
    return {"text": text_line, "json": json_line}[form]


def json_line(record: Record) -> str:
    """One JSON object; bytes that are not ASCII appear as the code points of Latin-1, as one byte each."""
    return (
        _ENCODER.encode(
            {
                "time": timestamp(record.time_ns),
                "client": record.client,
                "listener": record.listener,
                "method": record.method.decode("latin-1"),
                "host": record.host.decode("latin-1"),
                "path": record.path.decode("latin-1"),
                "status": record.status,
                "bytes_in": record.bytes_in,
                "bytes_out": record.bytes_out,
                "queue_age_us": _us(record.queue_age_ns),
                "total_us": _us(record.total_ns),
                "connect_us": _us(record.connect_ns),
                "first_byte_us": _us(record.first_byte_ns),
                "backend": record.backend,
                "retries": record.retries,
                "reused": record.reused,
                "end": record.end_reason,
                "request_id": record.request_id.decode("latin-1"),
            }
        )
        + "\n"
    )


def text_line(record: Record) -> str:
    """Time client listener "METHOD path" host status in/out key=value...; absent values are "-"."""
    return (
        f"{timestamp(record.time_ns)} {_bare(record.client)} {_bare(record.listener)} "
        f'"{_quoted(record.method)} {_quoted(record.path)}" {_bare(record.host.decode("latin-1"))} '
        f"{record.status or '-'} {record.bytes_in}/{record.bytes_out} "
        f"queue_age_us={_number(record.queue_age_ns)} total_us={_number(record.total_ns)} "
        f"connect_us={_number(record.connect_ns)} first_byte_us={_number(record.first_byte_ns)} "
        f"backend={_bare(record.backend)} retries={record.retries} reused={record.reused:d} "
        f"end={_bare(record.end_reason)} id={_bare(record.request_id.decode('latin-1'))}\n"
    )


def timestamp(time_ns: int) -> str:
    """RFC 3339 in UTC with milliseconds."""
    seconds, rest = divmod(time_ns, _SECOND_NS)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest // 1_000_000:03d}Z"


def _us(duration_ns: int) -> int | None:
    return duration_ns // 1000 if duration_ns >= 0 else None


def _number(duration_ns: int) -> str:
    return str(duration_ns // 1000) if duration_ns >= 0 else "-"


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{{{code:x}}}"


def _quoted(value: bytes) -> str:
    return _UNSAFE.sub(_escape, value.decode("latin-1")) or "-"


def _bare(value: str) -> str:
    return _UNSAFE_BARE.sub(_escape, value) or "-"
