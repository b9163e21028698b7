"""The PROXY protocol, versions 1 and 2 (haproxy.org/download/2.9/doc/proxy-protocol.txt), both ways.

A listener either expects a header or does not: nothing is guessed from data, for a client could then write
its own address. Nothing behind the header is looked at before the header is whole.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Final

from tidegate.config.model import ProxyProtocol
from tidegate.http import blame
from tidegate.http.errors import Fault, PeerError
from tidegate.http.limits import MAX_PROXY_V1, MAX_PROXY_V2

SIGNATURE_V2: Final = b"\r\n\r\n\x00\r\nQUIT\n"
_SIGNATURE_V1: Final = b"PROXY "
_HEAD_V2: Final = struct.Struct("!12sBBH")

_COMMAND_AT, _KIND_AT, _LENGTH_AT = 12, 13, 14

_LINE_V1: Final = re.compile(
    rb"PROXY TCP(4|6) ([0-9A-Fa-f.:]++) ([0-9A-Fa-f.:]++) (0|[1-9][0-9]{0,4}) (0|[1-9][0-9]{0,4})\r\n"
)
_UNKNOWN_V1: Final = re.compile(rb"PROXY UNKNOWN(?: [\x20-\x7e]*)?\r\n")

_LOCAL: Final = 0
_PROXY: Final = 1
_UNSPEC: Final = 0
_TLV_CRC32C: Final = 0x03
# Address block by (family << 4 | transport); AF_UNIX carries two paths of 108 bytes.
_TCP4: Final = 0x11
_TCP6: Final = 0x21
_UNIX: Final = 0x31
_BLOCKS: Final = {_TCP4: 12, _TCP6: 36, _UNIX: 216}


class ProxyError(PeerError):
    """Not the header that the listener expects: the connection is closed without an answer."""

    __slots__ = ()

    def __init__(self, message: str, fault: Fault = Fault.PROXY_HEADER) -> None:
        super().__init__(400, fault, message)


def not_trusted() -> ProxyError:
    """For a peer that may not send a header, whatever it sent; nothing was read, so no byte is to blame."""
    return ProxyError("peer not in trusted", Fault.NOT_TRUSTED)


@dataclass(frozen=True, slots=True)
class ProxyHeader:
    """What a header said. Addresses are None where the connection's own are to be used."""

    version: int
    local: bool  # the proxy speaks for itself (health checks)
    source: tuple[str, int] | None = None
    destination: tuple[str, int] | None = None


class ProxyReader:
    """Reads one header from the beginning of a connection."""

    __slots__ = ("_expect", "rest")

    def __init__(self, expect: ProxyProtocol) -> None:
        """`expect`: V1, V2 or ANY (either, but one of them)."""
        if expect is ProxyProtocol.OFF:
            raise ValueError("nothing to expect")
        self._expect = expect
        self.rest = b""

    def receive(self, data: bytes) -> ProxyHeader | None:
        """The header once it is whole (what follows it is then in `rest`), or None. Raises ProxyError."""
        data = self.rest + data
        self.rest = data
        if not data:
            return None
        version1 = data[0] == _SIGNATURE_V1[0]
        if self._expect is (ProxyProtocol.V2 if version1 else ProxyProtocol.V1):
            raise ProxyError("another version of the PROXY protocol than expected, or none").blame(data, 0)
        return self._version1(data) if version1 else self._version2(data)

    def _version1(self, data: bytes) -> ProxyHeader | None:
        start = data[: len(_SIGNATURE_V1)]
        if start != _SIGNATURE_V1[: len(start)]:
            at = blame.departs(data, 0, _SIGNATURE_V1)
            raise ProxyError("no PROXY protocol header").blame(data, at)
        end = data.find(b"\n", 0, MAX_PROXY_V1)
        if end < 0:
            if len(data) >= MAX_PROXY_V1:
                raise ProxyError("version 1 header too long").blame(data, MAX_PROXY_V1 - 1)
            return None
        line = data[: end + 1]
        found = _LINE_V1.fullmatch(line)
        if found is None:
            if _UNKNOWN_V1.fullmatch(line) is None:
                raise ProxyError("malformed version 1 header").blame(data, blame.in_proxy_line(line))
            header = ProxyHeader(1, local=False)
        else:
            family = IPv4Address if found[1] == b"4" else IPv6Address
            ports = int(found[4]), int(found[5])
            if max(ports) > 65535:
                raise ProxyError("malformed version 1 header").blame(data, blame.in_proxy_line(line))
            group = 2
            try:
                source = str(family(found[group].decode("ascii")))
                group = 3
                destination = str(family(found[group].decode("ascii")))
            except AddressValueError:
                error = ProxyError("malformed address in a version 1 header")
                raise error.blame(data, found.start(group)) from None
            header = ProxyHeader(1, False, (source, ports[0]), (destination, ports[1]))
        self.rest = data[end + 1 :]
        return header

    def _version2(self, data: bytes) -> ProxyHeader | None:
        start = data[: len(SIGNATURE_V2)]
        if start != SIGNATURE_V2[: len(start)]:
            raise ProxyError("no PROXY protocol header").blame(data, blame.departs(data, 0, SIGNATURE_V2))
        if len(data) < _HEAD_V2.size:
            return None
        _, command, kind, length = _HEAD_V2.unpack_from(data)
        if command >> 4 != 2 or command & 0xF not in (_LOCAL, _PROXY):
            raise ProxyError("unknown version or command").blame(data, _COMMAND_AT)
        end = _HEAD_V2.size + length
        if end > MAX_PROXY_V2:
            raise ProxyError("version 2 header too long").blame(data, _LENGTH_AT)
        if len(data) < end:
            return None
        header = _read_v2(data[:end], command & 0xF, kind)
        self.rest = data[end:]
        return header


