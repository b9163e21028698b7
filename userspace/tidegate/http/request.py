"""The request side of a client connection: bytes in, validated requests out (RFC 9112).

parser = RequestParser(rules)
request = parser.receive_head(data)      # None: more bytes are needed; RequestError: refuse and close
while parser.state == BODY:
    forward(parser.receive_body(data))   # first with b"", for what came along with the head
...                                      # response sent
parser.next()                            # then receive_head(b"") for a pipelined request
"""

from __future__ import annotations

from typing import Any, Final

from tidegate.http import blame
from tidegate.http.chunked import ChunkDecoder
from tidegate.http.errors import Fault, RequestError
from tidegate.http.fields import FieldsMemo, RequestFields
from tidegate.http.head import (
    ANY_VERSION,
    DEFAULT_PORTS,
    FIELD_LINES,
    NEVER_IN_HEAD,
    REQUEST_LINE,
    REQUEST_LINE_START,
    parse_authority,
)
from tidegate.http.limits import MAX_REQUEST_HEAD, MAX_REQUEST_LINE, MAX_TARGET
from tidegate.http.reader import BODY, COMPLETE, FAILED, HEAD, MessageReader

_SLASH: Final = 0x2F


class Request:
    """One request head. A parser has one of these and fills it anew: read it before `next()`.

    `route` is the session's, `prefix`, `prefix_peer`, `prefix_route` and `ends` are RequestForm's: None after
    a new head, left alone when the very same head came again, so that what follows from it need not be found
    twice.
    """

    __slots__ = (
        "authority",
        "chunked",
        "content_length",
        "ends",
        "expect",
        "fields",
        "host",
        "http10",
        "id",
        "keep_alive",
        "method",
        "path",
        "prefix",
        "prefix_peer",
        "prefix_route",
        "raw_target",
        "route",
        "target",
        "upgrade",
    )

    def __init__(self) -> None:
        self.method = b""
        self.raw_target = b""  # as received, for logs
        self.target = b""  # origin form (or "*"), for the backend
        self.path = b""  # target up to "?"
        self.http10 = False
        self.fields = _NO_FIELDS
        self.authority = b""  # for Host: as the client wrote it; b"" when an HTTP/1.0 client named none
        self.host = b""  # lower case, without port or trailing dot: what routes match
        self.content_length = -1
        self.chunked = False
        self.keep_alive = False  # the client would go on after this one
        self.expect = False  # waits for 100 before the body
        self.upgrade = b""
        self.route: Any = None
        self.prefix: bytes | None = None
        self.prefix_peer: object = None
        self.prefix_route: object = None
        self.ends = 0
        self.id = b""  # X-Request-Id, once the head for the backend was made


_NO_FIELDS: Final = RequestFields(b"\r\n\r\n")


class RequestRules:
    """What the parsers of one listener share within a worker."""

    __slots__ = ("memo", "scheme")

    def __init__(self, scheme: bytes) -> None:
        """`scheme`: b"http" or b"https", what absolute targets must say."""
        self.scheme = scheme
        self.memo = FieldsMemo()


