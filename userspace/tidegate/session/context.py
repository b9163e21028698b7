"""What every session of one listener shares in one worker."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import termios
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tidegate.loop.reactor import Reactor
from tidegate.loop.slab import Slab

if TYPE_CHECKING:
    from tidegate.cluster.balance import ClusterState
    from tidegate.config.model import Listener
    from tidegate.metrics.names import EndReason
    from tidegate.session.http_shared import HttpSide
    from tidegate.session.splicer import Splicer
    from tidegate.session.tcp_guard import TcpSide

# One buffer per worker: bytes are copied out of it only when they must wait. 64 KiB is what a socket
# of default size holds; larger buys nothing measurable for a relay and costs cache.
BUFFER_SIZE = 64 * 1024

# close() then sends RST: the peer learns that what it sent did not arrive
LINGER_RESET = struct.pack("ii", 1, 0)


class Session(Protocol):
    """What the zombie checker, control and drain need of a session, whatever its protocol."""

    token: int
    ctx: Context

    @property
    def started_ns(self) -> int: ...

    @property
    def last_progress_ns(self) -> int: ...

    def start(self) -> None:
        """Called once, when the session is counted: it may end within this call."""
        ...

    def describe(self) -> dict[str, Any]:
        """State for logs and control: flat, JSON-able."""
        ...

    def end(self, reason: EndReason) -> None:
        """End it now, both sides reset unless everything was delivered. Idempotent."""
        ...

    def drain(self) -> None:
        """The worker is leaving: finish what is under way, take nothing new."""
        ...


@dataclass(slots=True)
class Context:
    """One per (listener, worker)."""

    reactor: Reactor
    slab: Slab[Session]
    buffer: bytearray
    view: memoryview
    listener: Listener
    cluster: ClusterState | None  # None: an http listener whose routes alone decide
    words: memoryview  # this listener's and worker's counters, metrics scope LISTENER
    on_end: Callable[[Session, EndReason], None]
    active: int = 0
    splicer: Splicer | None = None  # lets the kernel move the bytes of long streams, where it can
    http: HttpSide | None = None  # what the sessions of an http listener share
    tcp: TcpSide | None = None  # the same of a tcp listener, where they have more to do than relay
    # on_stale = "503": (counters, socket, peer, established_ns) -> whether it could be answered
    answer_stale: Callable[[memoryview, socket.socket, Any, int], bool] | None = None
    draining: bool = False  # nothing new is to be begun: keep no connection alive


def show_token(token: int) -> str:
    """A session's name in logs and control: tokens begin anew with each worker process."""
    return f"{os.getpid()}:{token:x}"


def reset(sock: socket.socket) -> None:
    """Make the coming close() a reset; a socket already dead is left as it is."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
    except OSError:
        return


def has_unread_bytes(sock: socket.socket) -> bool:
    """Whether the peer sent at least one byte that nobody has read; False too when it reset."""
    try:
        return bool(sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except OSError:
        return False


def unsent_bytes(sock: socket.socket) -> int:
    """Bytes handed to the kernel that the peer has not acknowledged; 0 when the socket is dead."""
    try:
        return int.from_bytes(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"), sys.byteorder)
    except OSError:
        return 0
