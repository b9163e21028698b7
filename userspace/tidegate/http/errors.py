"""Peer errors: what a client or a backend did wrong, with the status to answer and the reason to log.

The split follows h11: one root, one class per guilty side, the suggested status inside the exception.
After one was raised the parser it came from is spent: the session answers (or not), then closes.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class Fault(StrEnum):
    """Why a peer's bytes were refused: the closed list that logs and metrics use."""

    REQUEST_LINE = "request_line"  # not `method SP target SP HTTP/1.x`
    VERSION = "version"  # an HTTP version other than 1.0 and 1.1
    HEADER = "header"  # a line outside the grammar: folding, bare CR or LF, control bytes, space before ":"
    HEAD_TOO_LARGE = "head_too_large"  # head or trailer section over its limit in bytes or lines
    TARGET_TOO_LONG = "target_too_long"
    TARGET = "target"  # a request target that is no valid form for the method
    HOST = "host"  # missing, repeated, malformed, or at odds with the target
    MISDIRECTED = "misdirected"  # an absolute target of another scheme than the listener's
    METHOD = "method"  # CONNECT, or TRACE with a body
    FRAMING = "framing"  # Content-Length and Transfer-Encoding that leave the length in doubt
    CODING = "coding"  # a transfer coding other than chunked
    EXPECTATION = "expectation"  # Expect other than 100-continue
    AMBIGUOUS_PATH = "ambiguous_path"  # two readings of the path lead to two routes
    BODY = "body"  # chunk size, extension, delimiter or trailer outside the grammar
    BODY_TOO_LARGE = "body_too_large"  # a length that no 63-bit counter holds
    STATUS_LINE = "status_line"  # not `HTTP/1.x SP code [SP reason]`
    CUT = "cut"  # the connection ended inside a message
    UNASKED = "unasked"  # bytes from a backend that owes no response, or an upgrade nobody asked for
    INTERIM = "interim"  # more 1xx responses than any use of them explains
    PROXY_HEADER = "proxy_header"  # a PROXY protocol header that is missing, malformed or fails its checksum
    NOT_TRUSTED = "not_trusted"  # a PROXY header is expected, and the peer is in no `trusted` network
    SECOND_OPINION = "second_opinion"  # llhttp reads the head otherwise than we do


class PeerError(Exception):
    """A peer broke the protocol.

    `status` is the answer to the client (for a backend's fault too, as long as no byte of a response was
    sent), `fault` the reason for log and metric, the message a sentence without the peer's bytes in it.

    Where a byte is to blame, it is `data[at]`, and `data` begins `base` bytes behind the begin of the head,
    of the chunked body or of the PROXY header. `at` is -1 where something is missing or at odds as a whole.
    """

    __slots__ = ("at", "base", "data", "fault", "message", "status")

    def __init__(self, status: int, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.fault = fault
        self.message = message
        self.data = b""
        self.at = -1
        self.base = 0

    def blame(self, data: bytes, at: int, base: int = 0) -> Self:
        """Name the byte; returns the error, to be raised."""
        self.data = data
        self.at = at
        self.base = base
        return self

    def within(self, data: bytes, offset: int) -> None:
        """What was blamed stands `offset` bytes into `data`, if it was not blamed in `data` itself."""
        if self.data is not data:
            self.data = data
            self.at = self.at + offset if self.at >= 0 else -1


class RequestError(PeerError):
    """The client's request is refused; its connection is closed after the answer."""

    __slots__ = ()


class ResponseError(PeerError):
    """The backend's response is unusable: 502 before the head was passed on, a cut after it."""

    __slots__ = ()

    def __init__(self, fault: Fault, message: str, status: int = 502) -> None:
        super().__init__(status, fault, message)
