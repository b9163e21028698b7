"""What else a path may mean to a backend.

A proxy that routes "/public/%2e%2e/admin" as /public, for a backend that reads it as /admin, lets its rules
be walked around. Paths are forwarded exactly as they came; so where a path can be read in several ways, the
routes must not depend on which: the table is asked about each reading, and a request on whose readings it
disagrees is refused with 400. A path without dot segments, escapes, doubled slashes, backslashes and path
parameters has one reading, and costs one regex search.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote_to_bytes

AMBIGUOUS: Final = re.compile(rb"//|/\.|%|\\|;")

_SLASHES: Final = re.compile(rb"/{2,}")
_PARAMETERS: Final = re.compile(rb";[^/]*")
_ESCAPE: Final = re.compile(rb"%([0-9A-Fa-f]{2})")
_STRUCTURAL: Final = frozenset(b"/\\;%?#\0")


def readings(path: bytes) -> set[bytes]:
    """The forms a backend may see `path` in: at most 32, one where there is nothing to doubt.

    The first has the escapes decoded that stand for a byte and not for structure ("%61", "%C3%A9", "%2e"):
    that much everyone does, and a route's path is taken so too. Each further step is done by some server and
    left undone by another: decoding the rest ("%2F"), backslash as slash, path parameters dropped (Tomcat,
    Jetty), doubled slashes merged, dot segments removed (RFC 3986 5.2.4). Decoding twice is not among them:
    a backend that does so breaks any front.
    """
    forms = {decode_soft(path)}
    forms |= {unquote_to_bytes(form) for form in forms if b"%" in form}
    forms |= {form.replace(b"\\", b"/") for form in forms if b"\\" in form}
    forms |= {_PARAMETERS.sub(b"", form) for form in forms if b";" in form}
    forms |= {_SLASHES.sub(b"/", form) for form in forms if b"//" in form}
    forms |= {remove_dot_segments(form) for form in forms if b"/." in form}
    return forms


def decode_soft(path: bytes) -> bytes:
    """The first reading: escapes decoded except those of "/", "\\", ";", "%", "?", "#" and NUL."""
    return _ESCAPE.sub(_soft, path)


def _soft(escape: re.Match[bytes]) -> bytes:
    byte = int(escape[1], 16)
    return bytes(escape[0]) if byte in _STRUCTURAL else bytes((byte,))


def behind_prefix(path: bytes, prefix: bytes) -> bytes:
    """What follows `prefix` in a path whose first reading has it as a path prefix."""
    if path.startswith(prefix):
        return path[len(prefix) :]
    # Spelled with escapes: as many segments are it, however long.
    parts = path.split(b"/", prefix.count(b"/") + 1)
    return b"/" + parts[-1] if len(parts) > prefix.count(b"/") + 1 else b""


def remove_dot_segments(path: bytes) -> bytes:
    """RFC 3986 5.2.4 on an absolute path."""
    kept: list[bytes] = []
    segments = path.split(b"/")[1:]
    for segment in segments:
        if segment == b"..":
            if kept:
                kept.pop()
        elif segment != b".":
            kept.append(segment)
    if segments and segments[-1] in (b".", b".."):
        kept.append(b"")
    return b"/" + b"/".join(kept)
