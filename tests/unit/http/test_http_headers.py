"""The head a backend gets: forwarding fields, route rewrites, edits, cookies."""

from __future__ import annotations

import pytest

from tidegate.config.model import HeaderEdits
from tidegate.http.cookies import read_cookie, set_cookie, strip_cookie
from tidegate.http.edits import EditError, Edits, compile_edits
from tidegate.http.forwarded import Peer
from tidegate.http.headers import RequestForm, Rewrite, forwards_left, strip_prefix
from tidegate.http.request import Request, RequestParser, RequestRules
from tidegate.http.stamps import RequestIds

START_US = 1_795_472_000_123_456


def request(
    lines: bytes = b"", target: bytes = b"/x", version: bytes = b"1.1", method: bytes = b"GET"
) -> Request:
    host = b"Host: a.example\r\n" if not lines.startswith(b"Host:") and version == b"1.1" else b""
    head = b"%b %b HTTP/%b\r\n%b%b\r\n" % (method, target, version, host, lines)
    parsed = RequestParser(RequestRules(b"http")).receive_head(head)
    assert parsed is not None
    return parsed


def peer(address: str = "192.0.2.7", *, trusted: bool = False) -> Peer:
    return Peer(address, b"http", ("192.0.2.1", 8080), trusted=trusted)


def form(via: str = "tidegate", request_start: str = "us", queue_age: bool = False) -> RequestForm:
    return RequestForm(via=via, request_start=request_start, queue_age=queue_age, ids=RequestIds(b"feed"))


def values(head: bytes, name: bytes) -> list[bytes]:
    lines = [line.partition(b": ") for line in head.split(b"\r\n")[1:]]
    return [value for key, _, value in lines if key.lower() == name.lower()]


def test_a_head_in_full() -> None:
    asked = request(b"User-Agent: x\r\nx-a: 1\r\nX-A: 2\r\n")
    assert form().head(asked, peer(), None, START_US) == (
        b"GET /x HTTP/1.1\r\n"
        b"Host: a.example\r\n"
        b"User-Agent: x\r\n"
        b"x-a: 1\r\n"
        b"X-A: 2\r\n"
        b"Via: 1.1 tidegate\r\n"
        b"X-Forwarded-For: 192.0.2.7\r\n"
        b"X-Forwarded-Proto: http\r\n"
        b"X-Forwarded-Port: 8080\r\n"
        b"X-Forwarded-Host: a.example\r\n"
        b'Forwarded: for=192.0.2.7;host="a.example";proto=http\r\n'
        b"X-Request-Id: feed0000000000000001\r\n"
        b"X-Request-Start: t=1795472000123456\r\n\r\n"
    )
    assert asked.id == b"feed0000000000000001"


def test_the_form_of_request_start_and_the_queue_age() -> None:
    head = form(request_start="ms", queue_age=True).head(request(), peer(), None, START_US, 2_500_000)
    assert values(head, b"x-request-start") == [b"t=1795472000123"]
    assert values(head, b"x-queue-age-ms") == [b"2500"]
    head = form(request_start="off").head(request(), peer(), None, START_US)
    assert values(head, b"x-request-start") == []
    assert head.endswith(b"\r\n\r\n") and head.count(b"\r\n\r\n") == 1


def test_via_can_be_off_and_says_what_the_client_spoke() -> None:
    assert values(form(via="").head(request(), peer(), None, START_US), b"via") == []
    old = request(b"Host: a\r\n", version=b"1.0")
    assert values(form().head(old, peer(), None, START_US), b"via") == [b"1.0 tidegate"]


def test_a_client_without_host_gets_the_address_it_connected_to() -> None:
    head = form().head(request(version=b"1.0"), peer(), None, START_US)
    assert values(head, b"host") == [b"192.0.2.1:8080"]
    assert values(head, b"x-forwarded-host") == []
    assert values(head, b"forwarded") == [b"for=192.0.2.7;proto=http"]


@pytest.mark.parametrize(
    ("address", "chain", "node"),
    [
        ("192.0.2.7", [b"192.0.2.7"], b"192.0.2.7"),
        ("2001:db8::7", [b"2001:db8::7"], b'"[2001:db8::7]"'),
        ("fe80::7%lo", [b"fe80::7"], b'"[fe80::7]"'),
        ("", [], b"unknown"),
    ],
)
def test_addresses_of_clients(address: str, chain: list[bytes], node: bytes) -> None:
    head = form().head(request(), peer(address), None, START_US)
    assert values(head, b"x-forwarded-for") == chain
    assert values(head, b"forwarded")[0].startswith(b"for=" + node + b";")


