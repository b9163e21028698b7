"""The grammar of HTTP/1.1 heads (RFC 9110 5, RFC 9112 2-5), one regex pass each, and host names.

A *block* is the bytes from the CRLF that ends the start line to the empty line's end:
b"\\r\\nA: b\\r\\nC: d\\r\\n\\r\\n". Stated so, every field line begins with CRLF, which regexes find fast.
Quantifiers over single characters are possessive: they never give back, so a pattern fails in linear time.
Those over groups are not: CPython before 3.11.5 leaves a possessive group in mid-iteration when it fails.
"""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import AddressValueError, IPv6Address
from typing import Final

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser, HttpResponseParser

from tidegate.http.limits import MAX_AUTHORITY, MAX_FIELD_LINES, MAX_RESPONSE_FIELD_LINES

TOKEN_CHAR: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"  # RFC 9110 5.6.2 tchar
VALUE_CHAR: Final = rb"[\t\x20-\x7e\x80-\xff]"  # RFC 9110 5.5: VCHAR, obs-text, SP, HTAB

TOKEN: Final = re.compile(TOKEN_CHAR + rb"++")
FIELD_LINE: Final = TOKEN_CHAR + rb"++:" + VALUE_CHAR + rb"*+\r\n"
FIELD_LINES: Final = re.compile(rb"(?:" + FIELD_LINE + rb")*")
BLOCK: Final = re.compile(rb"\r\n(?:" + FIELD_LINE + rb")*\r\n")
# The same with the limits on lines in it: counting them apart costs as much again.
REQUEST_BLOCK: Final = re.compile(rb"\r\n(?:" + FIELD_LINE + rb"){0,%d}\r\n" % MAX_FIELD_LINES)
RESPONSE_BLOCK: Final = re.compile(rb"\r\n(?:" + FIELD_LINE + rb"){0,%d}\r\n" % MAX_RESPONSE_FIELD_LINES)

# Any visible ASCII but "#", as HAProxy has it: RFC 3986 forbids more (<>\^`{|} and quotes), browsers send it.
TARGET_CHAR: Final = rb"[\x21\x22\x24-\x7e]"
REQUEST_LINE: Final = re.compile(
    rb"(" + TOKEN_CHAR + rb"++) (" + TARGET_CHAR + rb"++) HTTP/1\.([01])(?=\r\n)"
)

# The reason phrase and even the space before it are left out by enough backends to be let through.
STATUS_LINE: Final = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: (" + VALUE_CHAR + rb"*+))?(?=\r\n)")

# What can never become part of a valid head, for refusing a partial one before the rest (or nothing) comes.
NEVER_IN_HEAD: Final = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?!\n|\Z)")
# A start line as far as it has come.
REQUEST_LINE_START: Final = re.compile(
    TOKEN_CHAR
    + rb"++(?: (?:"
    + TARGET_CHAR
    + rb"++(?: (?:H(?:T(?:T(?:P(?:/(?:[0-9](?:\.(?:[0-9]\r?)?)?)?)?)?)?)?)?)?)?)?"
)
ANY_VERSION: Final = re.compile(TOKEN_CHAR + rb"++ " + TARGET_CHAR + rb"++ HTTP/[0-9]\.[0-9]\r\n")

# Unreserved characters only (RFC 3986 2.3): sub-delims and percent signs are legal in a reg-name, and no
# name that resolves has them; what they would be for is to make two parsers see two hosts.
_HOST: Final = re.compile(rb"(?:([A-Za-z0-9._~\-]++)|\[([0-9A-Fa-f:.]++)\])(?::([0-9]{0,5}))?")

DEFAULT_PORTS: Final = {b"http": 80, b"https": 443}


@lru_cache(maxsize=1024)
def parse_authority(authority: bytes) -> tuple[bytes, int | None] | None:
    """(host, port) of a Host value or URI authority, or None when it is malformed.

    The host is in the form routes match on: lower case, no trailing dot, IPv6 compressed and in brackets.
    Userinfo, percent-encoding, zone ids, port 0 and ports over 65535 are malformed here; an empty port
    ("a.example:") is none.
    """
    if len(authority) > MAX_AUTHORITY:
        return None
    found = _HOST.fullmatch(authority)
    if found is None:
        return None
    name, literal, digits = found.groups()
    port: int | None = None
    if digits:
        port = int(digits)
        if not 0 < port < 65536:
            return None
    if literal is not None:
        try:
            return b"[" + str(IPv6Address(literal.decode("ascii"))).encode() + b"]", port
        except AddressValueError:
            return None
    host: bytes = name.lower()
    if host.endswith(b"."):
        host = host[:-1]
    if not host:
        return None
    return host, port


class _Heard:
    """Counts what llhttp saw of the last message."""

    __slots__ = ("bodies_ended", "heads_ended")

    def __init__(self) -> None:
        self.heads_ended = 0
        self.bodies_ended = 0

    def on_headers_complete(self) -> None:
        self.heads_ended += 1

    def on_message_complete(self) -> None:
        self.bodies_ended += 1


class SecondOpinion:
    """llhttp, strict, over each block that our own grammar accepted.

    Two parsers written apart must both take a block before a byte of it is forwarded, and must agree on
    whether a body follows. Only blocks are shown to it, behind a start line of ours: it knows a fixed list
    of methods, and start lines are short enough for one grammar. Each block gets a new parser (0.3 us): what
    an earlier one left in it must not decide about the next.
    """

    __slots__ = ("_heard",)

    def __init__(self) -> None:
        self._heard = _Heard()

    def request_block(self, block: bytes, has_body: bool) -> bool:
        """True if llhttp takes the block as an HTTP/1.1 request's, with a body just when `has_body`."""
        heard = self._heard
        heard.heads_ended = heard.bodies_ended = 0
        try:
            HttpRequestParser(heard).feed_data(b"POST / HTTP/1.1" + block)
        except HttpParserUpgrade:
            # For an upgrade it leaves the body to its user, so there is nothing to agree on.
            return heard.heads_ended == 1
        except HttpParserError:
            return False
        return heard.heads_ended == 1 and (heard.bodies_ended == 0) == has_body

    def response_block(self, block: bytes) -> bool:
        """True if llhttp takes the block as a response's."""
        heard = self._heard
        heard.heads_ended = 0
        try:
            HttpResponseParser(heard).feed_data(b"HTTP/1.1 200 OK" + block)
        except HttpParserUpgrade:
            pass
        except HttpParserError:
            return False
        return heard.heads_ended == 1
