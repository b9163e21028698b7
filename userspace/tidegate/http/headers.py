"""The head a backend gets: written from what was parsed, with the client's other fields in one piece.

    METHOD target HTTP/1.1
    Host                                   generated
    the client's end-to-end fields         copied, validated, in their order and spelling
    framing, Expect, Connection, Upgrade   generated
    Via, X-Forwarded-*, Forwarded          generated, or continued for trusted peers
    X-Request-Id, X-Request-Start, ...     per request

All but the last line group is a function of head, connection and route, and is kept with the request.
"""

from __future__ import annotations

from typing import Final

from tidegate.http.cookies import strip_cookie
from tidegate.http.edits import Edits
from tidegate.http.fields import remove_fields
from tidegate.http.forwarded import Peer, continued_lines, fresh_lines
from tidegate.http.paths import behind_prefix
from tidegate.http.request import Request
from tidegate.http.stamps import RequestIds

# Which of the per-request fields a head ends with.
_ID: Final = 1
_START: Final = 2
_AGE: Final = 4
_ENDING_NAMES: Final = {b"x-request-id": _ID, b"x-request-start": _START, b"x-queue-age-ms": _AGE}


class Rewrite:
    """What a route changes in requests; None stands for "nothing"."""

    __slots__ = ("cookie", "edits", "host", "strip")

    def __init__(
        self, *, strip: bytes = b"", host: bytes = b"", cookie: bytes = b"", edits: Edits | None = None
    ) -> None:
        self.strip = strip  # a path prefix, without "/" at its end
        self.host = host  # the Host to send instead
        self.cookie = cookie  # the sticky cookie, which is ours and not the backend's
        self.edits = edits


class RequestForm:
    """Writes request heads for one listener."""

    __slots__ = ("_ends", "_ids", "_milliseconds", "_start", "_start_us", "_via10", "_via11")

    def __init__(self, *, via: str, request_start: str, queue_age: bool, ids: RequestIds) -> None:
        """`via`: our pseudonym, "" for none; `request_start`: "us", "ms" or "off"."""
        self._via10 = b"\r\nVia: 1.0 " + via.encode("ascii") if via else b""
        self._via11 = b"\r\nVia: 1.1 " + via.encode("ascii") if via else b""
        self._milliseconds = request_start == "ms"
        self._ends = _ID | (_START if request_start != "off" else 0) | (_AGE if queue_age else 0)
        self._ids = ids
        self._start_us = -1
        self._start = b""  # how a head ends that began then: those of one turn of the loop all did

    def head(
        self, request: Request, peer: Peer, rewrite: Rewrite | None, start_us: int, age_us: int = 0
    ) -> bytes:
        """The whole head, its empty line included; sets `request.id`.

        `start_us`: when the request began to wait, microseconds since the epoch; `age_us`: how long it has.
        """
        prefix = request.prefix
        if prefix is None or request.prefix_route is not rewrite or request.prefix_peer is not peer:
            prefix = self._prefix(request, peer, rewrite)
        ends = request.ends
        if ends & _ID:
            request.id = self._ids.make()
        else:
            request.id = request.fields.request_id
        if self._milliseconds:
            start_us //= 1000
        if ends == _ID | _START:
            if start_us != self._start_us:
                self._start_us = start_us
                self._start = b"\r\nX-Request-Start: t=%d\r\n\r\n" % start_us
            return b"".join((prefix, b"\r\nX-Request-Id: ", request.id, self._start))
        parts = [prefix]
        if ends & _ID:
            parts.append(b"\r\nX-Request-Id: " + request.id)
        if ends & _START:
            parts.append(b"\r\nX-Request-Start: t=%d" % start_us)
        if ends & _AGE:
            parts.append(b"\r\nX-Queue-Age-Ms: %d" % (age_us // 1000))
        parts.append(b"\r\n\r\n")
        return b"".join(parts)

    def _prefix(self, request: Request, peer: Peer, rewrite: Rewrite | None) -> bytes:
        fields = request.fields
        target = request.target
        host = request.authority or peer.local
        lines = fields.forward
        ends = self._ends
        if fields.request_id:
            ends &= ~_ID
        if fields.max_forwards is not None and request.method in (b"TRACE", b"OPTIONS"):
            lines = _one_forward_less(lines, fields.max_forwards)
        if peer.trusted:
            who, started = continued_lines(peer, request.authority, fields.block)
            if started:
                ends &= ~_START
        else:
            who = fresh_lines(peer, request.authority)
        who = (self._via10 if request.http10 else self._via11) + who
        if rewrite is not None:
            if rewrite.strip:
                target = strip_prefix(target, rewrite.strip)
            if rewrite.host:
                host = rewrite.host
            if rewrite.cookie and fields.secret:
                lines = strip_cookie(lines, rewrite.cookie)
            if rewrite.edits is not None:
                lines = rewrite.edits.apply(lines + who)
                who = b""
                for name, bit in _ENDING_NAMES.items():
                    if name in rewrite.edits.replaced:
                        ends &= ~bit
        prefix = b"%b %b HTTP/1.1\r\nHost: %b%b%b%b" % (
            request.method,
            target,
            host,
            lines,
            _framing(request),
            who,
        )
        request.prefix = prefix
        request.prefix_peer = peer
        request.prefix_route = rewrite
        request.ends = ends
        return prefix


def _framing(request: Request) -> bytes:
    """Generated fields on the message and the connection to the backend."""
    if request.chunked:
        lines = b"\r\nTransfer-Encoding: chunked"
    elif request.content_length >= 0:
        lines = b"\r\nContent-Length: %d" % request.content_length
    else:
        lines = b""
    if request.expect:
        lines += b"\r\nExpect: 100-continue"
    te_trailers = request.fields.te_trailers and not request.http10
    if request.upgrade:
        lines += b"\r\nConnection: upgrade%b\r\nUpgrade: %b" % (
            b", TE" if te_trailers else b"",
            request.upgrade,
        )
    elif te_trailers:
        lines += b"\r\nConnection: TE"
    return lines + b"\r\nTE: trailers" if te_trailers else lines


def strip_prefix(target: bytes, prefix: bytes) -> bytes:
    """The target without a path prefix that its route matched.

    Slashes that come to stand first are made one: "//x" as a target reads as an authority to some.
    """
    path, mark, query = target.partition(b"?")
    return b"/" + behind_prefix(path, prefix).lstrip(b"/") + mark + query


def _one_forward_less(lines: bytes, left: int) -> bytes:
    """Max-Forwards counted down (RFC 9110 7.6.2); the session answers a request that has none left."""
    lines = remove_fields(lines, frozenset({b"max-forwards"}))
    return lines + b"\r\nMax-Forwards: %d" % max(left - 1, 0)


def forwards_left(request: Request) -> bool:
    """False when Max-Forwards says that we are the recipient: answer, do not forward."""
    left = request.fields.max_forwards
    return left is None or left > 0 or request.method not in (b"TRACE", b"OPTIONS")
