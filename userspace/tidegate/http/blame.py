"""Which byte of a refused message is to blame: asked on the way to a refusal, never for what is served.

The byte to blame is the first one with which the message can no longer become a valid one; but of a CR
without its LF, the CR, and of what is over a limit, the first one over it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser, HttpResponseParser

from tidegate.http.head import FIELD_LINE, TARGET_CHAR, TOKEN, VALUE_CHAR
from tidegate.http.limits import MAX_AUTHORITY, MAX_CHUNK_DIGITS, MAX_LENGTH_DIGITS

_Piece = bytes | re.Pattern[bytes]

# Not CRLF as bytes: of a CR without its LF the CR is to blame.
_CRLF: Final = re.compile(rb"\r\n")
_TARGET: Final = re.compile(TARGET_CHAR + rb"++")
_MINOR: Final = re.compile(rb"[01]")
_STATUS: Final = (re.compile(rb"[1-9]"), re.compile(rb"[0-9]"), re.compile(rb"[0-9]"))
_VALUE: Final = re.compile(VALUE_CHAR + rb"*+")
_LINE: Final = re.compile(FIELD_LINE)
_NAME: Final = re.compile(rb"[A-Za-z0-9._~\-]*+")
_LITERAL: Final = re.compile(rb"[0-9A-Fa-f:.]*+")
_DIGITS: Final = re.compile(rb"[0-9]*+")
_HEX: Final = re.compile(rb"[0-9A-Fa-f]++")
_SPACE: Final = re.compile(rb"[ \t]*+")
_QUOTED: Final = re.compile(rb'"(?:[\t\x20\x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\' + VALUE_CHAR + rb")*+")
_COMMA: Final = re.compile(rb"[ \t]*,[ \t]*")
_ADDRESS: Final = re.compile(rb"[0-9A-Fa-f.:]++")
_PORT: Final = re.compile(rb"0|[1-9][0-9]{0,4}")
_FOUR_OR_SIX: Final = re.compile(rb"[46]")
_PRINTABLE: Final = re.compile(rb"[\x20-\x7e]*+")


def departs(data: bytes, at: int, *pieces: _Piece) -> int:
    """Where `data`, from `at` on, stops being these pieces in a row; behind the last one when it does not."""
    for piece in pieces:
        if isinstance(piece, bytes):
            for byte in piece:
                if at >= len(data) or data[at] != byte:
                    return at
                at += 1
        else:
            found = piece.match(data, at)
            if found is None:
                return at
            at = found.end()
    return at


def in_request_line(data: bytes, start: int) -> int:
    return departs(data, start, TOKEN, b" ", _TARGET, b" HTTP/1.", _MINOR, _CRLF)


def in_status_line(data: bytes) -> int:
    at = departs(data, 0, b"HTTP/1.", _MINOR, b" ", *_STATUS)
    return departs(data, at, b" ", _VALUE, _CRLF) if data[at : at + 1] == b" " else departs(data, at, _CRLF)


def in_block(block: bytes, at: int = 2) -> int:
    """Of the field lines that begin at `at`; -1 when each is well-formed, up to an empty one or the end."""
    while at < len(block) and not block.startswith(b"\r\n", at):
        line = _LINE.match(block, at)
        if line is None:
            return departs(block, at, TOKEN, b":", _VALUE, _CRLF)
        at = line.end()
    return -1


def in_line(block: bytes, number: int) -> int:
    """Where the field line of that number, from 0, begins; -1 when there are not as many."""
    at = 0
    for _ in range(number + 1):
        at = block.find(b"\r\n", at)
        if at < 0:
            return -1
        at += 2
    return at


def in_value_of(block: bytes, *names: bytes) -> int:
    """Where the value of the last field of one of these lower-case names begins; -1 without one."""
    pattern = rb"\r\n(?:" + b"|".join(map(re.escape, names)) + rb"):[ \t]*"
    ends = [found.end() for found in re.finditer(pattern, block.lower())]
    return max(ends, default=-1)


def in_authority(value: bytes) -> int:
    """As head.parse_authority has it."""
    if len(value) > MAX_AUTHORITY:
        return MAX_AUTHORITY
    if value.startswith(b"["):
        at = departs(value, 1, _LITERAL, b"]")
        if value[at - 1 : at] != b"]":
            return at
    else:
        at = departs(value, 0, _NAME)
        if value[:at] in (b"", b"."):
            return 0
    if at == len(value):
        return 1  # only the address in brackets is left to be wrong
    if value[at] != 0x3A:
        return at
    begin, at = at + 1, departs(value, at + 1, _DIGITS)
    if at < len(value) or at == begin:
        return at if at < len(value) else 1
    if at - begin > 5:
        return begin + 5
    return 1 if 0 < int(value[begin:at]) < 65536 else begin


def in_length(value: bytes) -> int:
    at = departs(value, 0, _DIGITS)
    return at if at < len(value) or not value else MAX_LENGTH_DIGITS


def in_codings(value: bytes) -> int:
    """Of a lower-case Transfer-Encoding."""
    at = departs(value, 0, TOKEN)
    while at < len(value):
        after = departs(value, at, _COMMA, TOKEN)
        if after == at or _COMMA.fullmatch(value, at, after):
            return after
        at = after
    codings = list(TOKEN.finditer(value))
    seen = 0
    for coding in codings:
        if coding[0] == b"chunked":
            seen += 1
        if seen > 1 or coding[0] == b"identity":
            return coding.start()
    if not codings:
        return 0
    return codings[-1].start() if codings[-1][0] != b"chunked" else codings[0].start()


def in_size_line(data: bytes, pos: int) -> int:
    """Of a chunk's size and extensions."""
    at = departs(data, pos, _HEX)
    if at - pos > MAX_CHUNK_DIGITS:
        return pos + MAX_CHUNK_DIGITS
    if at == pos:
        return at
    while _CRLF.match(data, at) is None:
        semicolon = departs(data, at, _SPACE)
        if data[semicolon : semicolon + 1] != b";":
            # spaces in front of the end of the line, where only an extension could follow them
            return at if data[semicolon : semicolon + 1] in (b"\r", b"\n", b"") else semicolon
        name = departs(data, semicolon + 1, _SPACE)
        at = departs(data, name, TOKEN)
        if at == name:
            return at
        equals = departs(data, at, _SPACE)
        if data[equals : equals + 1] == b"=":
            value = departs(data, equals + 1, _SPACE)
            if data[value : value + 1] == b'"':
                at = departs(data, value, _QUOTED, b'"')
                if data[at - 1 : at] != b'"' or at - value < 2:
                    return at
            else:
                at = departs(data, value, TOKEN)
                if at == value:
                    return at
    return at


