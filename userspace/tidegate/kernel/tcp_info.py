"""Fields of linux/tcp.h's struct tcp_info, by offset. Only appended to by the kernel, so offsets stay."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

TCPI_STATE = 0
TCPI_UNACKED = 24
TCPI_SACKED = 28
TCPI_LAST_DATA_RECV = 52
TCPI_LAST_ACK_RECV = 56
TCPI_RTT = 68
TCPI_BYTES_ACKED = 120
TCPI_BYTES_RECEIVED = 128
_SIZE = TCPI_LAST_ACK_RECV + 4  # enough for all of the above

TCP_ESTABLISHED = 1
TCP_CLOSE = 7
TCP_CLOSE_WAIT = 8
TCP_LISTEN = 10

_waits = struct.Struct(f"=B{TCPI_LAST_DATA_RECV - TCPI_STATE - 1}xII")  # and LAST_ACK_RECV beside it
_progress = struct.Struct(
    f"=B{TCPI_LAST_ACK_RECV - 1}xI{TCPI_RTT - TCPI_LAST_ACK_RECV - 4}xI{TCPI_BYTES_ACKED - TCPI_RTT - 4}xQQ"
)
_backlog = struct.Struct(f"=B{TCPI_UNACKED - TCPI_STATE - 1}xII")  # and SACKED beside it


def receive_times(sock: socket.socket) -> tuple[int, int, int]:
    """(TCP state, ms since the last data, ms since the last ACK), of a connection."""
    state, data_ms, ack_ms = _waits.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SIZE))
    return state, data_ms, ack_ms


def accept_backlog(sock: socket.socket) -> tuple[int, int]:
    """(connections waiting to be accepted, the most that may), of a listener. ValueError if it is none."""
    state, waiting, most = _backlog.unpack(
        sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SIZE)[: _backlog.size]
    )
    if state != TCP_LISTEN:
        raise ValueError("not a listening socket")
    return waiting, most


class Progress(NamedTuple):
    """How far a connection got."""

    state: int
    last_ack_ms: int  # ms since the last ACK came in
    rtt_us: int  # smoothed
    acked: int  # bytes the peer acknowledged, its SYN counted as one
    received: int  # bytes taken in, in order; the peer's FIN counted as one


def progress(sock: socket.socket) -> Progress:
    """How far a connection got. OSError when it is no TCP socket."""
    return Progress(*_progress.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _progress.size)))
