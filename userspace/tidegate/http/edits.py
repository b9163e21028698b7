"""A route's header edits, compiled: one regex substitution and one constant."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from tidegate.config.model import HeaderEdits
from tidegate.errors import EXIT_USAGE, OperatorError
from tidegate.http.head import TOKEN, VALUE_CHAR

_VALUE: Final = re.compile(VALUE_CHAR + rb"*")

# Generated from what was parsed; an edit would put framing or routing at odds with it.
_GENERATED: Final = frozenset(
    b"host content-length transfer-encoding connection keep-alive proxy-connection te trailer upgrade expect "
    b"via".split()
)


class EditError(OperatorError):
    """A header edit that cannot be carried out."""

    exit_code = EXIT_USAGE


class Edits:
    """`set` and `remove` take every field of the name away, then `set` and `add` append theirs, in order."""

    __slots__ = ("_added", "_removed", "replaced")

    def __init__(self, edits: HeaderEdits) -> None:
        """Raises EditError."""
        replaced = [_name(name) for name, _ in edits.set] + [_name(name) for name in edits.remove]
        self.replaced = frozenset(name.lower() for name in replaced)
        self._removed = _pattern(self.replaced) if replaced else None
        self._added = b"".join(
            b"\r\n%b: %b" % (_name(name), _value(name, value)) for name, value in edits.set + edits.add
        )

    def apply(self, lines: bytes) -> bytes:
        """b"\\r\\nName: value" lines, edited."""
        if self._removed is not None:
            lines = self._removed.sub(b"", lines)
        return lines + self._added


def compile_edits(edits: HeaderEdits) -> Edits | None:
    """None when there is nothing to do. Raises EditError."""
    return Edits(edits) if edits.set or edits.add or edits.remove else None


def _pattern(names: Iterable[bytes]) -> re.Pattern[bytes]:
    return re.compile(rb"(?i)\r\n(?:" + b"|".join(re.escape(name) for name in sorted(names)) + rb"):[^\r]*")


def _name(name: str) -> bytes:
    encoded = name.encode("utf-8")
    if TOKEN.fullmatch(encoded) is None:
        raise EditError(f"{name!r} is not a header name", "use letters, digits and hyphens")
    if encoded.lower() in _GENERATED:
        raise EditError(
            f"header {name!r} cannot be edited: tidegate generates it",
            "use rewrite_host for Host and via for Via; leave out framing and connection headers",
        )
    return encoded


def _value(name: str, value: str) -> bytes:
    encoded = value.encode("utf-8")
    if _VALUE.fullmatch(encoded) is None:
        raise EditError(f"the value for header {name!r} holds a control character", "write it on one line")
    return encoded.strip(b" \t")
