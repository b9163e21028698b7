"""The response side of a backend connection: bytes in, validated responses out (RFC 9112).

    parser = ResponseParser(memo)
    parser.start(request)                     # a request went out
    response = parser.receive_head(data)      # None: more bytes; ResponseError: 502 and close
    send(form.head(response, parser, close))
    while parser.state == BODY:
        send(parser.receive_body(data))       # first with b""

An interim response (1xx but 101) leaves the parser in HEAD: send it and call receive_head(b"") again.
"""

from __future__ import annotations

import re
from typing import Final

from tidegate.http import blame
from tidegate.http.chunked import ChunkDecoder, encode_end
from tidegate.http.errors import Fault, ResponseError
from tidegate.http.fields import remove_fields
from tidegate.http.head import BLOCK, NEVER_IN_HEAD, RESPONSE_BLOCK, STATUS_LINE, VALUE_CHAR, SecondOpinion
from tidegate.http.limits import (
    MAX_INTERIM,
    MAX_LENGTH_DIGITS,
    MAX_RESPONSE_FIELD_LINES,
    MAX_RESPONSE_HEAD,
    MEMO_BLOCK,
    MEMO_ENTRIES,
)
from tidegate.http.reader import BODY, COMPLETE, FAILED, HEAD, IDLE, TUNNEL, MessageReader
from tidegate.http.request import Request

# How the client is told where a body ends.
NO_BODY: Final = 0  # by the request or the status: HEAD, 1xx, 204, 304
LENGTH: Final = 1
CHUNKED: Final = 2
CLOSE: Final = 3  # by the end of the connection: HTTP/1.0 clients, when the length is not known

_SPECIAL: Final = re.compile(
    rb"\r\n(c(?:onnection|ontent-length)|transfer-encoding|keep-alive|proxy-(?:connection|authenticate)"
    rb"|te|upgrade|date|set-cookie):[ \t]*([^\r]*)"
)
_STATUS_LINE_START: Final = re.compile(
    rb"H(?:T(?:T(?:P(?:/(?:1(?:\.(?:[01](?: (?:[1-9](?:[0-9](?:[0-9](?: "
    + VALUE_CHAR
    + rb"*+)?\r?)?)?)?)?)?)?)?)?)?)?)?"
)
_STATUS_AT: Final = len(b"HTTP/1.1 ")
_BODILESS: Final = frozenset({204, 304, *range(100, 200)})
_KNOWN_OPTIONS: Final = frozenset(
    b"close keep-alive upgrade te connection content-length transfer-encoding proxy-connection date".split()
)


class Response:
    """One validated response head. Never changed once made (the cache of written forms apart)."""

    __slots__ = (
        "chunked",
        "content_length",
        "dated",
        "forward",
        "keep_alive",
        "reason",
        "secret",
        "status",
        "upgrade",
        "written",
        "written_at",
    )

    def __init__(self, status: int, reason: bytes) -> None:
        self.status = status
        self.reason = reason
        self.forward = b""  # b"\r\nName: value" lines without hop-by-hop and framing fields
        self.content_length = -1
        self.chunked = False
        self.keep_alive = False  # the backend would go on, if the framing lets us
        self.upgrade = b""
        self.dated = False
        self.secret = False  # sets cookies: not remembered beyond its connection
        self.written: dict[int, bytes] = {}  # heads made of it, by framing and connection
        self.written_at = b""  # the Date line in them, when it is ours

    @property
    def interim(self) -> bool:
        return self.status < 200 and self.status != 101


class ResponseMemo:
    """Readings of recent response heads, per worker; bounded, dropped whole when full."""

    __slots__ = ("_known", "_opinion")

    def __init__(self) -> None:
        self._known: dict[bytes, Response] = {}
        self._opinion = SecondOpinion()

    def read(self, head: bytes) -> Response:
        """The reading of a whole head. Raises ResponseError."""
        known = self._known.get(head)
        if known is not None:
            return known
        line = STATUS_LINE.match(head)
        if line is None:
            error = ResponseError(Fault.STATUS_LINE, "malformed status line")
            raise error.blame(head, blame.in_status_line(head))
        block = head[line.end() :]
        try:
            response = read_response(line, block)
            if not self._opinion.response_block(block):
                error = ResponseError(Fault.SECOND_OPINION, "head refused by the second parser")
                raise error.blame(block, blame.second_response(block))
        except ResponseError as refusal:
            refusal.within(head, line.end())
            raise
        if len(head) <= MEMO_BLOCK and not response.secret:
            if len(self._known) >= MEMO_ENTRIES:
                self._known.clear()
            self._known[head] = response
        return response


