"""Sockets of connections, without the class that the socket module puts on top of the interpreter's own.

Its constructor and its close() are written in Python and make enums of numbers: for a connection that lives
for one request they cost more than the system calls beneath. What they add (makefile, dup, with) nobody here
needs.
"""

from __future__ import annotations

import errno
import socket
from _socket import socket as plain_socket
from typing import TYPE_CHECKING, Final, cast

if TYPE_CHECKING:
    from tidegate.cluster.backend import BackendState

_STREAM: Final = int(socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)


def stream(family: int) -> socket.socket:
    """A new one, non-blocking. Raises OSError."""
    return cast(socket.socket, plain_socket(int(family), _STREAM))


def accepted(fd: int, family: int, kind: int, protocol: int) -> socket.socket:
    """For what accept(2) returned, still blocking; takes `fd` over."""
    return cast(socket.socket, plain_socket(family, kind, protocol, fd))


def connect(sock: socket.socket, backend: BackendState, keepalive: bool) -> bool:
    """Begin to connect one of `stream`; False: it failed already."""
    if backend.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if keepalive:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    try:
        code = sock.connect_ex(backend.sockaddr)
    except OSError:  # not an address of this family: a Unix path too long
        return False
    return code in (0, errno.EINPROGRESS)
