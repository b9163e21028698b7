"""The PROXY protocol: both versions, cut anywhere, mutated, and written back."""

from __future__ import annotations

import ipaddress
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.config.model import ProxyProtocol
from tidegate.http.limits import MAX_PROXY_V2
from tidegate.http.proxyproto import (
    SIGNATURE_V2,
    ProxyError,
    ProxyHeader,
    ProxyReader,
    crc32c,
    encode_v1,
    encode_v2,
)

V1 = b"PROXY TCP4 192.0.2.7 192.0.2.1 4711 80\r\n"
FOUR = (("192.0.2.7", 4711), ("192.0.2.1", 80))
BLOCK4 = bytes([192, 0, 2, 7, 192, 0, 2, 1]) + struct.pack("!HH", 4711, 80)


def v2(command: int = 0x21, kind: int = 0x11, rest: bytes = BLOCK4) -> bytes:
    return SIGNATURE_V2 + struct.pack("!BBH", command, kind, len(rest)) + rest


def tlv(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


def read(
    data: bytes, expect: ProxyProtocol = ProxyProtocol.ANY, step: int = 0
) -> tuple[ProxyHeader | None, bytes]:
    reader = ProxyReader(expect)
    header = None
    for at in range(0, len(data), step or len(data) or 1):
        if header is None:
            header = reader.receive(data[at : at + (step or len(data))])
        else:
            reader.rest += data[at : at + step]
    return header, reader.rest


GOOD = [
    (V1, ProxyHeader(1, False, *FOUR)),
    (b"PROXY TCP6 2001:db8::7 ::1 1 65535\r\n", ProxyHeader(1, False, ("2001:db8::7", 1), ("::1", 65535))),
    (b"PROXY UNKNOWN\r\n", ProxyHeader(1, False)),
    (b"PROXY UNKNOWN ffff:f:f ffff:f 65535 65535\r\n", ProxyHeader(1, False)),
    (v2(), ProxyHeader(2, False, *FOUR)),
    (
        v2(kind=0x21, rest=bytes(15) + b"\x07" + bytes(15) + b"\x01" + struct.pack("!HH", 1, 2)),
        ProxyHeader(2, False, ("::7", 1), ("::1", 2)),
    ),
    (v2(kind=0x31, rest=bytes(216)), ProxyHeader(2, False)),
    (v2(kind=0x00, rest=b""), ProxyHeader(2, False)),
    (v2(kind=0x00, rest=b"whatever this is"), ProxyHeader(2, False)),
    (v2(command=0x20, kind=0x00, rest=b""), ProxyHeader(2, True)),
    (v2(command=0x20), ProxyHeader(2, True)),
    (v2(command=0x20, kind=0x11, rest=b"junk"), ProxyHeader(2, True)),
    (v2(rest=BLOCK4 + tlv(0x04, b"") + tlv(0x20, b"x" * 300)), ProxyHeader(2, False, *FOUR)),
]


@pytest.mark.parametrize(("data", "expected"), GOOD)
def test_whole_byte_by_byte_and_with_data_behind(data: bytes, expected: ProxyHeader) -> None:
    assert read(data) == (expected, b"")
    assert read(data, step=1) == (expected, b"")
    assert read(data + b"GET / HTTP/1.1\r\n") == (expected, b"GET / HTTP/1.1\r\n")
    for cut in range(len(data)):
        assert read(data[:cut])[0] is None
    expect = ProxyProtocol.V1 if expected.version == 1 else ProxyProtocol.V2
    assert read(data, expect)[0] == expected
    with pytest.raises(ProxyError):
        read(data, ProxyProtocol.V2 if expected.version == 1 else ProxyProtocol.V1)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        b"proxy TCP4 192.0.2.7 192.0.2.1 4711 80\r\n",
        b"PROXX",
        b"\r\n\r\n\x00\r\nQUIX",
        b"\r\n\r\nGET",
        b"PROXY TCP4 192.0.2.7 192.0.2.1 4711 80\n",
        b"PROXY TCP4 192.0.2.7 192.0.2.1 4711 80 \r\n",
        b"PROXY  TCP4 192.0.2.7 192.0.2.1 4711 80\r\n",
        b"PROXY TCP4 192.0.2.07 192.0.2.1 4711 80\r\n",
        b"PROXY TCP4 192.0.2.7 192.0.2.1 04711 80\r\n",
        b"PROXY TCP4 192.0.2.7 192.0.2.1 65536 80\r\n",
        b"PROXY TCP4 192.0.2.7 192.0.2.1 -1 80\r\n",
        b"PROXY TCP4 192.0.2.7 192.0.2.1 80\r\n",
        b"PROXY TCP4 ::1 ::1 4711 80\r\n",
        b"PROXY TCP6 192.0.2.7 192.0.2.1 4711 80\r\n",
        b"PROXY TCP6 fe80::1%lo ::1 4711 80\r\n",
        b"PROXY UDP4 192.0.2.7 192.0.2.1 4711 80\r\n",
        b"PROXY UNKNOWN\t\r\n",
        b"PROXY UNKNOWN " + b"x" * 100 + b"\r\n",
        b"PROXY TCP4 " + b"1" * 100,
        v2(command=0x11),
        v2(command=0x22),
        v2(kind=0x12),
        v2(kind=0x41),
        v2(kind=0x10),
        v2(rest=BLOCK4[:-1]),
        v2(kind=0x21),
        v2(rest=BLOCK4 + b"\x04\x00"),
        v2(rest=BLOCK4 + b"\x04\x00\x05abc"),
        v2(rest=BLOCK4 + tlv(0x03, b"abcd")),
        v2(rest=BLOCK4 + tlv(0x03, b"abc")),
        v2(command=0x20, rest=BLOCK4 + tlv(0x03, b"abcd")),
        v2(kind=0, rest=tlv(0x03, b"abcd")),
    ],
)
def test_what_is_refused(data: bytes) -> None:
    with pytest.raises(ProxyError):
        read(data)
    with pytest.raises(ProxyError):
        read(data, step=1)


