"""RequestParser: where one request ends and the next begins, what is kept between them, what is refused."""

from __future__ import annotations

import contextlib

import pytest

from tidegate.http import limits
from tidegate.http.errors import Fault, RequestError
from tidegate.http.fields import FieldsMemo
from tidegate.http.reader import BODY, COMPLETE, FAILED, HEAD
from tidegate.http.request import RequestParser, RequestRules

GET = b"GET /x?q HTTP/1.1\r\nHost: a.example\r\nX-A: 1\r\n\r\n"
POST = b"POST /p HTTP/1.1\r\nHost: a.example\r\nContent-Length: 5\r\n\r\n"
CHUNKED = b"POST /p HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n"


def make(scheme: bytes = b"http") -> RequestParser:
    return RequestParser(RequestRules(scheme))


def feed(parser: RequestParser, data: bytes, step: int) -> None:
    for at in range(0, len(data), step):
        assert parser.receive_head(data[at : at + step]) is None


def test_a_whole_head() -> None:
    parser = make()
    request = parser.receive_head(GET)
    assert request is not None
    assert (request.method, request.target, request.path) == (b"GET", b"/x?q", b"/x")
    assert (request.host, request.authority) == (b"a.example", b"a.example")
    assert request.keep_alive and not request.http10 and not request.chunked
    assert request.content_length == -1
    assert (parser.state, parser.rest) == (COMPLETE, b"")


@pytest.mark.parametrize("cut", range(1, len(GET)))
def test_a_head_cut_anywhere(cut: int) -> None:
    parser = make()
    assert parser.receive_head(GET[:cut]) is None
    assert parser.state == HEAD and not parser.idle
    request = parser.receive_head(GET[cut:] + b"GET")
    assert request is not None and request.target == b"/x?q"
    assert parser.rest == b"GET"


def test_idle_is_between_requests() -> None:
    parser = make()
    assert parser.idle
    parser.receive_head(b"\r\n")
    assert parser.idle
    parser.receive_head(GET)
    assert not parser.idle
    parser.next()
    assert parser.idle


def test_pipelined_requests_come_out_one_by_one() -> None:
    parser = make()
    other = GET.replace(b"/x", b"/y")
    targets = []
    request = parser.receive_head(GET + other + POST + b"hello" + GET[:10])
    while request is not None:
        targets.append(request.target)
        if parser.state == BODY:
            assert parser.receive_body(b"") == b"hello"
        parser.next()
        request = parser.receive_head(b"")
    assert targets == [b"/x?q", b"/y?q", b"/p"]
    assert parser.rest == GET[:10]
    request = parser.receive_head(GET[10:])
    assert request is not None and request.target == b"/x?q"


def test_the_end_of_a_pipelined_head_is_found_in_bytes_that_came_before() -> None:
    parser = make()
    parser.receive_head(GET + GET + GET[:5])
    parser.next()
    assert parser.receive_head(b"") is not None
    parser.next()
    assert parser.receive_head(GET[5:]) is not None


def test_next_needs_a_whole_message() -> None:
    parser = make()
    with pytest.raises(ValueError):
        parser.next()
    parser.receive_head(GET)
    with pytest.raises(ValueError):
        parser.receive_head(GET)
    parser.next()
    parser.receive_head(POST)
    with pytest.raises(ValueError):
        parser.next()


def test_the_same_head_again_keeps_what_followed_from_it() -> None:
    parser = make()
    request = parser.receive_head(GET)
    assert request is not None
    request.route = "found"
    parser.next()
    assert parser.receive_head(GET) is request and request.route == "found"
    assert parser.state == COMPLETE
    parser.next()
    # Another head drops it, and so does forget().
    parser.receive_head(GET.replace(b"/x", b"/y"))
    assert request.route is None
    parser.next()
    parser.receive_head(GET)
    request.route = "found"
    parser.next()
    parser.forget()
    parser.receive_head(GET)
    assert request.route is None


def test_the_same_head_behind_held_bytes_is_not_taken_for_it() -> None:
    parser = make()
    parser.receive_head(GET)
    parser.next()
    assert parser.receive_head(b"\r\nGET /z HTTP/1.1\r\nHost: a.example\r\nX-B: ") is None
    with pytest.raises(RequestError):
        parser.receive_head(GET + b"\x00")


def test_a_body_of_known_length_ends_where_it_says() -> None:
    parser = make()
    parser.receive_head(POST + b"he")
    assert parser.left == 5
    assert parser.receive_body(b"") == b"he"
    assert (parser.state, parser.left) == (BODY, 3)
    assert parser.receive_body(b"lloGET") == b"llo"
    assert (parser.state, parser.rest) == (COMPLETE, b"GET")


