"""A TCP client that sends the segments it is told to, and no others. Root, in a network namespace of its own.

The kernel knows nothing of its connection and would reset it: `silence_resets()` keeps it from that.
"""

from __future__ import annotations

import random
import socket
import struct
import subprocess
import time
from types import TracebackType
from typing import NamedTuple, Self

_FIN, _SYN, _PSH, _ACK = 0x01, 0x02, 0x08, 0x10
_WINDOW = 65535
_TIMEOUT_S = 5.0
ADDRESS = "127.0.0.9"  # of no other socket in the namespace


def silence_resets() -> None:
    """Drop what the kernel would answer to packets for sockets that it does not have."""
    rules = (
        "table ip raw_tcp {\n chain output {\n type filter hook output priority 0\n"
        f" ip saddr {ADDRESS} tcp flags & rst == rst drop\n }}\n}}\n"
    )
    subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True)


class Segment(NamedTuple):
    """What came from the other side."""

    seq: int
    ack: int
    flags: int
    data: bytes


class RawClient:
    """`with RawClient(port) as client:` is connected to 127.0.0.1. Positions are bytes of its own stream."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._own_port = random.randrange(20000, 60000)
        self._start = random.randrange(1 << 32)  # sequence number of its SYN: often wraps soon
        self._next_of_peer = 0
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
        self._sock.bind((ADDRESS, 0))
        self._sock.settimeout(_TIMEOUT_S)

    def __enter__(self) -> Self:
        self._transmit(self._start, 0, _SYN, b"")
        answer = self._receive(_SYN | _ACK)
        self._next_of_peer = answer.seq + 1
        self._transmit(self._start + 1, self._next_of_peer, _ACK, b"")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self._sock.close()

    def send(self, position: int, data: bytes, *, fin: bool = False) -> None:
        """One segment with the bytes of the stream from `position` on."""
        flags = _ACK | _PSH | (_FIN if fin else 0)
        self._transmit(self._start + 1 + position, self._next_of_peer, flags, data)

    def acknowledged(self, position: int) -> None:
        """Wait until the other side has acknowledged so many bytes. TimeoutError."""
        deadline = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < deadline:
            segment = self._receive(_ACK)
            if (segment.ack - self._start - 1) % (1 << 32) >= position:
                return
        raise TimeoutError(f"{position} bytes were not acknowledged")

    def _transmit(self, seq: int, ack: int, flags: int, data: bytes) -> None:
        head = struct.pack(
            "!HHIIBBHHH",
            self._own_port, self._port, seq % (1 << 32), ack % (1 << 32), 5 << 4, flags, _WINDOW, 0, 0,
        )  # fmt: skip
        pseudo = socket.inet_aton(ADDRESS) + socket.inet_aton("127.0.0.1")
        pseudo += struct.pack("!BBH", 0, socket.IPPROTO_TCP, len(head) + len(data))
        checksum = struct.pack("!H", _checksum(pseudo + head + data))
        self._sock.sendto(head[:16] + checksum + head[18:] + data, ("127.0.0.1", 0))

    def _receive(self, flags: int) -> Segment:
        while True:
            packet = self._sock.recv(65535)
            header = (packet[0] & 0xF) * 4
            source, target, seq, ack, offset, seen = struct.unpack_from("!HHIIBB", packet, header)
            if source == self._port and target == self._own_port and seen & flags == flags:
                return Segment(seq, ack, seen, packet[header + (offset >> 4) * 4 :])


def _checksum(data: bytes) -> int:
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