SAID = (
    b"X-Forwarded-For: 198.51.100.1\r\nX-Forwarded-For: 198.51.100.2 \r\nX-Forwarded-Proto: https\r\n"
    b"X-Forwarded-Host: outer.example\r\nX-Forwarded-Prefix: /p\r\nX_Forwarded_For: 6.6.6.6\r\n"
    b"Forwarded: for=198.51.100.1\r\nX-Request-Start: t=1\r\nX-Request-Id: outer\r\nX-Queue-Age-Ms: 3\r\n"
)


def test_nobody_else_is_believed() -> None:
    head = form().head(request(SAID), peer(), None, START_US)
    assert values(head, b"x-forwarded-for") == [b"192.0.2.7"]
    assert values(head, b"x-forwarded-proto") == [b"http"]
    assert values(head, b"x-forwarded-prefix") == []
    assert values(head, b"x_forwarded_for") == []
    assert values(head, b"x-request-start") == [b"t=%d" % START_US]
    assert values(head, b"x-request-id") == [b"outer"]
    assert values(head, b"x-queue-age-ms") == []
    assert len(values(head, b"forwarded")) == 1 and b"198.51" not in values(head, b"forwarded")[0]


def test_trusted_peers_are_continued() -> None:
    head = form().head(request(SAID), peer(trusted=True), None, START_US)
    assert values(head, b"x-forwarded-for") == [b"198.51.100.1, 198.51.100.2, 192.0.2.7"]
    assert values(head, b"x-forwarded-proto") == [b"https"]
    assert values(head, b"x-forwarded-host") == [b"outer.example"]
    assert values(head, b"x-forwarded-port") == [b"8080"]
    assert values(head, b"x-forwarded-prefix") == [b"/p"]
    assert values(head, b"x_forwarded_for") == []
    assert values(head, b"forwarded") == [b'for=198.51.100.1, for=192.0.2.7;host="a.example";proto=http']
    assert values(head, b"x-request-start") == [b"t=1"]


def test_a_trusted_peer_that_says_nothing() -> None:
    head = form().head(request(), peer(trusted=True), None, START_US)
    assert head == form().head(request(), peer(), None, START_US).replace(
        b"X-Forwarded-Port: 8080\r\nX-Forwarded-Host: a.example\r\n",
        b"X-Forwarded-Host: a.example\r\nX-Forwarded-Port: 8080\r\n",
    )


def test_the_same_request_again_differs_in_what_is_per_request_only() -> None:
    parser = RequestParser(RequestRules(b"http"))
    raw = b"GET /x HTTP/1.1\r\nHost: a.example\r\n\r\n"
    writer, who, heads = form(), peer(), []
    for start_us in (1, 2):
        asked = parser.receive_head(raw)
        assert asked is not None
        heads.append(writer.head(asked, who, None, start_us))
        parser.next()
    assert values(heads[0], b"x-request-id") != values(heads[1], b"x-request-id")
    assert heads[1].replace(b"0002", b"0001").replace(b"t=2", b"t=1") == heads[0]


def test_another_route_for_the_same_request_is_written_anew() -> None:
    asked, writer, who = request(), form(), peer()
    writer.head(asked, who, None, START_US)
    head = writer.head(asked, who, Rewrite(host=b"inner.example"), START_US)
    assert values(head, b"host") == [b"inner.example"]
    assert values(head, b"x-forwarded-host") == [b"a.example"]


@pytest.mark.parametrize(
    ("target", "prefix", "expected"),
    [
        (b"/api/x?y=/api", b"/api", b"/x?y=/api"),
        (b"/api", b"/api", b"/"),
        (b"/api?y", b"/api", b"/?y"),
        (b"/api//x", b"/api", b"/x"),
        (b"/api///", b"/api", b"/"),
        (b"/%61pi/x", b"/api", b"/x"),
        (b"/%61pi", b"/api", b"/"),
        (b"/a/%62/c%2Fd", b"/a/b", b"/c%2Fd"),
    ],
)
def test_strip_prefix(target: bytes, prefix: bytes, expected: bytes) -> None:
    assert strip_prefix(target, prefix) == expected


def test_rewrites_together() -> None:
    edits = compile_edits(HeaderEdits(set=(("X-Env", "prod"),), add=(("X-A", "3"),), remove=("Cookie2",)))
    rewrite = Rewrite(strip=b"/api", host=b"inner.example:81", cookie=b"STICK", edits=edits)
    asked = request(
        b"x-env: dev\r\nX-ENV: test\r\nX-A: 1\r\ncookie2: $\r\n"
        b"Cookie: a=b; STICK=s1; c=d\r\nCookie: STICK=s1\r\n",
        target=b"/api/x",
    )
    head = form().head(asked, peer(), rewrite, START_US)
    assert head.startswith(b"GET /x HTTP/1.1\r\nHost: inner.example:81\r\n")
    assert values(head, b"x-env") == [b"prod"]
    assert values(head, b"x-a") == [b"1", b"3"]
    assert values(head, b"cookie2") == []
    assert values(head, b"cookie") == [b"a=b; c=d"]


