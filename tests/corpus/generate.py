"""Generated and mutated requests for the differential tests: strategies full of the tricks of smuggling."""

from __future__ import annotations

from corpus.replay import own_cases
from hypothesis import strategies as st

EOLS = st.sampled_from(
    [b"\r\n"] * 12 + [b"\n", b"\r", b"\r\r\n", b"\n\r\n", b"\r\n ", b"\r\n\t", b"\x0b\r\n"]
)
SPACES = st.sampled_from([b" "] * 8 + [b"", b"  ", b"\t", b" \t ", b"\x0b", b"\x0c", b"\xa0", b"\x00"])
NAMES = st.sampled_from(
    [
        b"Content-Length",
        b"content-length",
        b"Content_Length",
        b"Content-Length ",
        b"Content\xadLength",
        b"Transfer-Encoding",
        b"transfer-encoding",
        b"Transfer_Encoding",
        b" Transfer-Encoding",
        b"Transfer-Encoding\t",
        b"X-A",
        b"x-a",
        b"Connection",
        b"Expect",
        b"TE",
        b"Trailer",
        b"Upgrade",
        b"X\x00",
        b"X\x7f",
        b"",
        b"Host",
    ]
)
VALUES = st.sampled_from(
    [
        b"5",
        b"05",
        b"+5",
        b"-5",
        b"5,5",
        b"5, 6",
        b"0x5",
        b"5 ",
        b"5\x00",
        b"1e1",
        b"0",
        b"",
        b"6",
        b"10",
        b"chunked",
        b"Chunked",
        b"chunked ",
        b"\tchunked",
        b"xchunked",
        b"chunked,",
        b", chunked",
        b"gzip, chunked",
        b"chunked, identity",
        b"identity",
        b"chunked;a",
        b'"chunked"',
        b"chun\x00ked",
        b"\x0bchunked",
        b"\xffchunked",
        b"close",
        b"keep-alive",
        b"close, X-A",
        b"content-length",
        b"transfer-encoding",
        b"host",
        b"100-continue",
        b"websocket",
        b"a\rb",
        b"a\nContent-Length: 5",
        b"a.example",
        b"trailers",
    ]
)
LINES = st.lists(st.tuples(NAMES, SPACES, VALUES, EOLS), max_size=4)
METHODS = st.sampled_from([b"GET", b"POST", b"HEAD", b"PUT", b"OPTIONS"])
TARGETS = st.sampled_from(
    [b"/", b"/x?y", b"*", b"http://a.example/z", b"http://b.example/", b"/\x00", b"/a b", b"x"]
)
VERSIONS = st.sampled_from([b"HTTP/1.1"] * 6 + [b"HTTP/1.0", b"HTTP/1.2", b"HTTP/1.1 ", b"http/1.1"])
BODIES = st.sampled_from(
    [
        b"",
        b"hello",
        b"5\r\nhello\r\n0\r\n\r\n",
        b"5;a=b\r\nhello\r\n0\r\n\r\n",
        b"5\nhello\n0\n\n",
        b"0\r\n\r\n",
        b"5\r\nhello\r\n0\r\nX: y\r\n\r\n",
        b"5 \r\nhello\r\n0\r\n\r\n",
        b"+5\r\nhello\r\n0\r\n\r\n",
        b"5\r\nhello\r\n0\r\nContent-Length: 5\r\n\r\n",
        b"GET /smuggled HTTP/1.1\r\nHost: s\r\n\r\n",
    ]
)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    line = draw(METHODS) + b" " + draw(TARGETS) + b" " + draw(VERSIONS) + draw(EOLS)
    host = draw(st.sampled_from([b"Host: a.example\r\n"] * 6 + [b"", b"Host: a.example\r\nHost: b\r\n"]))
    fields = b"".join(name + b":" + space + value + eol for name, space, value, eol in draw(LINES))
    return line + host + fields + b"\r\n" + draw(BODIES)