class RequestParser(MessageReader):
    """See the module. One per client connection at a time; not to be used again after a RequestError."""

    __slots__ = (
        "_checked",
        "_last",
        "_last_block",
        "_last_fields",
        "_memo",
        "_scanned",
        "_scheme",
        "request",
    )

    def __init__(self, rules: RequestRules) -> None:
        super().__init__()
        self._rechunk = True
        self._memo = rules.memo
        self._scheme = rules.scheme
        self._last: bytes | None = None  # the last receive, when it was one whole head and nothing else
        self._last_block = b""
        self._last_fields = _NO_FIELDS
        self._checked = 0  # where the last line that was checked of a partial head ends; 0: none was
        self._scanned = 0  # bytes of `rest` that hold no end of a head
        self.request = Request()

    @property
    def idle(self) -> bool:
        """Between requests: not a byte of a next one is here (a stray CRLF apart)."""
        return self.state == HEAD and self.rest in (b"", b"\r", b"\r\n")

    def next(self) -> None:
        """Go on to the next request; only in state COMPLETE."""
        if self.state != COMPLETE:
            raise ValueError("the message is not complete")
        self.state = HEAD

    def forget(self) -> None:
        """Keep nothing from one request to the next: the routes or the rules have changed."""
        self._last = None

    def recycle(self, rules: RequestRules) -> bool:
        """Make it ready for another connection under the same rules; False where it is not to be used again.

        That is the case in the middle of a message and after an error, and where it has seen credentials:
        they are not kept beyond their connection. Otherwise it still knows the last head: the next
        connection's may well be the same.
        """
        if self.rest or self._last_fields.secret or self._memo is not rules.memo:
            return False
        if self.state == COMPLETE:
            self.state = HEAD
        return self.state == HEAD

    def receive_head(self, data: bytes) -> Request | None:
        """The next request, or None while its head is not whole. Raises RequestError.

        `data` goes behind what is left in `rest`. What follows the head is in `rest` afterwards; the state
        is BODY, or COMPLETE when there is none.
        """
        if self.state != HEAD:
            raise ValueError("the parser does not stand before a head")
        if data == self._last and not self.rest:
            self.state = COMPLETE
            return self.request
        if self.rest:
            data = self.rest + data
        scan = self._scanned
        start = 2 if data.startswith(b"\r\n") else 0  # RFC 9112 2.2: one empty line may come before
        end = data.find(b"\r\n\r\n", scan if scan > start else start)
        try:
            if end < 0:
                self._check_partial(data, start, scan)
                self.rest = data
                self._scanned = max(len(data) - 3, 0)
                return None
            self._read_head(data, start, end + 4)
        except RequestError as refusal:
            self.state = FAILED
            self.rest = b""
            refusal.within(data, start)
            raise
        self._scanned = 0
        self._checked = 0
        if start == 0 and self.state == COMPLETE and end + 4 == len(data):
            self._last = data
            self.rest = b""
        else:
            self._last = None
            self.rest = data[end + 4 :]
        return self.request

    def _read_head(self, data: bytes, start: int, end: int) -> None:
        if end - start > MAX_REQUEST_HEAD:
            error = RequestError(431, Fault.HEAD_TOO_LARGE, "request head too large")
            raise error.blame(data, start + MAX_REQUEST_HEAD)
        line = REQUEST_LINE.match(data, start)
        if line is None:
            raise _bad_request_line(data, start)
        method, target, minor = line.groups()
        if len(target) > MAX_TARGET:
            error = RequestError(414, Fault.TARGET_TOO_LONG, "request target too long")
            raise error.blame(data, line.start(2) + MAX_TARGET)
        block = data[line.end() : end]
        if block == self._last_block:
            fields = self._last_fields
        else:
            try:
                fields = self._memo.read(block)
            except RequestError as refusal:
                refusal.within(data, line.end())
                raise
            self._last_block = block
            self._last_fields = fields
        request = self.request
        request.method = method
        request.raw_target = target
        request.fields = fields
        if minor == b"1":
            if fields.authority is None:
                raise RequestError(400, Fault.HOST, "HTTP/1.1 without Host")
            request.http10 = False
            request.keep_alive = not fields.close
            request.expect = fields.expect
            request.upgrade = fields.upgrade
        else:
            if fields.coded:
                error = RequestError(400, Fault.FRAMING, "Transfer-Encoding in HTTP/1.0")
                at = blame.in_value_of(block, b"transfer-encoding")
                raise error.blame(data, line.end() + at)
            request.http10 = True
            request.keep_alive = fields.keep_alive and not fields.close
            request.expect = False  # RFC 9110 10.1.1 and 7.8: both ignored from HTTP/1.0
            request.upgrade = b""
        if method == b"CONNECT":
            raise RequestError(405, Fault.METHOD, "CONNECT is not served here").blame(method, 0)
        if target[0] == _SLASH:
            request.authority = fields.authority or b""
            request.host = fields.host
        else:
            try:
                target = self._other_form(request, method, target)
            except RequestError as refusal:
                refusal.within(data, line.start(2))
                raise
        request.target = target
        query = target.find(b"?")
        request.path = target if query < 0 else target[:query]
        request.route = request.prefix = request.prefix_route = None
        self._begin_body(request, fields)

    def _begin_body(self, request: Request, fields: RequestFields) -> None:
        length = request.content_length = fields.content_length
        chunked = request.chunked = fields.chunked
        if length <= 0 and not chunked:
            self.state = COMPLETE
            return
        if request.method == b"TRACE":  # RFC 9110 9.3.8
            raise RequestError(400, Fault.METHOD, "TRACE with content").blame(request.method, 0)
        self.state = BODY
        if chunked:
            self.left = 0
            self._decoder = ChunkDecoder(RequestError)
        else:
            self.left = length
            self._decoder = None

    def _other_form(self, request: Request, method: bytes, target: bytes) -> bytes:
        """The origin form of a target that does not begin with "/" (RFC 9112 3.2); sets the authority."""
        fields = request.fields
        request.authority = fields.authority or b""
        request.host = fields.host
        if target == b"*":
            if method != b"OPTIONS":
                raise RequestError(400, Fault.TARGET, "asterisk form outside OPTIONS").blame(target, 0)
            return target
        scheme, mark, rest = target.partition(b"://")
        scheme = scheme.lower()
        if not mark or scheme not in DEFAULT_PORTS:
            raise RequestError(400, Fault.TARGET, "neither origin nor absolute form").blame(target, 0)
        ends = [at for at in (rest.find(b"/"), rest.find(b"?")) if at >= 0]
        cut = min(ends, default=len(rest))
        authority, path = rest[:cut], rest[cut:]
        named = parse_authority(authority)
        if named is None:
            error = RequestError(400, Fault.TARGET, "malformed authority in the target")
            raise error.blame(target, len(scheme) + 3 + blame.in_authority(authority))
        if scheme != self._scheme:
            error = RequestError(421, Fault.MISDIRECTED, "the target's scheme is not served here")
            raise error.blame(target, 0)
        if fields.authority is not None:
            default = DEFAULT_PORTS[scheme]
            if named[0] != fields.host or (named[1] or default) != (fields.port or default):
                error = RequestError(400, Fault.HOST, "target and Host name different authorities")
                raise error.blame(target, len(scheme) + 3)
        request.authority = authority
        request.host = named[0]
        if not path:
            return b"*" if method == b"OPTIONS" else b"/"
        return b"/" + path if path[0] != _SLASH else path

    def _check_partial(self, data: bytes, start: int, scan: int) -> None:
        """Refuse a head that cannot become valid now, rather than when its end comes, or never does.

        Field lines are looked at when they are whole, and once: a head that trickles in costs no more.
        """
        size = len(data)
        if not self._checked and data.find(b"\r\n", start) >= 0:
            line = REQUEST_LINE.match(data, start)
            if line is None:
                raise _bad_request_line(data, start)
            self._checked = line.end()
        if self._checked:
            last = data.rfind(b"\r\n", max(scan, self._checked))
            if last > self._checked:
                if FIELD_LINES.fullmatch(data, self._checked + 2, last + 2) is None:
                    error = RequestError(400, Fault.HEADER, "malformed header line")
                    raise error.blame(data, blame.in_block(data[: last + 2], self._checked + 2))
                self._checked = last
        elif data not in (b"", b"\r", b"\r\n", b"\r\n\r") and (
            size - start > MAX_REQUEST_LINE or REQUEST_LINE_START.fullmatch(data, start) is None
        ):
            raise _bad_request_line(data, start)
        never = NEVER_IN_HEAD.search(data, scan)
        if never is not None:
            error = RequestError(400, Fault.HEADER, "a control byte, or a CR or LF on its own")
            raise error.blame(data, never.start())
        if size - start > MAX_REQUEST_HEAD:
            error = RequestError(431, Fault.HEAD_TOO_LARGE, "request head too large")
            raise error.blame(data, start + MAX_REQUEST_HEAD)


def _bad_request_line(data: bytes, start: int) -> RequestError:
    line_end = data.find(b"\r\n", start)
    length = (line_end if line_end >= 0 else len(data)) - start
    if length > MAX_REQUEST_LINE and b" " in data[start : start + 64]:
        error = RequestError(414, Fault.TARGET_TOO_LONG, "request target too long")
        return error.blame(data, data.index(b" ", start) + 1 + MAX_TARGET)
    if ANY_VERSION.match(data, start) is not None:
        version = data[line_end - 3 : line_end]
        if version not in (b"1.0", b"1.1"):
            error = RequestError(505, Fault.VERSION, "only HTTP/1.0 and HTTP/1.1 are served")
            return error.blame(data, blame.in_request_line(data, start))
    error = RequestError(400, Fault.REQUEST_LINE, "malformed request line")
    return error.blame(data, blame.in_request_line(data, start))
