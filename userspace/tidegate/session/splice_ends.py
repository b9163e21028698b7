"""The sockets of one spliced direction, as session/splice.py sees them."""

from __future__ import annotations

from tidegate.kernel.splicing import KernelFlow, Splicing

# More than a receive queue holds at default settings; only what is received takes memory.
DRAIN_SIZE = 8 << 20


class SocketEnds:
    """Reads into a buffer that others use too: what is read is gone with the next read."""

    __slots__ = ("_buffer", "_kernel", "_view", "flow")

    def __init__(self, buffer: bytearray, view: memoryview, kernel: Splicing, flow: KernelFlow) -> None:
        self._buffer = buffer
        self._view = view
        self._kernel = kernel
        self.flow = flow

    def read(self) -> memoryview:
        return self._view[: self.flow.source.recv_into(self._buffer)]

    def drain(self) -> tuple[bytes, bool]:
        """By one call that asks for more than there is: it ends where the receive queue did.

        To read until it would block does not end: on loopback each recv() opens the window, and what the
        sender then sends is there before recv() returns.
        """
        buffer = bytearray(DRAIN_SIZE)
        try:
            size = self.flow.source.recv_into(buffer)
        except BlockingIOError:
            return b"", True
        return bytes(memoryview(buffer)[:size]), 0 < size < DRAIN_SIZE  # 0: its FIN

    def write(self, data: memoryview) -> int:
        return self.flow.target.send(data)

    def enter(self) -> None:
        self._kernel.enter(self.flow)
