"""After 101: the connection is relayed as bytes, by the TCP session's own means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tidegate.metrics.names import EndReason
from tidegate.session.splice import NEVER
from tidegate.session.tcp import TcpSession

if TYPE_CHECKING:
    from tidegate.session.http_splice import Lane


class Tunnel(TcpSession):
    """Takes both sockets over (`adopt`) from an HTTP session that ends in the same moment."""

    __slots__ = ("_lanes",)

    def keep(self, lanes: list[Lane]) -> None:
        """What the kernel knows of our sockets already: then it moves no byte of this session."""
        self._lanes = lanes
        if lanes:
            self._splice_at = NEVER

    def _end(self, reason: EndReason, *, reset_front: bool = False, reset_back: bool = False) -> None:
        for lane in self._lanes:
            lane.close()
        self._lanes = []
        super()._end(reason, reset_front=reset_front, reset_back=reset_back)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "protocol": "upgraded"}

    def _owed(self) -> bool:
        # What an upgraded connection says need not be answered: only a backend that takes nothing owes.
        return self._up.pending is not None
