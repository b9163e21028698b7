"""What an HTTP session does around a body that the kernel moves, however that ends."""

from __future__ import annotations

from collections.abc import Callable

from tidegate.metrics.names import EndReason
from tidegate.session.http_back import BackConnection
from tidegate.session.http_response import ResponseSide


class SplicedBodies(ResponseSide):
    """See the module; session/http_splice.py calls."""

    __slots__ = ()

    def listen_for(self, callback: Callable[[int], None]) -> None:
        """Events of the client's socket go there."""
        reactor, fd = self.ctx.reactor, self.front.fileno()
        if self._front_watch == -1:
            self._front_watch = 0
            reactor.add(fd, 0, callback)
        else:
            reactor.redirect(fd, callback)

    @property
    def front_deadline_ns(self) -> int:
        return self._front_ns + self.http.listener.front_timeout_ns

    @property
    def back_deadline_ns(self) -> int:
        return self._back_ns + self._cluster.state.config.back_timeout_ns

    def body_moved(self, up: int, down: int, front_ns: int, back_ns: int) -> None:
        """So many bytes either way, and when each side last gave or took some."""
        self._bytes_in += up
        self._bytes_out += down
        self._front_ns = max(self._front_ns, front_ns)
        self._back_ns = max(self._back_ns, back_ns)

    def body_over(self, conn: BackConnection, down: bool) -> None:
        """Its last byte is in the target's TCP."""
        if down:
            self._response_done(conn)
        else:
            self._back_ns = self.ctx.reactor.now  # from now on it is the backend's turn
            self._update_back()
            self._listen()

    def copy_on(self, rest: bytes) -> None:
        """The rest of the request goes on by copying; `rest` was read and goes first."""
        self._back_out = rest
        self._update_back()
        self._listen()

    def response_cut(self, short: bool) -> None:
        """The backend is gone in the middle of a body: by FIN when it is `short`, else by a reset."""
        self._response_failed(EndReason.BACKEND_CLOSED if short else EndReason.BACKEND_RESET)

    def request_cut(self, short: bool) -> None:
        """The same of the client."""
        self._end(EndReason.CLIENT_GONE if short else EndReason.CLIENT_RESET)
