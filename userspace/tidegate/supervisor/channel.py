"""Supervisor and worker talking: JSON datagrams over a SOCK_SEQPACKET pair, fds along with them.

What may be larger than a datagram (a configuration) travels as a memfd.
"""

from __future__ import annotations

import array
import json
import os
import pickle
import socket
from collections.abc import Sequence
from typing import Any

# SCM_MAX_FD is 253; a reload sends fewer per message
MAX_FDS = 250
MAX_MESSAGE = 128 * 1024
_FDS_SPACE = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)


class ChannelClosed(Exception):
    """The other side is gone."""


class Channel:
    """One end. Non-blocking: `receive` returns None when nothing is there."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock

    @staticmethod
    def pair() -> tuple[Channel, Channel]:
        a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        return Channel(a), Channel(b)

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> bool:
        """False when the other side does not take it: gone, or its queue is full because it hangs."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._sock.sendmsg([json.dumps(message).encode()], ancillary)
        except OSError:
            return False
        return True

    def receive(self) -> tuple[dict[str, Any], list[int]] | None:
        """The next message and its fds (owned by the caller); raises ChannelClosed at the end."""
        try:
            # not socket.recv_fds: it drops the flags, and the fds would survive an exec
            data, ancillary, _flags, _address = self._sock.recvmsg(
                MAX_MESSAGE, _FDS_SPACE, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None
        except OSError:
            raise ChannelClosed from None
        fds = array.array("i")
        for level, kind, value in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(value[: len(value) - len(value) % fds.itemsize])
        if not data:
            raise ChannelClosed
        message = json.loads(data)
        assert isinstance(message, dict)
        return message, list(fds)

    def close(self) -> None:
        self._sock.close()


def to_memfd(value: object, name: str = "tidegate-message") -> int:
    """An fd that holds `value`, pickled. Only between processes of one supervisor: never from outside."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    with os.fdopen(os.dup(fd), "wb") as file:
        pickle.dump(value, file)
    return fd


def from_memfd(fd: int) -> Any:
    """What `to_memfd` put there; closes the fd."""
    try:
        # each worker has this file, and all of them one position in it: reading must not move it
        return pickle.loads(os.pread(fd, os.fstat(fd).st_size, 0))
    finally:
        os.close(fd)
