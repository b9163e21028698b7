"""After 101: the connection is relayed as bytes, by the TCP session's own means."""

from __future__ import annotations

from typing import Any

from tidegate.session.tcp import TcpSession


class Tunnel(TcpSession):
    """Takes both sockets over (`adopt`) from an HTTP session that ends in the same moment."""

    __slots__ = ()

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "protocol": "upgraded"}

    def _owed(self) -> bool:
        # What an upgraded connection says need not be answered: only a backend that takes nothing owes.
        return self._up.pending is not None