def test_bytes_that_went_past_by_splice() -> None:
    parser = make()
    parser.receive_head(POST)
    parser.moved(3)
    assert (parser.state, parser.left) == (BODY, 2)
    with pytest.raises(ValueError):
        parser.moved(3)
    parser.moved(2)
    assert parser.state == COMPLETE


def test_bytes_here_already_cannot_go_past() -> None:
    parser = make()
    parser.receive_head(POST + b"he")
    with pytest.raises(ValueError):
        parser.moved(1)


def test_a_chunked_body_is_written_anew() -> None:
    parser = make()
    parser.receive_head(CHUNKED + b"0005;x=y\r\nhello\r\n3\r\nabc\r\n1\r\n")
    assert parser.receive_body(b"") == b"8\r\nhelloabc\r\n"
    assert parser.receive_body(b"z") == b"1\r\nz\r\n"
    assert parser.receive_body(b"\r\n0\r\nX-Sum: 1\r\n\r") == b""
    assert parser.receive_body(b"\nGET") == b"0\r\nX-Sum: 1\r\n\r\n"
    assert (parser.state, parser.rest) == (COMPLETE, b"GET")


def test_a_bad_chunk_gives_nothing_of_its_bytes() -> None:
    parser = make()
    parser.receive_head(CHUNKED + b"5\r\nhello\r\nG\r\n")
    with pytest.raises(RequestError) as caught:
        parser.receive_body(b"")
    assert (caught.value.status, caught.value.fault) == (400, Fault.BODY)
    assert parser.state == FAILED


def test_keep_alive_by_version_and_connection() -> None:
    cases = [
        (b"1.1", b"", True),
        (b"1.1", b"Connection: close\r\n", False),
        (b"1.1", b"Connection: Keep-Alive, CLOSE\r\n", False),
        (b"1.0", b"", False),
        (b"1.0", b"Connection: Keep-Alive\r\n", True),
        (b"1.0", b"Connection: keep-alive, close\r\n", False),
        (b"1.0", b"Connection: keep-alive\r\nConnection: close\r\n", False),
        (b"1.1", b"Connection: x-close\r\n", True),
    ]
    for version, line, expected in cases:
        request = make().receive_head(b"GET / HTTP/%b\r\nHost: a\r\n%b\r\n" % (version, line))
        assert request is not None
        assert request.keep_alive is expected, (version, line)


def test_expect_and_upgrade_are_for_http_1_1() -> None:
    lines = b"Host: a\r\nExpect: 100-continue\r\nConnection: upgrade\r\nUpgrade: WebSocket, h2c\r\n\r\n"
    request = make().receive_head(b"GET / HTTP/1.1\r\n" + lines)
    assert request is not None and request.expect and request.upgrade == b"WebSocket"
    request = make().receive_head(b"GET / HTTP/1.0\r\n" + lines)
    assert request is not None and not request.expect and request.upgrade == b""


@pytest.mark.parametrize(
    ("data", "status", "fault"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: \x00", 400, Fault.HEADER),
        (b"GET / HTTP/1.1\r\nHost: a\n", 400, Fault.HEADER),
        (b"GET / HTTP/1.1\n", 400, Fault.REQUEST_LINE),
        (b"\x16\x03\x01", 400, Fault.REQUEST_LINE),
        (b"GET / HTTP/3.0\r\n", 505, Fault.VERSION),
        (b"GET / FTP", 400, Fault.REQUEST_LINE),
        (b"GET /" + b"x" * limits.MAX_REQUEST_LINE, 414, Fault.TARGET_TOO_LONG),
        (b"G" * (limits.MAX_REQUEST_LINE + 1), 400, Fault.REQUEST_LINE),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * limits.MAX_REQUEST_HEAD, 431, Fault.HEAD_TOO_LARGE),
    ],
)
def test_what_cannot_become_valid_is_refused_before_its_end(data: bytes, status: int, fault: Fault) -> None:
    for step in (1, len(data)):
        parser = make()
        with pytest.raises(RequestError) as caught:
            feed(parser, data, step)
        assert (caught.value.status, caught.value.fault) == (status, fault)
        assert parser.state == FAILED