def read_response(line: re.Match[bytes], block: bytes) -> Response:
    """Validate and read the block behind a status line. Raises ResponseError."""
    if RESPONSE_BLOCK.fullmatch(block) is None:
        if BLOCK.fullmatch(block) is not None:
            error = ResponseError(Fault.HEAD_TOO_LARGE, "too many header fields")
            raise error.blame(block, blame.in_line(block, MAX_RESPONSE_FIELD_LINES))
        raise ResponseError(Fault.HEADER, "malformed header line").blame(block, blame.in_block(block))
    http10 = line[1] == b"0"
    response = Response(int(line[2]), line[3] or b"")
    kept = []
    last = 0
    options: list[bytes] = []
    coded = False
    kept_open = False
    for found in _SPECIAL.finditer(block.lower()):
        name, value = found.groups()
        if name == b"date":
            response.dated = True
            continue
        if name == b"set-cookie":
            response.secret = True
            continue
        value = value.rstrip(b" \t")
        if name == b"connection":
            if value == b"keep-alive":
                kept_open = True
            else:
                options += [option.strip(b" \t") for option in value.split(b",")]
        elif name == b"content-length":
            if response.content_length >= 0:
                error = ResponseError(Fault.FRAMING, "more than one Content-Length")
                raise error.blame(block, found.start(2))
            if not value.isdigit() or len(value) > MAX_LENGTH_DIGITS:
                error = ResponseError(Fault.FRAMING, "malformed Content-Length")
                raise error.blame(block, found.start(2) + blame.in_length(value))
            response.content_length = int(value)
        elif name == b"transfer-encoding":
            if coded or found[2].rstrip(b" ") != b"chunked":  # a tab behind it: see request fields
                error = ResponseError(Fault.CODING, "a transfer coding other than chunked")
                at = 0 if coded else blame.departs(found[2], 0, b"chunked")
                raise error.blame(block, found.start(2) + at)
            coded = response.chunked = True
        elif name == b"upgrade":
            response.upgrade = block[found.start(2) : found.start(2) + len(value)]
        start, end = found.span()
        kept.append(block[last:start])
        last = end
    kept.append(block[last:-4])
    response.forward = b"".join(kept)
    if coded and (http10 or response.content_length >= 0):
        error = ResponseError(Fault.FRAMING, "Transfer-Encoding with Content-Length, or in HTTP/1.0")
        names = (b"transfer-encoding",) if http10 else (b"content-length", b"transfer-encoding")
        raise error.blame(block, blame.in_value_of(block, *names))
    response.keep_alive = b"close" not in options and (not http10 or kept_open or b"keep-alive" in options)
    if options:
        named = frozenset(options) - _KNOWN_OPTIONS
        if named:
            response.forward = remove_fields(response.forward, named)
    return response


