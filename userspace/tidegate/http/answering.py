"""The head a client gets: status line, framing and connection fields written anew, the rest in one piece."""

from __future__ import annotations

from typing import Final

from tidegate.http.edits import Edits
from tidegate.http.request import Request
from tidegate.http.response import CHUNKED, CLOSE, LENGTH, Response, ResponseParser
from tidegate.http.stamps import DateField

_CONNECTION: Final = (b"", b"\r\nConnection: keep-alive", b"\r\nConnection: close")


class ResponseForm:
    """Writes response heads for one listener."""

    __slots__ = ("_date",)

    def __init__(self, date: DateField) -> None:
        self._date = date

    def head(
        self,
        response: Response,
        parser: ResponseParser,
        request: Request,
        close: bool,
        edits: Edits | None = None,
        extra: bytes = b"",
    ) -> bytes:
        """The whole head, its empty line included; b"" for an interim one that HTTP/1.0 does not know.

        `close`: the client's connection ends after this response (`must_close` says when it has to).
        `extra`: further b"\\r\\nName: value" lines, such as a sticky cookie.
        """
        framing = parser.framing
        key = framing << 2 | close << 1 | request.http10
        if edits is None and not extra:
            known = response.written.get(key)
            if known is not None:
                if response.dated or response.status < 200:
                    return known
                # Ours is in it: good for as long as it is the date.
                if response.written_at == self._date.line():
                    return known
                response.written.clear()
        if response.status < 200 and request.http10:
            return b""
        lines = response.forward
        # RFC 9110 6.6.1: whoever forwards a response without one adds it. Interim ones carry none.
        undated = not response.dated and response.status >= 200
        if undated:
            lines += self._date.line()
        if edits is not None:
            lines = edits.apply(lines)
        head = b"HTTP/1.1 %d %b%b%b%b%b\r\n\r\n" % (
            response.status,
            response.reason,
            lines,
            _framing(response, framing, request),
            _connection(response, close, request),
            extra,
        )
        # A 101 without Upgrade is completed from its request.
        if edits is None and not extra and response.status != 101:
            response.written[key] = head
            if undated:
                response.written_at = self._date.line()
        return head


def must_close(request: Request, parser: ResponseParser) -> bool:
    """The client's connection cannot go on after this response."""
    return parser.framing == CLOSE or not request.keep_alive


def _framing(response: Response, framing: int, request: Request) -> bytes:
    if framing == LENGTH:
        return b"\r\nContent-Length: %d" % response.content_length
    if framing == CHUNKED:
        return b"\r\nTransfer-Encoding: chunked"
    # HEAD and 304 may say what a GET would have brought; 1xx and 204 must not (RFC 9110 8.6).
    if framing == CLOSE or response.status < 200 or response.status == 204:
        return b""
    if response.content_length >= 0:
        return b"\r\nContent-Length: %d" % response.content_length
    return b"\r\nTransfer-Encoding: chunked" if response.chunked and not request.http10 else b""


def _connection(response: Response, close: bool, request: Request) -> bytes:
    if response.status == 101:
        return b"\r\nConnection: upgrade\r\nUpgrade: " + (response.upgrade or request.upgrade)
    if response.status < 200:
        return b""
    if close:
        return _CONNECTION[2]
    return _CONNECTION[request.http10]
