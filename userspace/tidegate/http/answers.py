"""Our own answers: refusals, redirects, fixed answers; small, one shape, a listener's bodies where set."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from pathlib import Path
from typing import Final

from tidegate.config.model import FixedAnswer
from tidegate.errors import EXIT_USAGE, OperatorError
from tidegate.http.limits import MAX_ANSWER_FILE
from tidegate.http.stamps import DateField

# Where RFC 9110 renamed what Python still calls by the older name.
_REASONS: Final = {413: b"Content Too Large", 414: b"URI Too Long", 422: b"Unprocessable Content"}

_TYPES: Final = {
    ".html": b"text/html; charset=utf-8",
    ".htm": b"text/html; charset=utf-8",
    ".json": b"application/json",
    ".xml": b"application/xml",
}
_TEXT: Final = b"text/plain; charset=utf-8"

# After these the client's bytes cannot be told apart any more, or are not wanted.
CLOSING: Final = frozenset({400, 405, 408, 413, 414, 417, 431, 501, 505})

# 405 must say what is allowed (RFC 9110 15.5.6); CONNECT gets it, and TRACE with no forwards left.
ALLOW: Final = b"\r\nAllow: GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"


class AnswerFileError(OperatorError):
    """A custom answer's file cannot be used."""

    exit_code = EXIT_USAGE


def reason(status: int) -> bytes:
    """The reason phrase of a status, b"" for one that has none."""
    known = _REASONS.get(status)
    if known is not None:
        return known
    try:
        return HTTPStatus(status).phrase.encode("ascii")
    except ValueError:
        return b""


class Answers:
    """Writes own answers for one listener."""

    __slots__ = ("_bodies", "_date")

    def __init__(self, date: DateField, files: Iterable[tuple[int, Path]] = ()) -> None:
        """Reads the files at once: a missing one shows at start, not under load. Raises AnswerFileError."""
        self._date = date
        self._bodies: dict[int, tuple[bytes, bytes]] = {}  # status -> content type, body
        for status, path in files:
            self._bodies[status] = (_TYPES.get(path.suffix.lower(), _TEXT), _read(path))

    def answer(
        self,
        status: int,
        *,
        head_only: bool = False,
        close: bool = False,
        http10: bool = False,
        retry_after_s: int = 0,
        extra: bytes = b"",
    ) -> bytes:
        """A whole response for a status we answer ourselves.

        `head_only`: the request was HEAD. `close`: the connection ends after it; refusals in CLOSING always
        end it. `extra`: b"\\r\\nName: value" lines.
        """
        body = self._bodies.get(status)
        if body is None:
            body = self._bodies[status] = (_TEXT, b"%d %b\n" % (status, reason(status)))
        if status == 405:
            extra += ALLOW
        if retry_after_s:
            extra += b"\r\nRetry-After: %d" % retry_after_s
        # A refusal says what is true now, not what a cache should say later.
        extra += b"\r\nCache-Control: no-store"
        return self._write(status, *body, head_only, close or status in CLOSING, http10, extra)

    def redirect(
        self,
        status: int,
        location: bytes,
        *,
        head_only: bool = False,
        close: bool = False,
        http10: bool = False,
        extra: bytes = b"",
    ) -> bytes:
        """A redirect, without a body where none was set: every client that matters follows Location."""
        content_type, body = self._bodies.get(status, (b"", b""))
        extra = b"\r\nLocation: %b%b" % (location, extra)
        return self._write(status, content_type, body, head_only, close, http10, extra)

    def fixed(
        self,
        answer: FixedAnswer,
        *,
        head_only: bool = False,
        close: bool = False,
        http10: bool = False,
        extra: bytes = b"",
    ) -> bytes:
        """A route's fixed answer."""
        content_type = answer.content_type.encode("utf-8")
        body = answer.body.encode("utf-8")
        return self._write(answer.status, content_type, body, head_only, close, http10, extra)

    def _write(
        self,
        status: int,
        content_type: bytes,
        body: bytes,
        head_only: bool,
        close: bool,
        http10: bool,
        extra: bytes,
    ) -> bytes:
        if close:
            connection = b"\r\nConnection: close"
        else:
            connection = b"\r\nConnection: keep-alive" if http10 else b""
        if status in (204, 304):
            length, body = b"", b""
        else:
            length = b"\r\nContent-Length: %d" % len(body)
        return b"HTTP/1.1 %d %b%b%b%b%b%b\r\n\r\n%b" % (
            status,
            reason(status),
            self._date.line(),
            b"\r\nContent-Type: " + content_type if body else b"",
            length,
            extra,
            connection,
            b"" if head_only else body,
        )


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            body = file.read(MAX_ANSWER_FILE + 1)
    except OSError as error:
        raise AnswerFileError(f"answer file {path}: {error.strerror}", "give a readable file") from None
    if len(body) > MAX_ANSWER_FILE:
        raise AnswerFileError(
            f"answer file {path} is larger than {MAX_ANSWER_FILE} bytes", "keep own answers small"
        )
    return body
