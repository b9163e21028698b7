"""Each refusal names the byte to blame: here it stands between the marks, wherever the message is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tidegate.config.model import ProxyProtocol
from tidegate.http import blame, limits
from tidegate.http.chunked import ChunkDecoder
from tidegate.http.errors import Fault, PeerError, RequestError
from tidegate.http.proxyproto import SIGNATURE_V2, ProxyError, ProxyReader, encode_v2
from tidegate.http.request import RequestParser, RequestRules
from tidegate.http.response import ResponseMemo, ResponseParser

NONE = -1  # nothing is marked: no single byte is to blame
GET = "GET / HTTP/1.1\r\n"
OK = "HTTP/1.1 200 OK\r\n"
A = "Host: a\r\n"


def unmarked(text: str) -> tuple[bytes, int]:
    """The message, and where its mark is."""
    return text.replace("⟦", "").replace("⟧", "").encode("latin-1"), text.find("⟦")


def error_of(feed: Callable[[bytes], object], data: bytes, step: int = 1 << 20) -> PeerError | None:
    try:
        for at in range(0, len(data), step):
            feed(data[at : at + step])
    except PeerError as error:
        return error
    return None


def refused(feed: Callable[[bytes], object], data: bytes, step: int = 1 << 20) -> PeerError:
    error = error_of(feed, data, step)
    assert error is not None, "not refused"
    return error


def check(
    make: Callable[[], Callable[[bytes], object]], text: str, fault: Fault, steps: Sequence[int]
) -> None:
    data, mark = unmarked(text)
    for step in (len(data), *steps):
        error = refused(make(), data, step)
        assert error.fault is fault
        where = error.base + error.at if error.at >= 0 else NONE
        assert where == mark, f"in pieces of {step}: {where}, not {mark}"
        if mark >= 0:
            assert error.data[error.at] == data[mark]


def request_parser() -> Callable[[bytes], object]:
    return RequestParser(RequestRules(b"http")).receive_head


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        # the request line
        (Fault.REQUEST_LINE, "G⟦@⟧T / HTTP/1.1\r\nHost: a\r\n\r\n"),
        (Fault.REQUEST_LINE, "⟦ ⟧GET / HTTP/1.1\r\nHost: a\r\n\r\n"),
        (Fault.REQUEST_LINE, "GET ⟦ ⟧/ HTTP/1.1\r\nHost: a\r\n\r\n"),
        (Fault.REQUEST_LINE, "GET⟦\t⟧/ HTTP/1.1\r\nHost: a\r\n\r\n"),
        (Fault.REQUEST_LINE, "GET /a⟦#⟧b HTTP/1.1\r\nHost: a\r\n\r\n"),
        (Fault.REQUEST_LINE, "GET /a ⟦b⟧ HTTP/1.1\r\nHost: a\r\n\r\n"),
        (Fault.REQUEST_LINE, "GET /⟦\xe9⟧ HTTP/1.1\r\nHost: a\r\n\r\n"),
        (Fault.REQUEST_LINE, "GET / HTTP/1.1⟦ ⟧\r\nHost: a\r\n\r\n"),
        (Fault.REQUEST_LINE, "GET / ⟦h⟧ttp/1.1\r\nHost: a\r\n\r\n"),
        (Fault.REQUEST_LINE, "GET /⟦\r⟧\nHost: a\r\n\r\n"),
        (Fault.REQUEST_LINE, "\r\n⟦\r⟧\nGET / HTTP/1.1\r\nHost: a\r\n\r\n"),
        (Fault.TARGET_TOO_LONG, "GET /" + "a" * (limits.MAX_TARGET - 1) + "⟦a⟧aaa HTTP/1.1\r\n\r\n"),
        (Fault.TARGET, f"GET ⟦*⟧ HTTP/1.1\r\n{A}\r\n"),
        (Fault.TARGET, f"GET ⟦a⟧bc HTTP/1.1\r\n{A}\r\n"),
        (Fault.TARGET, f"GET ⟦f⟧tp://a/ HTTP/1.1\r\n{A}\r\n"),
        (Fault.TARGET, f"GET http://a⟦@⟧b/ HTTP/1.1\r\n{A}\r\n"),
        (Fault.TARGET, f"\r\nGET http://a:⟦6⟧5536/x HTTP/1.1\r\n{A}\r\n"),
        (Fault.HOST, f"GET http://⟦b⟧/ HTTP/1.1\r\n{A}\r\n"),
        (Fault.MISDIRECTED, f"GET ⟦h⟧ttps://a/ HTTP/1.1\r\n{A}\r\n"),
        (Fault.METHOD, f"⟦C⟧ONNECT a:1 HTTP/1.1\r\n{A}\r\n"),
        (Fault.METHOD, f"\r\n⟦C⟧ONNECT /a HTTP/1.1\r\n{A}\r\n"),
        (Fault.METHOD, f"⟦T⟧RACE / HTTP/1.1\r\n{A}Content-Length: 1\r\n\r\n"),
        # field lines
        (Fault.HEADER, f"{GET}{A}X: a⟦\0⟧b\r\n\r\n"),
        (Fault.HEADER, f"{GET}{A}X: a⟦\x7f⟧b\r\n\r\n"),
        (Fault.HEADER, f"{GET}{A}X⟦ ⟧: b\r\n\r\n"),
        (Fault.HEADER, f"{GET}{A}⟦:⟧ b\r\n\r\n"),
        (Fault.HEADER, f"{GET}{A}X: a\r\n⟦ ⟧folded\r\n\r\n"),
        (Fault.HEADER, f"{GET}{A}X: a\r\n⟦\t⟧folded\r\n\r\n"),
        (Fault.HEADER, f"{GET}⟦ ⟧Host: a\r\n\r\n"),
        (Fault.HEADER, f"{GET}{A}no-colon⟦\r⟧\n\r\n"),
        (Fault.HEADER, f"{GET}{A}no⟦ ⟧colon: x\r\n\r\n"),
        (Fault.HEADER, f"{GET}{A}X: a⟦\r⟧b\r\n\r\n"),
        (Fault.HEADER, f"{GET}{A}X: a⟦\n⟧Y: b\r\n\r\n"),
        (Fault.HEADER, f"{GET}{A}X⟦\xe9⟧: b\r\n\r\n"),
        (Fault.HEAD_TOO_LARGE, GET + A + "X: y\r\n" * (limits.MAX_FIELD_LINES - 1) + "⟦Z⟧: y\r\n\r\n"),
        # Host
        (Fault.HOST, GET + "X: y\r\n\r\n"),
        (Fault.HOST, f"{GET}{A}X: y\r\nhost:  ⟦b⟧\r\n\r\n"),
        (Fault.HOST, f"{GET}Host: a⟦%⟧41\r\n\r\n"),
        (Fault.HOST, f"{GET}Host: a⟦ ⟧b\r\n\r\n"),
        (Fault.HOST, f"{GET}Host:⟦\r⟧\n\r\n"),
        (Fault.HOST, f"{GET}Host: ⟦.⟧\r\n\r\n"),
        (Fault.HOST, f"{GET}Host: a:8⟦x⟧\r\n\r\n"),
        (Fault.HOST, f"{GET}Host: a:⟦7⟧0000\r\n\r\n"),
        (Fault.HOST, f"{GET}Host: a:⟦0⟧\r\n\r\n"),
        (Fault.HOST, f"{GET}Host: a:00001⟦2⟧3\r\n\r\n"),
        (Fault.HOST, f"{GET}Host: [⟦:⟧::1]\r\n\r\n"),
        (Fault.HOST, f"{GET}Host: [::1⟦%⟧eth0]\r\n\r\n"),
        (Fault.HOST, f"{GET}Host: [::1]⟦8⟧0\r\n\r\n"),
        (Fault.HOST, f"{GET}Host: [::1⟦\r⟧\n\r\n"),
        (Fault.HOST, GET + "Host: " + "a" * limits.MAX_AUTHORITY + "⟦a⟧\r\n\r\n"),
        # framing
        (Fault.FRAMING, f"{GET}{A}Content-Length: 1⟦x⟧\r\n\r\n"),
        (Fault.FRAMING, f"{GET}{A}Content-Length: ⟦+⟧1\r\n\r\n"),
        (Fault.FRAMING, f"{GET}{A}Content-Length: 1⟦,⟧ 1\r\n\r\n"),
        (Fault.FRAMING, f"{GET}{A}Content-Length:⟦\r⟧\n\r\n"),
        (Fault.FRAMING, f"{GET}{A}Content-Length: 1\r\nX: y\r\nContent-length: ⟦1⟧\r\n\r\n"),
        (Fault.FRAMING, f"{GET}{A}Content⟦_⟧Length: 1\r\n\r\n"),
        (Fault.BODY_TOO_LARGE, f"{GET}{A}Content-Length: {'9' * 18}⟦9⟧9\r\n\r\n"),
        (Fault.FRAMING, f"{GET}{A}Content-Length: 1\r\nTransfer-Encoding: ⟦c⟧hunked\r\n\r\n"),
        (Fault.FRAMING, f"{GET}{A}Transfer-Encoding: chunked\r\nContent-Length: ⟦1⟧\r\n\r\n"),
        (Fault.FRAMING, f"{GET}{A}Transfer-Encoding: chunked\r\nTransfer-Encoding: ⟦c⟧hunked\r\n\r\n"),
        (Fault.FRAMING, f"{GET}{A}Transfer-Encoding: chunked, ⟦g⟧zip\r\n\r\n"),
        (Fault.FRAMING, f"{GET}{A}Transfer-Encoding: chunked, ⟦c⟧hunked\r\n\r\n"),
        (Fault.FRAMING, f"{GET}{A}Transfer-Encoding: ⟦i⟧dentity, chunked\r\n\r\n"),
        (Fault.FRAMING, f"{GET}{A}Transfer-Encoding: chunked⟦\t⟧\r\n\r\n"),
        (Fault.FRAMING, f"{GET}{A}Transfer-Encoding: chunked⟦;⟧q=1\r\n\r\n"),
        (Fault.FRAMING, f"{GET}{A}Transfer-Encoding: gzip,⟦,⟧chunked\r\n\r\n"),
        (Fault.FRAMING, f"{GET}{A}Transfer-Encoding: ⟦g⟧zip\r\n\r\n"),
        (Fault.FRAMING, f"{GET}{A}Transfer-Encoding:⟦\r⟧\n\r\n"),
        (Fault.FRAMING, f"GET / HTTP/1.0\r\n{A}Transfer-Encoding: ⟦c⟧hunked\r\n\r\n"),
        (Fault.CODING, f"{GET}{A}Transfer-Encoding: ⟦g⟧zip, chunked\r\n\r\n"),
        (Fault.EXPECTATION, f"{GET}{A}Expect: 10⟦1⟧-continue\r\n\r\n"),
        (Fault.EXPECTATION, f"{GET}{A}Expect: 100-continue⟦,⟧ x\r\n\r\n"),
    ],
)  # fmt: skip
def test_requests(fault: Fault, text: str) -> None:
    check(request_parser, text, fault, (1, 7))


@pytest.mark.parametrize("text", ["GET / HTTP/⟦2⟧.0\r\n", "GET / HTTP/1.⟦2⟧\r\n", "GET / HTTP/⟦0⟧.9\r\n"])
def test_versions(text: str) -> None:
    check(request_parser, f"{text}{A}\r\n", Fault.VERSION, ())


def test_heads_over_the_limit_name_the_first_byte_too_much() -> None:
    head = f"{GET}{A}X: "
    fill = "y" * (limits.MAX_REQUEST_HEAD - len(head))
    # whole or not, as many bytes as the limit are taken, and the next one is to blame
    error = refused(request_parser(), f"{head}{fill}z\r\n\r\n".encode())
    assert (error.fault, error.data[error.at : error.at + 1]) == (Fault.HEAD_TOO_LARGE, b"z")
    assert request_parser()(f"{head}{fill}".encode()) is None
    error = refused(request_parser(), f"{head}{fill}z".encode())
    assert (error.fault, error.data[error.at : error.at + 1]) == (Fault.HEAD_TOO_LARGE, b"z")
    assert error.base + error.at == limits.MAX_REQUEST_HEAD


def test_a_second_request_on_the_connection_is_counted_from_its_own_begin() -> None:
    parser = RequestParser(RequestRules(b"http"))
    assert parser.receive_head(f"{GET}{A}\r\n{GET}{A}X: a".encode()) is not None
    parser.next()
    assert parser.receive_head(b"") is None
    with pytest.raises(RequestError) as caught:
        parser.receive_head(b"\0")
    assert caught.value.at == len(f"{GET}{A}X: a")


WHOLE = b"POST /a?b HTTP/1.1\r\nHost: a.example:80\r\nX-A: b c\r\nContent-Length: 5\r\n\r\n"


@given(st.integers(0, len(WHOLE) - 1), st.sampled_from(b"\0\x0b\x1b\x7f"))
def test_a_byte_that_may_stand_nowhere_is_found_where_it_stands(at: int, byte: int) -> None:
    data = WHOLE[:at] + bytes([byte]) + WHOLE[at + 1 :]
    for step in (1, 5, len(data)):
        error = refused(request_parser(), data, step)
        cr = data[at - 1 : at + 1] == b"\r" + bytes([byte])  # then it misses its LF
        assert error.at == at - cr, error.message


@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255), st.booleans())
@settings(max_examples=500)
@example(41, 0x20, True)
def test_what_stands_before_the_byte_was_fine_so_far(at: int, byte: int, insert: bool) -> None:
    data = WHOLE[:at] + bytes([byte]) + WHOLE[at + (0 if insert else 1) :]
    error = error_of(request_parser(), data)
    if error is not None and error.at >= 0:
        assert error.data == data
        assert error.at < len(data)
        assert request_parser()(data[: error.at]) is None


def test_where_the_second_parser_objects_is_found() -> None:
    good = b"\r\nHost: a\r\nX: " + b"y" * 500 + b"\r\n"
    assert blame.second_request(good + b"\r\n") == NONE
    for bad in (b"X\0: y", b"X: a\0b", b"X : y", b"Content-Length: 1z"):
        position = blame.second_request(good + bad + b"\r\n\r\n")
        assert (good + bad)[position] in b"\0 z"
        if b"Content" not in bad:
            assert blame.second_response(good + bad + b"\r\n\r\n") == position


# bodies


def decoder() -> Callable[[bytes], object]:
    return ChunkDecoder(RequestError).decode


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (Fault.BODY, "⟦x⟧\r\n"),
        (Fault.BODY, "5\r\nhello\r\n⟦G⟧\r\n"),
        (Fault.BODY, "5\r\nhello\r\n⟦\r⟧\n"),
        (Fault.BODY, "5⟦x⟧\r\nhello\r\n"),
        (Fault.BODY, "⟦-⟧1\r\n"),
        (Fault.BODY, "0⟦x⟧10\r\n"),
        (Fault.BODY, "5⟦ ⟧\r\nhello\r\n"),
        (Fault.BODY, "5 ⟦x⟧\r\nhello\r\n"),
        (Fault.BODY, "5⟦\n⟧hello\r\n"),
        (Fault.BODY, "5;⟦\r⟧\nhello\r\n"),
        (Fault.BODY, "5;a=⟦\r⟧\nhello\r\n"),
        (Fault.BODY, "5;a;b=c ;d = ⟦,⟧\r\nhello\r\n"),
        (Fault.BODY, '5;a="b⟦\r⟧\nhello\r\n'),
        (Fault.BODY, '5;a="b"⟦c⟧\r\nhello\r\n'),
        (Fault.BODY, "5\r\nhello⟦6⟧\r\n"),
        (Fault.BODY, "5\r\nhello\r⟦6⟧\r\n"),
        (Fault.BODY, "5;" + "a" * (limits.MAX_CHUNK_LINE - 3) + "⟦a⟧" + "a" * 30),
        (Fault.BODY_TOO_LARGE, "0" * limits.MAX_CHUNK_DIGITS + "⟦1⟧\r\n"),
        (
            Fault.BODY,
            ("1;" + "a" * 99 + "\r\nx\r\n") * 163 + "1;" + "a" * 83 + "⟦a⟧" + "a" * 15 + "\r\nx\r\n",
        ),
        # trailers
        (Fault.BODY, "0\r\nX⟦ ⟧: y\r\n\r\n"),
        (Fault.BODY, "5\r\nhello\r\n0\r\nA: b\r\n⟦ ⟧c\r\n\r\n"),
        (Fault.BODY, "0\r\nX: a⟦\0⟧b\r\n\r\n"),
        (Fault.BODY, "0\r\nX: a⟦\n⟧b\r\n\r\n"),
        (Fault.BODY, "0\r\nX: y\r\n⟦C⟧ontent-Length: 1\r\n\r\n"),
        (Fault.BODY, "0\r\n⟦H⟧ost: a\r\n\r\n"),
        (Fault.HEAD_TOO_LARGE, "0\r\n" + "X: y\r\n" * limits.MAX_TRAILER_LINES + "⟦Z⟧: y\r\n\r\n"),
        (Fault.HEAD_TOO_LARGE, "0\r\nX: " + "y" * (limits.MAX_TRAILER - 3) + "⟦y⟧" + "y" * 9),
    ],
)
def test_chunked_bodies(fault: Fault, text: str) -> None:
    check(decoder, text, fault, (1, 3))


@given(st.text('0aAfFgG \t;="\\,\r\n\0\xe9', max_size=12))
@settings(max_examples=1000)
def test_the_byte_of_a_size_line_is_one_of_its_own(line: str) -> None:
    data = line.encode("latin-1") + b"\r\n"
    error = error_of(decoder(), data)
    if error is not None:
        assert 0 <= error.at < len(data)
        assert error_of(decoder(), data[: error.at]) is None, "what stands before it was fine so far"


# responses


def response_parser(method: str = "GET", *, upgrade: bool = False) -> Callable[[bytes], object]:
    lines = "Connection: upgrade\r\nUpgrade: x\r\n" if upgrade else ""
    asked = RequestParser(RequestRules(b"http")).receive_head(
        f"{method} / HTTP/1.1\r\n{A}{lines}\r\n".encode()
    )
    assert asked is not None
    parser = ResponseParser(ResponseMemo())
    parser.start(asked)
    return parser.receive_head


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (Fault.STATUS_LINE, "⟦h⟧ttp/1.1 200 OK\r\n\r\n"),
        (Fault.STATUS_LINE, "HTTP/⟦2⟧ 200 OK\r\n\r\n"),
        (Fault.STATUS_LINE, "HTTP/1.1 ⟦0⟧00 OK\r\n\r\n"),
        (Fault.STATUS_LINE, "HTTP/1.1 20⟦x⟧ OK\r\n\r\n"),
        (Fault.STATUS_LINE, "HTTP/1.1 200⟦O⟧K\r\n\r\n"),
        (Fault.STATUS_LINE, "HTTP/1.1 200 O⟦\0⟧K\r\n\r\n"),
        (Fault.STATUS_LINE, "⟦<⟧html>\r\n"),
        (Fault.HEADER, f"{OK}X: a⟦\0⟧b\r\n\r\n"),
        (Fault.HEADER, f"{OK}X⟦ ⟧: b\r\n\r\n"),
        (Fault.HEADER, f"{OK}X: b\r\n⟦ ⟧c\r\n\r\n"),
        (Fault.HEADER, f"{OK}X: b⟦\n⟧c\r\n\r\n"),
        (Fault.HEAD_TOO_LARGE, OK + "X: y\r\n" * limits.MAX_RESPONSE_FIELD_LINES + "⟦Z⟧: y\r\n\r\n"),
        (Fault.FRAMING, f"{OK}Content-Length: 1\r\nContent-Length: ⟦1⟧\r\n\r\n"),
        (Fault.FRAMING, f"{OK}Content-Length: 1⟦x⟧\r\n\r\n"),
        (Fault.FRAMING, f"{OK}Content-Length: {'9' * 18}⟦9⟧\r\n\r\n"),
        (Fault.CODING, f"{OK}Transfer-Encoding: ⟦g⟧zip\r\n\r\n"),
        (Fault.CODING, f"{OK}Transfer-Encoding: chunked⟦\t⟧\r\n\r\n"),
        (Fault.CODING, f"{OK}Transfer-Encoding: chunked\r\nTransfer-Encoding: ⟦c⟧hunked\r\n\r\n"),
        (Fault.FRAMING, f"{OK}Transfer-Encoding: chunked\r\nContent-Length: ⟦1⟧\r\n\r\n"),
        (Fault.FRAMING, "HTTP/1.0 200 OK\r\nTransfer-Encoding: ⟦c⟧hunked\r\n\r\n"),
        (Fault.FRAMING, "HTTP/1.1 103 Early Hints\r\nContent-Length: ⟦1⟧\r\n\r\n"),
        (Fault.UNASKED, "HTTP/1.1 ⟦1⟧01 Switching\r\n\r\n"),
    ],
)  # fmt: skip
def test_responses(fault: Fault, text: str) -> None:
    check(response_parser, text, fault, (1, 6))


def test_a_response_nobody_asked_for_and_too_many_interim_ones() -> None:
    parser = ResponseParser(ResponseMemo())
    assert refused(parser.receive_head, b"HTTP/1.1").at == 0
    receive = response_parser()
    interim = b"HTTP/1.1 102 Processing\r\n\r\n"
    for _ in range(limits.MAX_INTERIM):
        receive(interim)
    error = refused(receive, interim)
    assert (error.fault, error.data[error.at :][:3]) == (Fault.INTERIM, b"102")


# PROXY headers


def v2(command: int = 0x21, kind: int = 0x11, length: int = 12, rest: bytes = b"\x7f\0\0\1" * 3) -> bytes:
    return SIGNATURE_V2 + bytes((command, kind)) + length.to_bytes(2, "big") + rest


@pytest.mark.parametrize(
    "text",
    [
        "⟦G⟧ET / HTTP/1.1\r\n",
        "PRO⟦x⟧Y TCP4 ",
        "PROXY ⟦t⟧cp4 1.2.3.4 1.2.3.4 1 2\r\n",
        "PROXY TCP⟦5⟧ 1.2.3.4 1.2.3.4 1 2\r\n",
        "PROXY TCP4 ⟦x⟧ 1.2.3.4 1 2\r\n",
        "PROXY TCP4 1.2.3.4 ⟦1⟧.2.3.400 1 2\r\n",
        "PROXY TCP6 ⟦1⟧.2.3.4 ::1 1 2\r\n",
        "PROXY TCP4 1.2.3.4 1.2.3.4 0⟦1⟧ 2\r\n",
        "PROXY TCP4 1.2.3.4 1.2.3.4 1 ⟦6⟧5536\r\n",
        "PROXY TCP4 1.2.3.4 1.2.3.4 1 2⟦ ⟧\r\n",
        "PROXY TCP4 1.2.3.4 1.2.3.4 1 2⟦\n⟧",
        "PROXY UNKNOWN a⟦\0⟧b\r\n",
        "PROXY UNKNOWN⟦x⟧\r\n",
        "PROXY TCP4 " + "1" * 95 + "⟦1⟧",
    ],
)
def test_proxy_version_1(text: str) -> None:
    check(
        lambda: ProxyReader(ProxyProtocol.ANY).receive, text, Fault.PROXY_HEADER, (1,) if "\n" in text else ()
    )


@pytest.mark.parametrize(
    ("data", "at"),
    [
        (SIGNATURE_V2[:7] + b"x", 7),
        (v2(command=0x31), 12),
        (v2(command=0x22), 12),
        (v2(kind=0x51), 13),
        (v2(length=4, rest=b"\0" * 4), 14),
        (v2(length=0xFFFF), 14),
        (v2(length=14, rest=b"\0" * 14), 28),  # no room for a TLV
        (v2(length=15, rest=b"\0" * 12 + b"\4\0\1"), 29),  # one that is longer than what is there
        (encode_v2(("1.2.3.4", 1), ("1.2.3.4", 2), checksum=True)[:-1] + b"\0", 31),
        (v2(length=16, rest=b"\0" * 12 + b"\3\0\1x"), 29),  # a checksum of one byte
    ],
)
def test_proxy_version_2(data: bytes, at: int) -> None:
    error = refused(ProxyReader(ProxyProtocol.ANY).receive, data)
    assert isinstance(error, ProxyError)
    assert (error.at, error.data[: len(data)]) == (at, data)


def test_another_version_than_expected_is_told_by_its_first_byte() -> None:
    assert refused(ProxyReader(ProxyProtocol.V1).receive, SIGNATURE_V2).at == 0
    assert refused(ProxyReader(ProxyProtocol.V2).receive, b"PROXY ").at == 0