def in_proxy_line(data: bytes) -> int:
    """Of a version 1 header whose line has come."""
    if data.startswith(b"PROXY U"):
        at = departs(data, 0, b"PROXY UNKNOWN")
        return (
            departs(data, at, b" ", _PRINTABLE, _CRLF)
            if data[at : at + 1] == b" "
            else departs(data, at, _CRLF)
        )
    at = departs(data, 0, b"PROXY TCP", _FOUR_OR_SIX)
    for piece in (_ADDRESS, _ADDRESS, _PORT, _PORT):
        begin = departs(data, at, b" ")
        if begin == at:
            return at
        at = departs(data, begin, piece)
        if at == begin:
            return at
        if piece is _PORT and int(data[begin:at]) > 65535:
            return begin
    return departs(data, at, _CRLF)


def second_request(block: bytes) -> int:
    """Where llhttp refuses the block of a request; -1 when it is not the bytes that it does not like."""
    return _bisect(HttpRequestParser, b"POST / HTTP/1.1", block)


def second_response(block: bytes) -> int:
    """Where llhttp refuses the block of a response."""
    return _bisect(HttpResponseParser, b"HTTP/1.1 200 OK", block)


def _bisect(make: Callable[[object], Any], line: bytes, block: bytes) -> int:
    """It does not say: the shortest part that it refuses ends with the byte, found in some 15 steps."""

    def refuses(size: int) -> bool:
        try:
            make(object()).feed_data(line + block[:size])
        except HttpParserUpgrade:
            return False
        except HttpParserError:
            return True
        return False

    if not refuses(len(block)):
        return -1
    low, high = 0, len(block)  # accepted, refused
    while high - low > 1:
        middle = (low + high) // 2
        if refuses(middle):
            high = middle
        else:
            low = middle
    return high - 1