def test_edits_reach_what_we_generate_but_not_the_framing() -> None:
    edits = Edits(
        HeaderEdits(
            set=(("X-Forwarded-Proto", "https"), ("X-Request-Id", "fixed")),
            remove=("Forwarded", "X-Request-Start"),
        )
    )
    asked = request(b"Content-Length: 3\r\n", method=b"POST")
    head = form().head(asked, peer(), Rewrite(edits=edits), START_US)
    assert values(head, b"x-forwarded-proto") == [b"https"]
    assert values(head, b"x-request-id") == [b"fixed"]
    assert values(head, b"forwarded") == values(head, b"x-request-start") == []
    assert values(head, b"content-length") == [b"3"]


@pytest.mark.parametrize(
    "name", ["Host", "content-length", "Transfer-Encoding", "Connection", "a b", "", "ä"]
)
def test_edits_that_cannot_be(name: str) -> None:
    for edits in (
        HeaderEdits(set=((name, "x"),)),
        HeaderEdits(add=((name, "x"),)),
        HeaderEdits(remove=(name,)),
    ):
        with pytest.raises(EditError):
            compile_edits(edits)


def test_edit_values_are_one_line() -> None:
    with pytest.raises(EditError):
        compile_edits(HeaderEdits(set=(("X-A", "a\r\nX-B: c"),)))
    assert compile_edits(HeaderEdits()) is None


@pytest.mark.parametrize(
    ("method", "value", "left", "sent"),
    [
        (b"OPTIONS", b"3", True, [b"2"]),
        (b"TRACE", b"1", True, [b"0"]),
        (b"OPTIONS", b"0", False, [b"0"]),
        (b"GET", b"0", True, [b"0"]),
        (b"OPTIONS", b"x", True, [b"x"]),
        (b"OPTIONS", b"9" * 5000, True, [b"9" * 5000]),
    ],
)
def test_max_forwards(method: bytes, value: bytes, left: bool, sent: list[bytes]) -> None:
    asked = request(b"Max-Forwards: " + value + b"\r\n", method=method)
    assert forwards_left(asked) is left
    assert values(form().head(asked, peer(), None, START_US), b"max-forwards") == sent


@pytest.mark.parametrize(
    ("lines", "value"),
    [
        (b"Cookie: S=v1", b"v1"),
        (b"Cookie: a=b; S=v1; c=d", b"v1"),
        (b"cookie: a=b\r\nCookie: S=v1", b"v1"),
        (b'Cookie: S="v1"', b"v1"),
        (b"Cookie: S=v1; S=v2", b"v1"),
        (b"Cookie: S=", b""),
        (b"Cookie: XS=v1; s=v2", None),
        (b"X-Cookie: S=v1", None),
        (b"Cookie: a=S=v1", None),
    ],
)
def test_reading_a_cookie(lines: bytes, value: bytes | None) -> None:
    assert read_cookie(b"\r\n" + lines + b"\r\n\r\n", b"S") == value


def test_stripping_a_cookie() -> None:
    lines = b"\r\nX: y\r\nCookie: S=1\r\ncookie: a=b;S=2 ; c=d\r\nCookie: XS=3\r\nZ: S=1"
    assert strip_cookie(lines, b"S") == b"\r\nX: y\r\nCookie: a=b; c=d\r\nCookie: XS=3\r\nZ: S=1"
    assert strip_cookie(lines, b"T") == lines


def test_setting_a_cookie() -> None:
    assert set_cookie(b"S", b"1", secure=False) == b"\r\nSet-Cookie: S=1; Path=/; HttpOnly; SameSite=Lax"
    assert set_cookie(b"S", b"1", secure=True).endswith(b"; Secure")


def test_request_ids_are_unique_and_well_formed() -> None:
    ids, others = RequestIds(), RequestIds()
    made = [ids.make() for _ in range(100)] + [others.make() for _ in range(100)]
    assert len(set(made)) == 200
    assert all(len(one) == 32 and one.isalnum() for one in made)


def test_another_client_with_the_same_request_is_told_of_as_itself() -> None:
    """A parser that serves one connection after the other keeps what was written for the one before."""
    asked, writer = request(), form()
    for address in ("192.0.2.7", "192.0.2.8", "192.0.2.7"):
        head = writer.head(asked, peer(address), None, START_US)
        assert values(head, b"x-forwarded-for") == [address.encode()]


def test_request_ids_count_on_past_what_is_put_together() -> None:
    ids = RequestIds(b"feed")
    made = [ids.make() for _ in range(70_000)]
    assert made == [b"feed%016x" % number for number in range(1, 70_001)]