@pytest.mark.parametrize(
    "line", [b"Bad name: x", b"Name : x", b" folded", b"\tfolded", b": x", b"no colon", b"X\xe9: y"]
)
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_a_malformed_field_is_refused_at_the_end_of_its_line(line: bytes, step: int) -> None:
    parser = make()
    head = b"GET / HTTP/1.1\r\nHost: a\r\nX-A: b\r\n"
    feed(parser, head + line + b"\r", step)
    with pytest.raises(RequestError) as caught:
        parser.receive_head(b"\n")
    assert (caught.value.status, caught.value.fault) == (400, Fault.HEADER)


def test_limits_are_exact() -> None:
    def head(fill: int) -> bytes:
        start = b"GET / HTTP/1.1\r\nHost: a\r\nX: "
        return start + b"x" * (fill - len(start) - 4) + b"\r\n\r\n"

    assert make().receive_head(head(limits.MAX_REQUEST_HEAD)) is not None
    with pytest.raises(RequestError):
        make().receive_head(head(limits.MAX_REQUEST_HEAD + 1))

    def target(length: int) -> bytes:
        return b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n" % (b"x" * (length - 1))

    assert make().receive_head(target(limits.MAX_TARGET)) is not None
    with pytest.raises(RequestError) as caught:
        make().receive_head(target(limits.MAX_TARGET + 1))
    assert caught.value.status == 414

    def lines(count: int) -> bytes:
        return b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * (count - 1) + b"\r\n"

    assert make().receive_head(lines(limits.MAX_FIELD_LINES)) is not None
    with pytest.raises(RequestError) as caught:
        make().receive_head(lines(limits.MAX_FIELD_LINES + 1))
    assert caught.value.status == 431


def test_https_listeners_take_https_targets() -> None:
    head = b"GET %b://a.example/ HTTP/1.1\r\nHost: a.example:443\r\n\r\n"
    assert make(b"https").receive_head(head % b"https") is not None
    with pytest.raises(RequestError) as caught:
        make(b"https").receive_head(head.replace(b":443", b":80") % b"http")
    assert caught.value.status == 421


def test_the_memo_is_bounded_and_holds_no_credentials() -> None:
    memo = FieldsMemo()
    block = b"\r\nHost: a\r\nX: %d\r\n\r\n"
    first = memo.read(block % 0)
    assert memo.read(block % 0) is first
    for count in range(1, limits.MEMO_ENTRIES + 1):
        memo.read(block % count)
    assert memo.read(block % 0) is not first
    for secret in (b"Cookie: a=b", b"authorization: Basic x"):
        held = b"\r\nHost: a\r\n" + secret + b"\r\n\r\n"
        assert memo.read(held) is not memo.read(held)
    long = b"\r\nHost: a\r\nX: " + b"x" * limits.MEMO_BLOCK + b"\r\n\r\n"
    assert memo.read(long) is not memo.read(long)


def test_a_refused_block_is_refused_again() -> None:
    memo = FieldsMemo()
    for _ in range(2):
        with pytest.raises(RequestError):
            memo.read(b"\r\nHost: a\r\nHost: b\r\n\r\n")


def test_a_parser_goes_on_to_another_connection_only_when_it_is_clean() -> None:
    rules = RequestRules(b"http")

    def recycled(data: bytes, rules_then: RequestRules = rules) -> bool:
        parser = RequestParser(rules)
        with contextlib.suppress(RequestError):
            parser.receive_head(data)
        return parser.recycle(rules_then)

    assert recycled(GET)
    assert not recycled(GET[:-1])  # a part of a head is here
    assert not recycled(GET + b"G")  # or of the next one
    assert not recycled(GET.replace(b"\r\n\r\n", b"\r\nContent-Length: 3\r\n\r\n"))  # a body is to come
    assert not recycled(b"GET /x\r\n\r\n")  # refused
    assert not recycled(GET.replace(b"\r\n\r\n", b"\r\nCookie: a=b\r\n\r\n"))
    assert not recycled(GET.replace(b"\r\n\r\n", b"\r\nAuthorization: Basic x\r\n\r\n"))
    assert not recycled(GET, RequestRules(b"http"))  # of another configuration


def test_a_parser_that_was_recycled_reads_as_a_new_one() -> None:
    rules = RequestRules(b"http")
    parser = RequestParser(rules)
    for data in (GET, GET, GET.replace(b"/x", b"/y"), GET.replace(b"1.1", b"1.0"), GET):
        request = parser.receive_head(data)
        fresh = RequestParser(RequestRules(b"http")).receive_head(data)
        assert request is not None and fresh is not None
        for name in ("method", "target", "path", "host", "http10", "keep_alive", "content_length"):
            assert getattr(request, name) == getattr(fresh, name)
        assert parser.recycle(rules) and parser.idle