def _read_v2(whole: bytes, command: int, kind: int) -> ProxyHeader:
    block = _HEAD_V2.size
    if kind >> 4 == _UNSPEC or command == _LOCAL:
        # The address part of these is to be skipped whatever it holds: what does not read as TLVs is not an
        # error, a checksum that reads as one counts.
        tlvs = block + _BLOCKS.get(kind, 0)
        _check_sum(whole, _tlvs(whole, tlvs)[0] or [])
        return ProxyHeader(2, local=command == _LOCAL)
    size = _BLOCKS.get(kind)
    if size is None:
        error = ProxyError("an address family or transport that no stream has")
        raise error.blame(whole, _KIND_AT)
    if len(whole) - block < size:
        raise ProxyError("address block too short").blame(whole, _LENGTH_AT)
    tlvs_found, wrong = _tlvs(whole, block + size)
    if tlvs_found is None:
        raise ProxyError("malformed TLV").blame(whole, wrong)
    _check_sum(whole, tlvs_found)
    if kind == _UNIX:
        return ProxyHeader(2, local=False)
    width = 4 if kind == _TCP4 else 16
    make = IPv4Address if kind == _TCP4 else IPv6Address
    source = str(make(whole[block : block + width]))
    destination = str(make(whole[block + width : block + 2 * width]))
    source_port, destination_port = struct.unpack_from("!HH", whole, block + 2 * width)
    return ProxyHeader(2, False, (source, source_port), (destination, destination_port))


def _tlvs(whole: bytes, pos: int) -> tuple[list[tuple[int, int, int]] | None, int]:
    """(type, begin, length) of each TLV from `pos` to the end; None, and where, if one does not fit."""
    found = []
    size = len(whole)
    while pos < size:
        if size - pos < 3:
            return None, pos
        kind, length = struct.unpack_from("!BH", whole, pos)
        if pos + 3 + length > size:
            return None, pos + 1  # its length
        found.append((kind, pos + 3, length))
        pos += 3 + length
    return found, -1


def _check_sum(whole: bytes, tlvs: list[tuple[int, int, int]]) -> None:
    """Raises ProxyError if a CRC32c is there and not the header's, in which its own bytes count as zero."""
    for kind, begin, length in tlvs:
        if kind == _TLV_CRC32C:
            blank = whole[:begin] + bytes(length) + whole[begin + length :]
            if length != 4 or crc32c(blank) != int.from_bytes(whole[begin : begin + 4], "big"):
                raise ProxyError("checksum mismatch").blame(whole, begin if length == 4 else begin - 2)


def encode_v1(source: tuple[str, int] | None, destination: tuple[str, int] | None) -> bytes:
    """A version 1 header; UNKNOWN when an address is not known."""
    if source is None or destination is None:
        return b"PROXY UNKNOWN\r\n"
    addresses = _one_family(source[0], destination[0])
    family = 6 if isinstance(addresses[0], IPv6Address) else 4
    line = f"PROXY TCP{family} {addresses[0]} {addresses[1]} {source[1]} {destination[1]}\r\n"
    return line.encode("ascii")


def encode_v2(
    source: tuple[str, int] | None,
    destination: tuple[str, int] | None,
    *,
    local: bool = False,
    checksum: bool = False,
) -> bytes:
    """A version 2 header; family UNSPEC when an address is not known, LOCAL for our own connections."""
    kind, block = 0, b""
    if source is not None and destination is not None and not local:
        addresses = _one_family(source[0], destination[0])
        kind = _TCP6 if isinstance(addresses[0], IPv6Address) else _TCP4
        ports = struct.pack("!HH", source[1], destination[1])
        block = addresses[0].packed + addresses[1].packed + ports
    command = 0x20 | (_LOCAL if local else _PROXY)
    if not checksum:
        return _HEAD_V2.pack(SIGNATURE_V2, command, kind, len(block)) + block
    tlv = struct.pack("!BH", _TLV_CRC32C, 4)
    head = _HEAD_V2.pack(SIGNATURE_V2, command, kind, len(block) + 7) + block + tlv
    return head + crc32c(head + b"\0\0\0\0").to_bytes(4, "big")


def _one_family(source: str, destination: str) -> tuple[IPv4Address | IPv6Address, IPv4Address | IPv6Address]:
    """Both addresses as IPv4, or both as IPv6: a dual-stack socket may have one of each."""
    if ":" not in source and ":" not in destination:
        return IPv4Address(source), IPv4Address(destination)
    return _as_v6(source), _as_v6(destination)


def _as_v6(address: str) -> IPv6Address:
    return IPv6Address(address.partition("%")[0] if ":" in address else f"::ffff:{address}")


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


_CRC_TABLE: Final = _crc_table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli, RFC 3720 B.4)."""
    crc = 0xFFFFFFFF
    table = _CRC_TABLE
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF
