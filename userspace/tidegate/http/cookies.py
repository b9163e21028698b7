"""The sticky cookie: read from a request, taken out of it, set on a response (RFC 6265)."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

_COOKIE: Final = re.compile(rb"(?i)\r\nCookie:[ \t]*([^\r]*)")


@lru_cache(maxsize=64)
def _pair(name: bytes) -> re.Pattern[bytes]:
    return re.compile(
        rb"(?:\A|;)[ \t]*" + re.escape(name) + rb'=[ \t]*"?([!#-+\--:<-\[\]-~]*)"?[ \t]*(?=;|\Z)'
    )


def read_cookie(lines: bytes, name: bytes) -> bytes | None:
    """The value of the first cookie of that name in a block or in b"\\r\\nName: value" lines."""
    for field in _COOKIE.finditer(lines):
        found = _pair(name).search(field[1])
        if found is not None:
            return bytes(found[1])
    return None


def strip_cookie(lines: bytes, name: bytes) -> bytes:
    """The lines without that cookie; a Cookie field that held nothing else goes as a whole."""

    def without(field: re.Match[bytes]) -> bytes:
        value = field[1]
        kept = [pair for pair in value.split(b";") if pair.partition(b"=")[0].strip(b" \t") != name]
        if len(kept) == value.count(b";") + 1:
            return bytes(field[0])
        rest = b";".join(kept).strip(b" \t")
        return b"\r\nCookie: " + rest if rest else b""

    return _COOKIE.sub(without, lines)


def set_cookie(name: bytes, value: bytes, secure: bool) -> bytes:
    """A b"\\r\\nSet-Cookie: ..." line: for the session, the whole site, out of scripts' reach."""
    return b"\r\nSet-Cookie: %b=%b; Path=/; HttpOnly; SameSite=Lax%b" % (
        name,
        value,
        b"; Secure" if secure else b"",
    )
