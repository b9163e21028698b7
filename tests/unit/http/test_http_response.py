"""ResponseParser and ResponseForm: framing on both sides, interim responses, and backends that misbehave."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tidegate.config.model import HeaderEdits
from tidegate.http import limits
from tidegate.http.answering import ResponseForm, must_close
from tidegate.http.edits import Edits
from tidegate.http.errors import Fault, ResponseError
from tidegate.http.reader import BODY, COMPLETE, FAILED, HEAD, TUNNEL
from tidegate.http.request import Request, RequestParser, RequestRules
from tidegate.http.response import CHUNKED, CLOSE, LENGTH, NO_BODY, ResponseMemo, ResponseParser
from tidegate.http.stamps import DateField

DATE = b"\r\nDate: Mon, 23 Nov 2026 22:13:00 GMT"
NOW = 1795471980.0


def request(method: bytes = b"GET", version: bytes = b"1.1", lines: bytes = b"") -> Request:
    parsed = RequestParser(RequestRules(b"http")).receive_head(
        b"%b / HTTP/%b\r\nHost: a\r\n%b\r\n" % (method, version, lines)
    )
    assert parsed is not None
    return parsed


@dataclass(slots=True)
class Relayed:
    out: bytes
    parser: ResponseParser
    closes: bool
    statuses: list[int]


def relay(pieces: list[bytes], asked: Request, *, end: bool = False) -> Relayed:
    """What a client gets of a backend's bytes, as a session would pass them on."""
    parser = ResponseParser(ResponseMemo())
    parser.start(asked)
    form = ResponseForm(DateField(lambda: NOW))
    out, closes, statuses = b"", False, []
    for piece in pieces:
        data = piece
        while parser.state == HEAD:
            response = parser.receive_head(data)
            data = b""
            if response is None:
                break
            statuses.append(response.status)
            if not response.interim:
                closes = must_close(asked, parser)
            out += form.head(response, parser, asked, closes)
        if parser.state == BODY:
            out += parser.receive_body(data)
    if end:
        out += parser.end()
    return Relayed(out, parser, closes, statuses)


def each_way(data: bytes) -> list[list[bytes]]:
    return [[data], [data[:1], data[1:]], [data[at : at + 1] for at in range(len(data))]]


def dechunk(body: bytes) -> bytes:
    out = b""
    while True:
        size, _, body = body.partition(b"\r\n")
        if int(size, 16) == 0:
            assert body == b"\r\n"
            return out
        out += body[: int(size, 16)]
        body = body[int(size, 16) + 2 :]


CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
HEAD_LINES = b"HTTP/1.1 200 OK\r\nServer: x" + DATE


@pytest.mark.parametrize("way", range(3))
def test_known_length(way: int) -> None:
    data = HEAD_LINES + b"\r\nContent-Length: 5\r\nConnection: keep-alive\r\nKeep-Alive: 5\r\n\r\nhello"
    relayed = relay(each_way(data)[way], request())
    assert relayed.out == HEAD_LINES + b"\r\nContent-Length: 5\r\n\r\nhello"
    assert relayed.parser.framing == LENGTH
    assert relayed.parser.free and not relayed.closes


@pytest.mark.parametrize("way", range(3))
def test_chunked_with_trailers(way: int) -> None:
    data = HEAD_LINES + b"\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-Sum: 1\r\nAge: 2\r\n\r\n"
    relayed = relay(each_way(data)[way], request())
    head, _, body = relayed.out.partition(b"\r\n\r\n")
    assert head == HEAD_LINES + b"\r\nTransfer-Encoding: chunked"
    assert body.endswith(b"0\r\nX-Sum: 1\r\n\r\n")
    assert dechunk(body.replace(b"X-Sum: 1\r\n", b"")) == b"hello"
    assert relayed.parser.framing == CHUNKED
    assert relayed.parser.free and not relayed.closes


@pytest.mark.parametrize("way", range(3))
def test_chunked_for_a_client_of_http_1_0(way: int) -> None:
    data = HEAD_LINES + b"\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n"
    asked = request(version=b"1.0", lines=b"Connection: keep-alive\r\n")
    relayed = relay(each_way(data)[way], asked)
    assert relayed.out == HEAD_LINES + b"\r\nConnection: close\r\n\r\nhello"
    assert relayed.parser.framing == CLOSE and relayed.closes and relayed.parser.free