def test_a_length_beyond_the_limit_is_refused_before_it_is_held() -> None:
    with pytest.raises(ProxyError):
        read(SIGNATURE_V2 + struct.pack("!BBH", 0x21, 0x11, MAX_PROXY_V2))


def test_crc32c() -> None:
    # Check value of the CRC catalogue, and RFC 3720 B.4.
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA


addresses4 = st.ip_addresses(v=4).map(str)
addresses6 = st.ip_addresses(v=6).filter(lambda ip: ip.scope_id is None).map(str)
ports = st.integers(0, 65535)
ends = st.one_of(
    st.tuples(st.tuples(addresses4, ports), st.tuples(addresses4, ports)),
    st.tuples(st.tuples(addresses6, ports), st.tuples(addresses6, ports)),
)


@given(ends, st.booleans())
@settings(deadline=None)
def test_what_is_written_is_read(pair: tuple[tuple[str, int], tuple[str, int]], checksum: bool) -> None:
    assert read(encode_v1(*pair)) == (ProxyHeader(1, False, *pair), b"")
    assert read(encode_v2(*pair, checksum=checksum), step=1) == (ProxyHeader(2, False, *pair), b"")
    assert read(encode_v2(*pair, local=True, checksum=checksum)) == (ProxyHeader(2, True), b"")


def test_what_is_not_known_and_what_is_mixed() -> None:
    assert encode_v1(None, FOUR[1]) == b"PROXY UNKNOWN\r\n"
    assert read(encode_v2(None, None, checksum=True)) == (ProxyHeader(2, False), b"")
    for encode in (encode_v1, encode_v2):
        header, _ = read(encode(("192.0.2.7", 1), ("2001:db8::1", 2)))
        assert header is not None and header.source is not None
        assert ipaddress.IPv6Address(header.source[0]).ipv4_mapped == ipaddress.IPv4Address("192.0.2.7")


@given(ends, st.data())
@settings(deadline=None)
def test_one_byte_changed_under_a_checksum_is_seen(
    pair: tuple[tuple[str, int], tuple[str, int]], data: st.DataObject
) -> None:
    whole = bytearray(encode_v2(*pair, checksum=True))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    try:
        header, _ = read(bytes(whole))
    except ProxyError:
        return
    # Only what says less may pass: more bytes wanted, a header that ends before its checksum, or one whose
    # checksum is a checksum no more.
    length = (14, 15)
    kind_or_length_of_tlv = range(len(whole) - 7, len(whole) - 4)
    assert header is None or at in length or at in kind_or_length_of_tlv or header.source is None


@given(st.binary(max_size=300), st.sampled_from([ProxyProtocol.V1, ProxyProtocol.V2, ProxyProtocol.ANY]))
@settings(deadline=None)
def test_any_bytes_end_in_a_header_an_error_or_a_wait(data: bytes, expect: ProxyProtocol) -> None:
    results = []
    for step in (0, 1):
        try:
            results.append(read(data, expect, step))
        except ProxyError:
            results.append("refused")
    assert results[0] == results[1]


def test_nothing_to_expect() -> None:
    with pytest.raises(ValueError):
        ProxyReader(ProxyProtocol.OFF)
