"""Fields of linux/tcp.h's struct tcp_info, by offset. Only appended to by the kernel, so offsets stay."""

from __future__ import annotations

import socket
import struct

TCPI_STATE = 0
TCPI_UNACKED = 24
TCPI_SACKED = 28
TCPI_LAST_DATA_RECV = 52
TCPI_LAST_ACK_RECV = 56
_SIZE = TCPI_LAST_ACK_RECV + 4  # enough for all of the above

TCP_CLOSE = 7
TCP_CLOSE_WAIT = 8
TCP_LISTEN = 10

_waits = struct.Struct(f"=B{TCPI_LAST_DATA_RECV - TCPI_STATE - 1}xII")  # and LAST_ACK_RECV beside it
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