class ResponseParser(MessageReader):
    """See the module. One per backend connection; not to be used again after a ResponseError."""

    __slots__ = (
        "_head_only",
        "_http10",
        "_interim",
        "_last_head",
        "_last_size",
        "_memo",
        "_scanned",
        "_upgrade",
        "framing",
        "last",
        "reusable",
    )

    def __init__(self, memo: ResponseMemo) -> None:
        super().__init__()
        self.state = IDLE
        self._memo = memo
        self._last_head = b""
        self._last_size = 0  # of a message with that head whose end its Content-Length tells; 0: does not
        self.last: Response | None = None  # the reading of that head
        self._scanned = 0
        self._interim = 0
        self._head_only = False
        self._http10 = False
        self._upgrade = False
        self.framing = NO_BODY  # how the body goes to the client
        self.reusable = False  # the backend keeps the connection and the response is framed; see `free`

    def start(self, request: Request) -> None:
        """A request is going out on this connection; one at a time, only in state IDLE or COMPLETE."""
        if self.state not in (IDLE, COMPLETE) or self.rest:
            raise ValueError("the connection is not free")
        self.state = HEAD
        self._head_only = request.method == b"HEAD"
        self._http10 = request.http10
        self._upgrade = request.upgrade != b""
        self._interim = 0
        self.reusable = False

    def same_again(self, data: bytes) -> int:
        """Where the body begins if `data` is a whole response with the very head of the one before; else 0.

        Then it is received, body and all, and `last` is its head's reading. Otherwise nothing has happened:
        `receive_head` is to have it. Most responses come in one piece, and those to one backend's health
        checks, or to requests for one thing, differ in their bodies at most.
        """
        if len(data) != self._last_size or self.state != HEAD or self.rest or self._head_only:
            return 0
        head = self._last_head
        response = self.last
        if response is None or not data.startswith(head):
            return 0
        self.framing = LENGTH
        self.reusable = response.keep_alive
        self.state = COMPLETE
        return len(head)

    def receive_head(self, data: bytes) -> Response | None:
        """The next response, interim ones included, or None while its head is not whole.

        What follows the head is in `rest` afterwards. The state is HEAD after an interim response, TUNNEL
        after 101, BODY, or COMPLETE when there is no body. Raises ResponseError.
        """
        if self.state != HEAD:
            error = ResponseError(Fault.UNASKED, "bytes from a backend that owes no response")
            raise self._fail(error.blame(data, 0))
        if self.rest:
            data = self.rest + data
        end = data.find(b"\r\n\r\n", self._scanned)
        if end < 0:
            self._hold(data)
            return None
        self._scanned = 0
        end += 4
        head = data[:end]
        response = self.last
        if response is None or head != self._last_head:
            if end > MAX_RESPONSE_HEAD:
                error = ResponseError(Fault.HEAD_TOO_LARGE, "response head too large")
                raise self._fail(error.blame(data, MAX_RESPONSE_HEAD))
            try:
                response = self._memo.read(head)
            except ResponseError as error:
                raise self._fail(error) from None
            self.last = response
            self._last_head = head
            framed = response.content_length >= 0 and response.status not in _BODILESS
            self._last_size = end + response.content_length if framed else 0
        self.rest = data[end:]
        if response.status < 200:
            self._interim_or_upgrade(response)
        elif self._head_only or response.status == 204 or response.status == 304:
            self.framing = NO_BODY
            self._complete(response.keep_alive)
        elif response.content_length >= 0:
            self.framing = LENGTH
            self._rechunk = False
            self.left = response.content_length
            self.reusable = response.keep_alive
            if self.left:
                self.state = BODY
            else:
                self._complete(response.keep_alive)
        else:
            self._rechunk = not self._http10
            self.framing = CLOSE if self._http10 else CHUNKED
            self.state = BODY
            if response.chunked:
                self.left = 0
                self.reusable = response.keep_alive
                self._decoder = ChunkDecoder(_body_error)
            else:
                self.left = -1
        return response

    def _interim_or_upgrade(self, response: Response) -> None:
        self.framing = NO_BODY
        if response.chunked or response.content_length > 0:
            error = ResponseError(Fault.FRAMING, "an interim response with content")
            at = blame.in_value_of(self._last_head, b"content-length", b"transfer-encoding")
            raise self._fail(error.blame(self._last_head, at))
        if response.status == 101:
            if not self._upgrade:
                error = ResponseError(Fault.UNASKED, "101 without a request to upgrade")
                raise self._fail(error.blame(self._last_head, _STATUS_AT))
            self.state = TUNNEL
            return
        self._interim += 1
        if self._interim > MAX_INTERIM:
            error = ResponseError(Fault.INTERIM, "too many interim responses")
            raise self._fail(error.blame(self._last_head, _STATUS_AT))

    def _complete(self, reusable: bool) -> None:
        self.state = COMPLETE
        self.reusable = reusable

    def _hold(self, data: bytes) -> None:
        line_end = data.find(b"\r\n")
        line = STATUS_LINE.match(data) if line_end >= 0 else _STATUS_LINE_START.fullmatch(data)
        if data and line is None:
            error = ResponseError(Fault.STATUS_LINE, "malformed status line")
            raise self._fail(error.blame(data, blame.in_status_line(data)))
        never = NEVER_IN_HEAD.search(data, self._scanned)
        if never is not None:
            error = ResponseError(Fault.HEADER, "a control byte, or a CR or LF on its own")
            raise self._fail(error.blame(data, never.start()))
        if len(data) > MAX_RESPONSE_HEAD:
            error = ResponseError(Fault.HEAD_TOO_LARGE, "response head too large")
            raise self._fail(error.blame(data, MAX_RESPONSE_HEAD))
        self.rest = data
        self._scanned = max(len(data) - 3, 0)

    def _fail(self, error: ResponseError) -> ResponseError:
        self.state = FAILED
        self.rest = b""
        self.reusable = False
        return error

    @property
    def free(self) -> bool:
        """The connection may carry another request."""
        return self.state == COMPLETE and self.reusable and not self.rest

    @property
    def surplus(self) -> bool:
        """Bytes behind a complete response: longer than declared. It stands, the connection does not."""
        return self.state == COMPLETE and self.rest != b""

    @property
    def untouched(self) -> bool:
        """Not one byte of a response has come: what makes a retry possible."""
        return self.state == HEAD and not self.rest and self._interim == 0

    def end(self) -> bytes:
        """The backend closed its side: the last bytes for the client, if that ends the response.

        Raises ResponseError (CUT) inside a response. A reset is no end: then the response is cut in any case.
        """
        if self.state == BODY and self.left < 0 and self._decoder is None:
            self.state = COMPLETE
            self.reusable = False
            return encode_end() if self._rechunk else b""
        if self.state in (COMPLETE, IDLE, TUNNEL):
            self.reusable = False
            return b""
        raise self._fail(
            ResponseError(Fault.CUT, "the backend closed inside a response").blame(self.rest, -1)
        )


def _body_error(_status: int, fault: Fault, message: str) -> ResponseError:
    return ResponseError(fault, message)