def mutate(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for place, length, new in changes:
        at = place % (len(data) + 1)
        data = data[:at] + new + data[at + length :]
    return data


CHANGES = st.lists(
    st.tuples(
        st.integers(0, 10_000),
        st.integers(0, 3),
        st.sampled_from([b"", b"\r", b"\n", b"\r\n", b" ", b"\t", b"\x00", b":", b",", b"0", b"\x80", b";"]),
    ),
    min_size=1,
    max_size=3,
)
SEEDS = st.sampled_from([case.data for case in own_cases() if len(case.data) < 2000])


# What stands where it should stand: most of what is generated must get through, or little is compared.
PAYLOADS = st.sampled_from(
    [
        b"",
        b"x",
        b"hello",
        b"0\r\n\r\n",
        b"\r\n\r\n",
        b"GET /smuggled HTTP/1.1\r\nHost: s\r\n\r\n",
        b"0\r\n\r\nPOST /smuggled HTTP/1.1\r\nHost: s\r\nContent-Length: 0\r\n\r\n",
        b"\x00\xff" * 40,
        b"z" * 1500,
    ]
)
PROPER_LINES = st.lists(
    st.sampled_from(
        [
            b"X-A: b\r\n",
            b"x-a:b\r\n",
            b"X-A: \t b \t\r\n",
            b"X-A:\r\n",
            b'X-A: caf\xe9, "q\\""\r\n',
            b"X_A: b\r\n",
            b"X-Transfer-Encoding: chunked\r\n",
            b"Content-Length-X: 9\r\n",
            b"Connection: x-a\r\n",
            b"Connection: keep-alive, Content-Length, Transfer-Encoding, Host\r\n",
            b"Keep-Alive: timeout=5\r\n",
            b"TE: trailers\r\n",
            b"TE: chunked;q=0\r\n",
            b"Trailer: X-T\r\n",
            b"Proxy-Connection: keep-alive\r\n",
            b"Expect: 100-Continue\r\n",
            b"Cookie: a=b; c\r\n",
            b"X-HTTP-Method-Override: DELETE\r\n",
            b"X-Original-URL: /other\r\n",
            b"X-Forwarded-For: 1.2.3.4\r\n",
        ]
    ),
    max_size=4,
)
PROPER_TARGETS = st.sampled_from(
    [b"/", b"/x?y=z", b"/a/b//c;d=e", b"/a/%2e%2e/%41", b"/?a=http://b/&c=%0d%0aHost:%20d", b"http://a.example/z",
     b"HTTP://A.example?q"]
)  # fmt: skip
EXTENSIONS = st.sampled_from([b""] * 6 + [b";a", b";a=b", b' ; a = "b;c"', b";" + b"e" * 100])
TRAILERS = st.sampled_from([b""] * 4 + [b"X-T: u\r\n", b"X-T: u\r\nX-T: v\r\n", b"Via: 1.1 x\r\n"])


@st.composite
def proper_requests(draw: st.DrawFn) -> bytes:
    """A request with nothing wrong in it, however odd; its body looks like another request now and then."""
    method = draw(st.sampled_from([b"GET", b"POST", b"HEAD", b"PUT", b"DELETE", b"PATCH", b"OPTIONS"]))
    version = draw(st.sampled_from([b"HTTP/1.1"] * 8 + [b"HTTP/1.0"]))
    head = method + b" " + draw(PROPER_TARGETS) + b" " + version + b"\r\n"
    lines = [draw(st.sampled_from([b"Host: a.example\r\n", b"host:\ta.example\r\n"])), *draw(PROPER_LINES)]
    payload = draw(PAYLOADS)
    if version == b"HTTP/1.0" or draw(st.booleans()):
        framing = b"Content-Length: %d\r\n" % len(payload) if payload or draw(st.booleans()) else b""
        body = payload
    else:
        framing = draw(st.sampled_from([b"Transfer-Encoding: chunked\r\n", b"transfer-encoding:CHUNKED\r\n"]))
        body = draw(chunked(payload))
    lines.insert(draw(st.integers(0, len(lines))), framing)
    return head + b"".join(lines) + b"\r\n" + body


@st.composite
def chunked(draw: st.DrawFn, payload: bytes) -> bytes:
    """The payload in chunks, with extensions, leading zeros and trailers."""
    cuts = sorted(draw(st.lists(st.integers(0, len(payload)), max_size=3)))
    coded = b""
    for start, end in zip([0, *cuts], [*cuts, len(payload)], strict=True):
        if start < end:
            size = draw(st.sampled_from([b"%x", b"%X", b"00%x"])) % (end - start)
            coded += size + draw(EXTENSIONS) + b"\r\n" + payload[start:end] + b"\r\n"
    return (
        coded + draw(st.sampled_from([b"0", b"000"])) + draw(EXTENSIONS) + b"\r\n" + draw(TRAILERS) + b"\r\n"
    )


@st.composite
def connections(draw: st.DrawFn) -> list[bytes]:
    """What one client sends, pipelined, in pieces cut anywhere; now and then its end is missing."""
    any_one = st.one_of(proper_requests(), requests(), st.builds(mutate, SEEDS, CHANGES))
    data = b"".join(draw(st.lists(proper_requests(), max_size=2))) + draw(any_one) + draw(any_one)
    if draw(st.integers(0, 7)) == 0:
        data = data[: draw(st.integers(1, len(data)))]
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=3)))
    pieces = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    return [piece for piece in pieces if piece]