@pytest.mark.parametrize("way", range(3))
def test_a_body_that_ends_with_the_connection(way: int) -> None:
    data = HEAD_LINES + b"\r\n\r\nhello"
    relayed = relay(each_way(data)[way], request(), end=True)
    head, _, body = relayed.out.partition(b"\r\n\r\n")
    assert head == HEAD_LINES + b"\r\nTransfer-Encoding: chunked"
    assert dechunk(body) == b"hello"
    assert relayed.parser.state == COMPLETE and not relayed.parser.free and not relayed.closes
    relayed = relay(each_way(data)[way], request(version=b"1.0"), end=True)
    assert relayed.out == HEAD_LINES + b"\r\nConnection: close\r\n\r\nhello"
    assert relayed.closes


@pytest.mark.parametrize(
    ("method", "head", "expected"),
    [
        (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 9", b"\r\nContent-Length: 9"),
        (b"HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked", b"\r\nTransfer-Encoding: chunked"),
        (b"GET", b"HTTP/1.1 204 No Content\r\nX: y", b""),
        (b"GET", b"HTTP/1.1 204 No Content\r\nContent-Length: 0", b""),
        (b"GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9", b"\r\nContent-Length: 9"),
    ],
)
def test_responses_without_a_body(method: bytes, head: bytes, expected: bytes) -> None:
    asked = request(method)
    relayed = relay([head + DATE + b"\r\n\r\n"], asked)
    status_line = head.split(b"\r\n")[0]
    kept = b"\r\nX: y" if b"X: y" in head else b""
    assert relayed.out == status_line + kept + DATE + expected + b"\r\n\r\n"
    assert relayed.parser.framing == NO_BODY and relayed.parser.free


@pytest.mark.parametrize("way", range(3))
def test_interim_responses_come_before_the_final_one(way: int) -> None:
    data = (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
        + HEAD_LINES
        + b"\r\nContent-Length: 2\r\n\r\nok"
    )
    relayed = relay(each_way(data)[way], request())
    assert relayed.statuses == [100, 103, 200]
    assert relayed.out == data
    assert relayed.parser.free


def test_interim_responses_are_nothing_to_http_1_0() -> None:
    data = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + HEAD_LINES + b"\r\nContent-Length: 2\r\n\r\nok"
    relayed = relay([data], request(version=b"1.0"))
    assert relayed.out == HEAD_LINES + b"\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"


def test_an_upgrade_that_does_not_say_to_what() -> None:
    asked = request(lines=b"Connection: upgrade\r\nUpgrade: websocket\r\n")
    relayed = relay([b"HTTP/1.1 101 Switching Protocols\r\n\r\n"], asked)
    assert relayed.out.endswith(b"\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")


def test_an_upgrade() -> None:
    asked = request(lines=b"Connection: upgrade\r\nUpgrade: websocket\r\n")
    head = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nX: y\r\n\r\n"
    relayed = relay([head + b"\x81\x00"], asked)
    assert relayed.out == (
        b"HTTP/1.1 101 Switching Protocols\r\nX: y\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    )
    assert (relayed.parser.state, relayed.parser.rest) == (TUNNEL, b"\x81\x00")


def test_an_upgrade_refused_is_a_response_like_any() -> None:
    asked = request(lines=b"Connection: upgrade\r\nUpgrade: websocket\r\n")
    relayed = relay([b"HTTP/1.1 400 No\r\nContent-Length: 0\r\n\r\n"], asked)
    assert relayed.parser.free


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", Fault.UNASKED),
        (b"garbage\r\n\r\n", Fault.STATUS_LINE),
        (b"\x00\x01", Fault.STATUS_LINE),
        (b"HTTP/2.0 200 OK\r\n\r\n", Fault.STATUS_LINE),
        (b"HTTP/1.1 20 OK\r\n\r\n", Fault.STATUS_LINE),
        (b"HTTP/1.1 099 OK\r\n\r\n", Fault.STATUS_LINE),
        (b"HTTP/1.1  200 OK\r\n\r\n", Fault.STATUS_LINE),
        (b"HTTP/1.1 200 OK\n\n", Fault.STATUS_LINE),
        (b"HTTP/1.1 200 OK\r\nX: a\n\r\n", Fault.HEADER),
        (b"HTTP/1.1 200 OK\r\nX : a\r\n\r\n", Fault.HEADER),
        (b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n", Fault.HEADER),
        (b"HTTP/1.1 200 OK\r\nX: a\x00\r\n\r\n", Fault.HEADER),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n", Fault.FRAMING),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\n", Fault.FRAMING),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", Fault.FRAMING),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", Fault.FRAMING),
        (b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", Fault.FRAMING),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", Fault.CODING),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
            Fault.CODING,
        ),
        (b"HTTP/1.1 100 Continue\r\nContent-Length: 5\r\n\r\n", Fault.FRAMING),
        (CHUNKED_HEAD + b"xyz\r\n", Fault.BODY),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 16 + b"\r\n",
            Fault.BODY_TOO_LARGE,
        ),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 300 + b"\r\n", Fault.HEAD_TOO_LARGE),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * (limits.MAX_INTERIM + 1), Fault.INTERIM),
    ],
)
def test_broken_responses(data: bytes, fault: Fault) -> None:
    for way in each_way(data):
        with pytest.raises(ResponseError) as caught:
            relay(way, request())
        assert (caught.value.status, caught.value.fault) == (502, fault)


