"""Chunked transfer coding (RFC 9112 7.1): decoded strictly, written anew, never passed on raw.

Own scanner rather than llhttp's: that one takes sizes of any length, extensions of any content and size,
and calls back once per chunk; here a chunk costs one regex match, and what the peer meant by an extension
or a size like 000A never reaches the other side.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from tidegate.http import blame
from tidegate.http.errors import Fault, PeerError
from tidegate.http.head import BLOCK, NEVER_IN_HEAD, TOKEN_CHAR, VALUE_CHAR
from tidegate.http.limits import (
    MAX_CHUNK_DIGITS,
    MAX_CHUNK_EXTENSIONS,
    MAX_CHUNK_LINE,
    MAX_TRAILER,
    MAX_TRAILER_LINES,
)

_QUOTED: Final = rb'"(?:[\t\x20\x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\' + VALUE_CHAR + rb')*"'
# RFC 9112 7.1.1, its "bad whitespace" included, which a recipient must parse.
_EXTENSION: Final = (
    rb"[ \t]*;[ \t]*" + TOKEN_CHAR + rb"+(?:[ \t]*=[ \t]*(?:" + TOKEN_CHAR + rb"+|" + _QUOTED + rb"))?"
)
_SIZE_LINE: Final = re.compile(rb"([0-9A-Fa-f]++)((?:" + _EXTENSION + rb")*)\r\n")
_SIZE_LINE_START: Final = re.compile(rb"[0-9A-Fa-f]*+(?:[ \t;]" + VALUE_CHAR + rb"*+)?\r?")

_SIZE, _DATA, _DELIMITER, _TRAILER = range(4)

# Fields that frame or route a message: in a trailer they are an attack, whoever believes them.
_REFUSED: Final = frozenset({b"content-length", b"transfer-encoding", b"host"})

# RFC 9110 6.5.1: what a recipient must not find out only after the content, and what we set ourselves.
_DROPPED: Final = frozenset(
    b"age authorization cache-control connection content-encoding content-range content-type cookie date "
    b"expect expires forwarded if-match if-modified-since if-none-match if-range if-unmodified-since "
    b"keep-alive location max-forwards pragma proxy-authenticate proxy-authorization proxy-connection range "
    b"retry-after set-cookie te trailer upgrade vary via warning www-authenticate x-queue-age-ms "
    b"x-request-id x-request-start".split()
)


class ChunkDecoder:
    """Bytes of a chunked body in, payload out.

    `decode` may be called with pieces cut anywhere. Once `done`, `rest` holds the bytes behind the body and
    `trailers` the trailer fields worth forwarding, as b"Name: value\\r\\n..." lines.
    """

    __slots__ = (
        "_error",
        "_extensions",
        "_held",
        "_left",
        "_scanned",
        "_seen",
        "_state",
        "done",
        "rest",
        "trailers",
    )

    def __init__(self, error: Callable[[int, Fault, str], PeerError]) -> None:
        """`error` makes the exception to raise: the client's fault or the backend's."""
        self._error = error
        self._state = _SIZE
        self._held = b""
        self._left = 0
        self._extensions = 0
        self._scanned = 0  # bytes of a partial trailer section that were looked at
        self._seen = 0  # bytes of the body that `decode` was given
        self.done = False
        self.rest = b""
        self.trailers = b""

    @property
    def left(self) -> int:
        """Bytes of the current chunk still to come."""
        return self._left

    def decode(self, data: bytes) -> bytes:
        """The payload in `data`. Raises the PeerError of the constructor's choice."""
        self._seen += len(data)
        if self._held:
            data = self._held + data
            self._held = b""
        parts: list[bytes] = []
        pos = 0
        size = len(data)
        while pos < size:
            if self._state == _DATA:
                taken = min(self._left, size - pos)
                parts.append(data[pos : pos + taken])
                pos += taken
                self._left -= taken
                if self._left == 0:
                    self._state = _DELIMITER
            elif self._state == _DELIMITER:
                if data[pos] != 0x0D or (size - pos > 1 and data[pos + 1] != 0x0A):
                    at = pos if data[pos] != 0x0D else pos + 1
                    raise self._malformed("chunk data is not followed by CRLF", data, at)
                if size - pos < 2:
                    self._held = data[pos:]
                    break
                pos += 2
                self._state = _SIZE
            elif self._state == _SIZE:
                after = self._size_line(data, pos)
                if after < 0:
                    break
                pos = after
            else:
                self._trailer(data, pos)
                break
        return b"".join(parts) if len(parts) != 1 else parts[0]

    def _malformed(self, message: str, data: bytes, at: int) -> PeerError:
        return self._blamed(self._error(400, Fault.BODY, message), data, at)

    def _blamed(self, error: PeerError, data: bytes, at: int) -> PeerError:
        """`data` ends where what `decode` was given ends."""
        return error.blame(data, at, self._seen - len(data))

    def _size_line(self, data: bytes, pos: int) -> int:
        """Position behind the chunk-size line at `pos`, or -1 when it is not whole."""
        newline = data.find(b"\n", pos, pos + MAX_CHUNK_LINE)
        if newline < 0:
            if len(data) - pos >= MAX_CHUNK_LINE:
                raise self._malformed("chunk-size line too long", data, pos + MAX_CHUNK_LINE - 1)
            if _SIZE_LINE_START.fullmatch(data, pos) is None:
                raise self._malformed("malformed chunk size", data, blame.in_size_line(data, pos))
            self._held = data[pos:]
            return -1
        line = _SIZE_LINE.fullmatch(data, pos, newline + 1)
        if line is None:
            raise self._malformed("malformed chunk size or extension", data, blame.in_size_line(data, pos))
        digits, extension = line.groups()
        if len(digits) > MAX_CHUNK_DIGITS:
            error = self._error(413, Fault.BODY_TOO_LARGE, "chunk size out of range")
            raise self._blamed(error, data, pos + MAX_CHUNK_DIGITS)
        if extension:
            self._extensions += len(extension)
            if self._extensions > MAX_CHUNK_EXTENSIONS:
                over = self._extensions - MAX_CHUNK_EXTENSIONS
                raise self._malformed("chunk extensions too large", data, line.end(2) - over)
        self._left = int(digits, 16)
        self._state = _DATA if self._left else _TRAILER
        return newline + 1

    def _trailer(self, data: bytes, pos: int) -> None:
        if data.startswith(b"\r\n", pos):
            self.done = True
            self.rest = data[pos + 2 :]
            return
        seen = pos + max(self._scanned - 3, 0)
        end = data.find(b"\r\n\r\n", seen, pos + MAX_TRAILER)
        if end < 0:
            if len(data) - pos > MAX_TRAILER:
                error = self._error(431, Fault.HEAD_TOO_LARGE, "trailer section too large")
                raise self._blamed(error, data, pos + MAX_TRAILER)
            never = NEVER_IN_HEAD.search(data, seen)
            if never is not None:
                raise self._malformed("malformed trailer section", data, never.start())
            self._held = data[pos:]
            self._scanned = len(self._held)
            return
        section = data[pos : end + 4]
        block = b"\r\n" + section
        if BLOCK.fullmatch(block) is None:
            raise self._malformed("malformed trailer section", data, pos - 2 + blame.in_block(block))
        lines = section.split(b"\r\n")[:-2]
        if len(lines) > MAX_TRAILER_LINES:
            error = self._error(431, Fault.HEAD_TOO_LARGE, "too many trailer fields")
            raise self._blamed(error, data, pos - 2 + blame.in_line(block, MAX_TRAILER_LINES))
        kept = []
        for line in lines:
            # Backends behind CGI-like interfaces read "_" in a name as "-".
            name = line[: line.index(b":")].lower().replace(b"_", b"-")
            if name in _REFUSED:
                at = pos + section.index(line)
                raise self._malformed("a framing or routing field in the trailer section", data, at)
            if name not in _DROPPED and not name.startswith(b"x-forwarded-"):
                kept.append(line + b"\r\n")
        self.trailers = b"".join(kept)
        self.done = True
        self.rest = data[end + 4 :]


def encode_chunk(payload: bytes) -> bytes:
    """One chunk; the payload must not be empty, for that would end the body."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def encode_end(trailers: bytes = b"") -> bytes:
    """The last chunk and the trailer section; `trailers` as ChunkDecoder leaves them."""
    return b"0\r\n%b\r\n" % trailers
