"""The fields of a request head that framing, routing and forwarding depend on, read once per block.

A block's reading depends on its bytes alone, so it is remembered: a client that sends the same fields again
(they differ in the request line only) costs one comparison, and any client of the worker one dict lookup.
"""

from __future__ import annotations

import re
from typing import Final

from tidegate.http import blame
from tidegate.http.errors import Fault, RequestError
from tidegate.http.head import BLOCK, REQUEST_BLOCK, TOKEN_CHAR, SecondOpinion, parse_authority
from tidegate.http.limits import (
    MAX_FIELD_LINES,
    MAX_LENGTH_DIGITS,
    MAX_REQUEST_ID,
    MEMO_BLOCK,
    MEMO_ENTRIES,
)

# Lower-case blocks only. "_" beside "-": CGI, WSGI and Rack make one variable of both spellings, so a name
# that we generate or refuse would come back through the other door.
_SPECIAL: Final = re.compile(
    rb"\r\n(h(?:ost|ttp2-settings)|c(?:on(?:nection|tent[-_]length)|ookie)|t(?:e|ransfer[-_]encoding)"
    rb"|keep-alive|proxy[-_](?:connection|authorization)|upgrade|expect|max-forwards|authorization"
    rb"|forwarded|x[-_](?:forwarded[-_]" + TOKEN_CHAR + rb"+|request[-_](?:id|start)|queue[-_]age[-_]ms))"
    rb":[ \t]*([^\r]*)"
)
_CODINGS: Final = re.compile(TOKEN_CHAR + rb"+(?:[ \t]*,[ \t]*" + TOKEN_CHAR + rb"+)*")
_PROTOCOLS: Final = re.compile(
    rb"%b+(?:/%b+)?(?:[ \t]*,[ \t]*%b+(?:/%b+)?)*" % (TOKEN_CHAR, TOKEN_CHAR, TOKEN_CHAR, TOKEN_CHAR)
)
REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._~+/=:@\-]{1,%d}" % MAX_REQUEST_ID)

# Connection may name these: they are removed, or generated, anyway.
_KNOWN_OPTIONS: Final = frozenset(
    b"close keep-alive upgrade te host connection content-length transfer-encoding proxy-connection expect "
    b"http2-settings".split()
)


class RequestFields:
    """One validated block of request fields. Never changed once made; shared between requests."""

    __slots__ = (
        "authority",
        "block",
        "chunked",
        "close",
        "coded",
        "content_length",
        "expect",
        "forward",
        "host",
        "keep_alive",
        "max_forwards",
        "port",
        "request_id",
        "secret",
        "te_trailers",
        "upgrade",
    )

    def __init__(self, block: bytes) -> None:
        self.block = block  # as received
        # What goes on to the backend: b"\r\nName: value" lines, in order, case and repetition kept, without
        # hop-by-hop fields, Host, framing, Expect, and what only trusted peers may say.
        self.forward = b""
        self.authority: bytes | None = None  # Host as sent; None when there is none
        self.host = b""  # its name in matching form
        self.port: int | None = None
        self.content_length = -1  # -1: not given
        self.chunked = False
        self.coded = False  # a Transfer-Encoding field is there
        self.close = False
        self.keep_alive = False  # said so; what it means depends on the version
        self.expect = False  # 100-continue
        self.upgrade = b""  # protocols asked for with Connection: upgrade, h2c left out
        self.te_trailers = False
        self.max_forwards: int | None = None
        self.request_id = b""  # a well-formed one, which stays in `forward`
        self.secret = False  # holds credentials: not remembered beyond its connection


class FieldsMemo:
    """Readings of recent blocks, per worker and listener; bounded, dropped whole when full."""

    __slots__ = ("_known", "_opinion")

    def __init__(self) -> None:
        self._known: dict[bytes, RequestFields] = {}
        self._opinion = SecondOpinion()

    def read(self, block: bytes) -> RequestFields:
        """The reading of a block. Raises RequestError."""
        known = self._known.get(block)
        if known is not None:
            return known
        fields = read_fields(block)
        has_body = fields.chunked or fields.content_length > 0
        if not self._opinion.request_block(block, has_body):
            error = RequestError(400, Fault.SECOND_OPINION, "head refused by the second parser")
            raise error.blame(block, blame.second_request(block))
        if len(block) <= MEMO_BLOCK and not fields.secret:
            if len(self._known) >= MEMO_ENTRIES:
                self._known.clear()
            self._known[block] = fields
        return fields