def test_a_head_without_end() -> None:
    begin = b"HTTP/1.1 200 OK\r\nX: "
    with pytest.raises(ResponseError) as caught:
        relay([begin + b"x" * (limits.MAX_RESPONSE_HEAD - len(begin) + 1)], request())
    error = caught.value
    assert (error.fault, error.base + error.at) == (Fault.HEAD_TOO_LARGE, limits.MAX_RESPONSE_HEAD)


@pytest.mark.parametrize("reason", [b"", b" ", b" Fine & dandy", b" \xe4"])
def test_reason_phrases(reason: bytes) -> None:
    for way in each_way(b"HTTP/1.1 200%b%b\r\nContent-Length: 0\r\n\r\n" % (reason, DATE)):
        relayed = relay(way, request())
        assert relayed.out.startswith(b"HTTP/1.1 200 " + reason[1:] + b"\r\n")


@pytest.mark.parametrize(
    ("data", "left"),
    [
        (b"", HEAD),
        (b"HTTP/1.1 200 O", HEAD),
        (b"HTTP/1.1 100 Continue\r\n\r\n", HEAD),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell", BODY),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", BODY),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n", BODY),
    ],
)
def test_a_response_shorter_than_declared_is_a_cut(data: bytes, left: int) -> None:
    relayed = relay([data], request())
    assert relayed.parser.state == left
    assert relayed.parser.untouched is (data == b"")
    with pytest.raises(ResponseError) as caught:
        relayed.parser.end()
    assert caught.value.fault is Fault.CUT
    assert relayed.parser.state == FAILED and not relayed.parser.free


def test_a_response_longer_than_declared_stands_but_its_connection_does_not() -> None:
    relayed = relay([HEAD_LINES + b"\r\nContent-Length: 5\r\n\r\nhello, world"], request())
    assert relayed.out.endswith(b"\r\n\r\nhello")
    assert relayed.parser.surplus and not relayed.parser.free
    with pytest.raises(ValueError):
        relayed.parser.start(request())


