"""The sockets of one spliced direction, as session/splice.py sees them."""

from __future__ import annotations

import socket

from tidegate.kernel.splicing import KernelFlow, Splicing
from tidegate.session.splice import NEVER


class SocketEnds:
    """Reads into a buffer that others use too: what is read is gone with the next read."""

    __slots__ = ("_buffer", "_kernel", "_view", "flow")

    def __init__(self, buffer: bytearray, view: memoryview, kernel: Splicing, flow: KernelFlow) -> None:
        self._buffer = buffer
        self._view = view
        self._kernel = kernel
        self.flow = flow

    def read(self, most: int = NEVER) -> memoryview:
        return self._view[: self.flow.source.recv_into(self._buffer, min(most, len(self._buffer)))]

    def at_end(self) -> bool:
        try:
            return not self.flow.source.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False

    def write(self, data: memoryview) -> int:
        return self.flow.target.send(data)

    def enter(self) -> bool:
        return self._kernel.enter(self.flow)

    def leave(self) -> None:
        self._kernel.leave(self.flow)


class Taken:
    """When the peer of a target last took something: what leaves a send queue is progress."""

    __slots__ = ("_acked",)

    def __init__(self) -> None:
        self._acked = 0

    def ns(self, flow: KernelFlow, now: int) -> int:
        """As old as the ACK that said so; 0: it took nothing since the last call."""
        try:
            progress = flow.acknowledged()
        except OSError:  # closed meanwhile
            return 0
        if progress.acked == self._acked:
            return 0
        self._acked = progress.acked
        return now - progress.last_ack_ms * 1_000_000
