"""Generated and mutated requests: what we forward, parsers written apart from ours read the same.

Two comparisons. Out: what reaches a backend is read by three other readers as exactly as many requests as we
forwarded. In: where llhttp reads the client's bytes too, it must find the same requests in them; where it
refuses what we took, there must be a reason on a short list.
"""

from __future__ import annotations

import re

import httptools
from corpus.generate import CHANGES, SEEDS, SPACES, VALUES, mutate, requests
from corpus.replay import Played, play, understood, whole_part
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tidegate.http.errors import Fault, RequestError, ResponseError
from tidegate.http.fields import read_fields
from tidegate.http.head import STATUS_LINE, SecondOpinion
from tidegate.http.response import read_response

STATUS = STATUS_LINE.match(b"HTTP/1.1 200 OK\r\n")
assert STATUS is not None


class Reading:
    """The requests llhttp finds in a client's bytes, up to where it stops."""

    def __init__(self, data: bytes) -> None:
        self.done: list[tuple[str, bytes]] = []
        self.refused = False
        self._parser = httptools.HttpRequestParser(self)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.refused = True
        except httptools.HttpParserError:
            self.refused = True

    def on_message_begin(self) -> None:
        self._body = b""

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self.done.append((self._parser.get_method().decode(), self._body))


def check(data: bytes) -> Played:
    played = play([data])
    by_bytes = play([data[at : at + 1] for at in range(len(data))])
    assert by_bytes.whole == played.whole
    assert (by_bytes.error is None) == (played.error is None)
    if played.error is not None and by_bytes.error is not None:
        assert by_bytes.error.status == played.error.status
    # Our own grammar is the stricter one: the second parser is a net, and nothing has fallen into it.
    assert played.error is None or played.error.fault is not Fault.SECOND_OPINION
    assert by_bytes.requests == played.requests or played.error is not None

    seen = understood(whole_part(played))
    assert len(seen) == played.whole
    assert [(one.method, one.values("host")) for one in seen] == [
        (method.decode(), one.values("host"))
        for (method, _, _), one in zip(played.requests, seen, strict=False)
    ]
    reading = Reading(data)
    bodies = [(one.method, one.body) for one in seen]
    if reading.refused and len(reading.done) < len(bodies):
        assert explained(data), "llhttp refuses what we forward"
    else:
        assert reading.done[: len(bodies)] == bodies
    return played


def explained(data: bytes) -> bool:
    """Why llhttp may stop where we go on: upgrades, methods it has not heard of, and the bad whitespace of
    chunk extensions, which RFC 9112 7.1.1 has a recipient parse.
    """
    lowered = data.lower()
    methods = {
        line.split(b" ")[0] for line in data.split(b"\r\n") if line.endswith((b"HTTP/1.1", b"HTTP/1.0"))
    }
    known = {b"GET", b"POST", b"HEAD", b"PUT", b"OPTIONS", b"DELETE", b"TRACE", b"PATCH"}
    spaced = re.search(rb"\n[0-9A-Fa-f]+[ \t]*;[^\r\n]*[ \t]|\n[0-9A-Fa-f]+[ \t]+;", data)
    return b"upgrade" in lowered or bool(methods - known) or spaced is not None


@given(requests(), st.sampled_from([b"", b"GET /next HTTP/1.1\r\nHost: n\r\n\r\n"]))
@settings(max_examples=600, deadline=None)
@example(
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"GET /next HTTP/1.1\r\nHost: n\r\n\r\n",
)
def test_generated_requests(data: bytes, follower: bytes) -> None:
    check(data + follower)


@given(SEEDS, CHANGES)
@settings(max_examples=600, deadline=None)
def test_mutated_cases_of_the_corpus(data: bytes, changes: list[tuple[int, int, bytes]]) -> None:
    check(mutate(data, changes))


@given(requests(), requests())
@settings(max_examples=300, deadline=None)
def test_pipelined(first: bytes, second: bytes) -> None:
    alone = check(first)
    both = check(first + second)
    if alone.error is None and not alone.pending:
        # A request that stood alone stands with another behind it, and takes none of its bytes.
        assert both.requests[: len(alone.requests)] == alone.requests


BLOCK_NAMES = st.sampled_from(
    [
        b"Content-Length",
        b"Transfer-Encoding",
        b"Connection",
        b"Upgrade",
        b"Proxy-Connection",
        b"Keep-Alive",
        b"X-A",
    ]
)


@given(
    st.lists(
        st.tuples(BLOCK_NAMES, SPACES, VALUES, st.sampled_from([b"", b" ", b"\t ", b"\x80"])), max_size=5
    )
)
@settings(max_examples=1000, deadline=None)
def test_the_second_parser_takes_what_the_first_takes(lines: list[tuple[bytes, bytes, bytes, bytes]]) -> None:
    """Or clients would be refused for a reason that no rule of ours gives."""
    opinion = SecondOpinion()
    block = (
        b"".join(b"\r\n" + name + b":" + space + value + end for name, space, value, end in lines)
        + b"\r\n\r\n"
    )
    try:
        fields = read_fields(block)
    except RequestError:
        pass
    else:
        assert opinion.request_block(block, fields.chunked or fields.content_length > 0)
    try:
        read_response(STATUS, block)
    except ResponseError:
        return
    assert opinion.response_block(block)


def test_every_single_byte_in_every_place() -> None:
    """Each byte value put in for each byte of a request with a body: read alike by all, or refused."""
    data = b"POST /p HTTP/1.1\r\nHost: a\r\nX-B: c\r\nContent-Length: 2\r\n\r\nhi"
    forwarded = 0
    for at in range(len(data)):
        for byte in range(256):
            changed = data[:at] + bytes([byte]) + data[at + 1 :]
            played = play([changed])
            if played.whole and played.error is None and not played.pending:
                forwarded += 1
                seen = understood(played.sent)
                assert len(seen) == played.whole
                reading = Reading(changed)
                if not reading.refused:
                    assert reading.done == [(one.method, one.body) for one in seen]
                else:
                    assert at < 4, changed
    assert forwarded > 1000