def test_bytes_without_a_request() -> None:
    parser = ResponseParser(ResponseMemo())
    with pytest.raises(ResponseError) as caught:
        parser.receive_head(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
    assert caught.value.fault is Fault.UNASKED
    assert parser.state == FAILED


@pytest.mark.parametrize(
    ("line", "reusable"),
    [
        (b"HTTP/1.1 200 OK\r\n", True),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n", False),
        (b"HTTP/1.1 200 OK\r\nConnection: Close, x\r\n", False),
        (b"HTTP/1.0 200 OK\r\n", False),
        (b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\n", True),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive, x\r\n", True),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nConnection: close\r\n", False),
    ],
)
def test_whether_the_backend_stays(line: bytes, reusable: bool) -> None:
    assert relay([line + b"Content-Length: 0\r\n\r\n"], request()).parser.free is reusable


def test_hop_by_hop_fields_go_and_the_rest_keeps_its_form() -> None:
    data = (
        b"HTTP/1.1 200 OK\r\nX-b: 1\r\nConnection: x-hop, close\r\nX-Hop: 1\r\nx-B: 2\r\n"
        b"Proxy-Connection: a\r\nUpgrade: h2c\r\nSet-Cookie: a=b\r\nSet-Cookie: c=d"
        + DATE
        + b"\r\nContent-Length: 0\r\n\r\n"
    )
    assert relay([data], request()).out == (
        b"HTTP/1.1 200 OK\r\nX-b: 1\r\nx-B: 2\r\nSet-Cookie: a=b\r\nSet-Cookie: c=d"
        + DATE
        + b"\r\nContent-Length: 0\r\n\r\n"
    )


def test_a_missing_date_is_added() -> None:
    relayed = relay([b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"], request())
    assert relayed.out == b"HTTP/1.1 200 OK" + DATE + b"\r\nContent-Length: 0\r\n\r\n"


def test_connection_fields_for_the_client() -> None:
    data = HEAD_LINES + b"\r\nContent-Length: 0\r\n\r\n"
    old = request(version=b"1.0", lines=b"Connection: keep-alive\r\n")
    assert b"\r\nConnection: keep-alive\r\n" in relay([data], old).out
    leaving = request(lines=b"Connection: close\r\n")
    relayed = relay([data], leaving)
    assert b"\r\nConnection: close\r\n" in relayed.out and relayed.closes


def test_edits_and_extra_lines_do_not_stick_to_the_memo() -> None:
    memo = ResponseMemo()
    form = ResponseForm(DateField(lambda: NOW))
    edits = Edits(HeaderEdits(set=(("Server", "y"),), remove=("X-Gone",)))
    data = HEAD_LINES + b"\r\nX-Gone: 1\r\nContent-Length: 0\r\n\r\n"
    outs = []
    for changed in (None, edits, None):
        parser = ResponseParser(memo)
        asked = request()
        parser.start(asked)
        response = parser.receive_head(data)
        assert response is not None
        extra = b"\r\nSet-Cookie: s=1" if changed else b""
        outs.append(form.head(response, parser, asked, False, changed, extra))
    assert outs[0] == outs[2] == data
    assert b"X-Gone" not in outs[1] and outs[1].count(b"Server: ") == 1
    assert b"\r\nServer: y\r\n" in outs[1] and outs[1].endswith(b"\r\nSet-Cookie: s=1\r\n\r\n")


def test_one_connection_serves_many_requests() -> None:
    parser = ResponseParser(ResponseMemo())
    data = HEAD_LINES + b"\r\nContent-Length: 2\r\n\r\nok"
    for method in (b"GET", b"HEAD", b"GET"):
        parser.start(request(method))
        assert parser.receive_head(data if method == b"GET" else data[:-2]) is not None
        if method == b"GET":
            assert parser.receive_body(b"") == b"ok"
        assert parser.free


SAME = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"


@pytest.mark.parametrize(
    ("before", "data", "method", "taken"),
    [
        (SAME, SAME, b"GET", True),
        (SAME, SAME.replace(b"abc", b"xyz"), b"GET", True),
        (SAME, SAME[:-1], b"GET", False),  # not whole
        (SAME, SAME + b"d", b"GET", False),  # more than whole
        (SAME, SAME.replace(b"200 OK", b"404 OK"), b"GET", False),
        (SAME, SAME.replace(b": 3", b": 2").replace(b"OK", b"OKK").replace(b"abc", b"ab"), b"GET", False),
        (SAME, SAME, b"HEAD", False),  # the body is then the next response's, and none is owed
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\n\r\n", SAME, b"GET", False),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", SAME, b"GET", False),
    ],
)
def test_a_response_like_the_one_before_is_taken_whole(
    before: bytes, data: bytes, method: bytes, taken: bool
) -> None:
    parser = ResponseParser(ResponseMemo())
    parser.start(request())
    parser.receive_head(before)
    if parser.state == BODY:
        parser.receive_body(b"")
    parser.start(request(method))
    at = parser.same_again(data)
    assert bool(at) is taken
    if taken:
        assert (data[at:], parser.state, parser.free) == (data[-3:], COMPLETE, True)
        assert parser.framing == LENGTH and parser.last is not None and parser.last.status == 200
        assert parser.same_again(data) == 0  # no request is outstanding
    else:
        assert parser.state == HEAD


def test_a_response_that_closes_closes_when_it_comes_again() -> None:
    closing = SAME.replace(b"Content", b"Connection: close\r\nContent")
    parser = ResponseParser(ResponseMemo())
    parser.start(request())
    parser.receive_head(closing)
    parser.receive_body(b"")
    parser.start(request())
    assert parser.same_again(closing)
    assert not parser.free
