"""The sockets of one spliced direction, as session/splice.py sees them."""

from __future__ import annotations

from tidegate.kernel.splicing import KernelFlow, Splicing


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

    def write(self, data: memoryview) -> int:
        return self.flow.target.send(data)

    def enter(self) -> bool:
        return self._kernel.enter(self.flow)