def read_fields(block: bytes) -> RequestFields:
    """Validate and read a block. Raises RequestError."""
    if REQUEST_BLOCK.fullmatch(block) is None:
        if BLOCK.fullmatch(block) is not None:
            error = RequestError(431, Fault.HEAD_TOO_LARGE, "too many header fields")
            raise error.blame(block, blame.in_line(block, MAX_FIELD_LINES))
        error = RequestError(400, Fault.HEADER, "malformed header line")
        raise error.blame(block, blame.in_block(block))
    fields = RequestFields(block)
    kept = []
    last = 0
    upgrade: list[bytes] = []
    options: list[bytes] = []
    ids = 0
    try:
        for found in _SPECIAL.finditer(block.lower()):
            name, value = found.groups()
            if name == b"cookie" or name == b"authorization":
                fields.secret = True
                continue
            value = value.rstrip(b" \t")
            if name == b"host":
                _read_host(fields, block[found.start(2) : found.start(2) + len(value)])
            elif name == b"connection":
                if value == b"keep-alive":
                    fields.keep_alive = True
                else:
                    options += [option.strip(b" \t") for option in value.split(b",")]
            elif name == b"content-length":
                _read_length(fields, value)
            elif name == b"transfer-encoding":
                # A tab behind it is optional whitespace to us, part of the value to llhttp: refused.
                _read_coding(fields, found[2].rstrip(b" "))
            elif name == b"expect":
                if value != b"100-continue":
                    error = RequestError(417, Fault.EXPECTATION, "only 100-continue can be expected")
                    raise error.blame(value, blame.departs(value, 0, b"100-continue"))
                fields.expect = True
            elif name == b"upgrade":
                upgrade.append(block[found.start(2) : found.start(2) + len(value)])
            elif name == b"x-request-id":
                ids += 1
                original = block[found.start(2) : found.start(2) + len(value)]
                if ids == 1 and REQUEST_ID.fullmatch(original) is not None:
                    fields.request_id = original
                    continue
            elif name == b"max-forwards":
                fields.max_forwards = int(value) if value.isdigit() and len(value) < 10 else None
                continue
            elif name == b"te":
                fields.te_trailers |= any(part.strip(b" \t") == b"trailers" for part in value.split(b","))
            elif name == b"content_length" or name == b"transfer_encoding":
                error = RequestError(400, Fault.FRAMING, "a framing field spelled with an underscore")
                raise error.blame(block, block.index(b"_", found.start(1)))
            kept.append(block[last : found.start()])
            last = found.end()
    except RequestError as refusal:
        refusal.within(block, found.start(2))
        raise
    kept.append(block[last:-4])
    fields.forward = b"".join(kept)
    if fields.coded and fields.content_length >= 0:
        error = RequestError(400, Fault.FRAMING, "both Content-Length and Transfer-Encoding")
        raise error.blame(block, blame.in_value_of(block, b"content-length", b"transfer-encoding"))
    if ids > 1 and fields.request_id:
        fields.forward = remove_fields(fields.forward, frozenset({b"x-request-id"}))
        fields.request_id = b""
    if options:
        _apply_options(fields, options, upgrade)
    return fields


def _read_host(fields: RequestFields, value: bytes) -> None:
    if fields.authority is not None:
        raise RequestError(400, Fault.HOST, "more than one Host field").blame(value, 0)
    parsed = parse_authority(value)
    if parsed is None:
        raise RequestError(400, Fault.HOST, "malformed Host").blame(value, blame.in_authority(value))
    fields.authority = value
    fields.host, fields.port = parsed


def _read_length(fields: RequestFields, value: bytes) -> None:
    # Equal repetitions too: RFC 9112 6.3 lets a recipient choose, and no honest client sends them.
    if fields.content_length >= 0:
        raise RequestError(400, Fault.FRAMING, "more than one Content-Length").blame(value, 0)
    if not value.isdigit():
        error = RequestError(400, Fault.FRAMING, "malformed Content-Length")
        raise error.blame(value, blame.in_length(value))
    if len(value) > MAX_LENGTH_DIGITS:
        error = RequestError(413, Fault.BODY_TOO_LARGE, "Content-Length out of range")
        raise error.blame(value, blame.in_length(value))
    fields.content_length = int(value)


def _read_coding(fields: RequestFields, value: bytes) -> None:
    if fields.coded:
        raise RequestError(400, Fault.FRAMING, "more than one Transfer-Encoding field").blame(value, 0)
    fields.coded = True
    if value == b"chunked":
        fields.chunked = True
        return
    codings = [coding.strip(b" \t") for coding in value.split(b",")]
    if (
        _CODINGS.fullmatch(value) is not None
        and codings[-1] == b"chunked"
        and codings.count(b"chunked") == 1
        and b"identity" not in codings
    ):
        raise RequestError(501, Fault.CODING, "a transfer coding other than chunked").blame(value, 0)
    error = RequestError(400, Fault.FRAMING, "malformed Transfer-Encoding, or chunked is not last")
    raise error.blame(value, blame.in_codings(value))


def _apply_options(fields: RequestFields, options: list[bytes], upgrade: list[bytes]) -> None:
    fields.close = b"close" in options
    fields.keep_alive |= b"keep-alive" in options
    if upgrade and b"upgrade" in options and _PROTOCOLS.fullmatch(b", ".join(upgrade)) is not None:
        # h2c would carry further requests past every rule here, inside the tunnel.
        wanted = [part.strip(b" \t") for part in b",".join(upgrade).split(b",")]
        fields.upgrade = b", ".join(part for part in wanted if part.lower() != b"h2c")
    named = frozenset(options) - _KNOWN_OPTIONS
    if named:
        fields.forward = remove_fields(fields.forward, named)
        if b"x-request-id" in named:
            fields.request_id = b""


def remove_fields(lines: bytes, names: frozenset[bytes]) -> bytes:
    """b"\\r\\nName: value" lines without those of the given lower-case names."""
    return b"".join(
        b"\r\n" + line for line in lines.split(b"\r\n")[1:] if line[: line.index(b":")].lower() not in names
    )
