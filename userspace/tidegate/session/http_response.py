"""The response's way: from the backend to the client, and what becomes of the connection behind it."""

from __future__ import annotations

import logging
from typing import Final

from tidegate import logs
from tidegate.http.answering import must_close
from tidegate.http.cookies import set_cookie
from tidegate.http.errors import ResponseError
from tidegate.http.reader import BODY as BODY_STATE
from tidegate.http.reader import COMPLETE, HEAD, TUNNEL
from tidegate.http.response import CLOSE, ResponseParser
from tidegate.loop.reactor import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT
from tidegate.metrics.names import EndReason
from tidegate.session.http_back import BackConnection
from tidegate.session.http_exchange import BackSide
from tidegate.session.http_splice import SPLICE_LEAST, BodySplice
from tidegate.session.http_state import CLOSED, CONNECTING, EXCHANGE
from tidegate.session.splice import NEVER

BACK_RECV: Final = 64 * 1024
_DONE: Final = EndReason.DONE

_failed = logs.RateLimited(logging.getLogger("tidegate.session"), per_second=10)


class ResponseSide(BackSide):
    """See the module."""

    __slots__ = ()

    def _tunnel(self, conn: BackConnection) -> None:
        raise NotImplementedError

    def on_back(self, mask: int) -> None:
        conn = self._conn
        assert conn is not None
        if mask == EPOLLIN and self._state == EXCHANGE and not self._out:
            self._read_back(conn)  # nearly always
            return
        if self._state == CONNECTING:
            self._on_connect_event(mask)
            if not mask & EPOLLIN:
                return
        elif mask & EPOLLOUT:
            self._flush_back()
        if mask & (EPOLLIN | EPOLLERR | EPOLLHUP) and conn is self._conn:
            if not self._out:
                self._read_back(conn)
            elif mask & (EPOLLERR | EPOLLHUP):
                conn.park()  # told for ever otherwise; what it sent is read when the client has room

    def _read_back(self, conn: BackConnection) -> None:
        now = self.ctx.reactor.now
        parser = conn.parser
        try:
            data = conn.sock.recv(BACK_RECV)
        except BlockingIOError:
            return
        except OSError:
            if parser.untouched:
                self._closed_untouched(now)
            else:
                self._response_failed(EndReason.BACKEND_RESET)
            return
        self._back_ns = now
        if conn.lane is not None:
            conn.lane.body.skip(len(data))
        try:
            if parser.state == HEAD:
                if not data and parser.untouched:
                    self._closed_untouched(now)
                    return
                out = self._response_head(data, parser) if data else parser.end()
            elif data:
                out = parser.receive_body(data)
            else:
                out = parser.end()
        except ResponseError as error:
            self._note(error, side="backend")
            self._response_failed(EndReason.BAD_RESPONSE if data else EndReason.BACKEND_CLOSED)
            return
        if out:
            self._to_front(out, self._closing and parser.state == COMPLETE)
            if self._state == CLOSED:
                return
        if parser.state == COMPLETE:
            self._response_done(conn)
        elif parser.state == TUNNEL:
            self._tunnel(conn)
        elif parser.left > SPLICE_LEAST and not self._out and self._parser.state == COMPLETE:
            BodySplice.begin(self, conn, down=True)

    def _response_head(self, data: bytes, parser: ResponseParser) -> bytes:
        """What the bytes so far make for the client: interim heads, the head, what came of the body."""
        request = self._request
        form = self.http.site.response_form
        out = b""
        body_at = parser.same_again(data)
        response = parser.last if body_at else parser.receive_head(data)
        while response is not None and response.interim:
            out += form.head(response, parser, request, False)
            response = parser.receive_head(b"")
        if response is None:
            return out
        backend = self._backend
        assert backend is not None
        if backend.failures or backend.probation:
            self._cluster.state.succeeded(backend, self._back_ns)
        closing = (
            must_close(request, parser)
            or self._parser.state != COMPLETE  # it answers early: what of the request is still to come
            or self._back_out != b""  # cannot be told from a next one by who takes it for wanted
            or self.ctx.draining
        )
        extra = b""
        cluster = self._cluster
        if cluster.sticky is not None and self._sticky_named is not backend:
            secure = self.http.site.scheme == b"https"
            extra = set_cookie(cluster.cookie, cluster.sticky.value(backend), secure)
        head = form.head(response, parser, request, closing, self._action.response_edits, extra)
        if body_at:
            head += data[body_at:]
        elif parser.state == BODY_STATE:
            head += parser.receive_body(b"")
        self._closing = closing
        self._must_linger = self._parser.state != COMPLETE
        self._by_close = parser.framing == CLOSE
        self._status = response.status
        self._first_byte_ns = self._back_ns
        self._head_sent = True
        self.splice_below = NEVER
        return out + head if out else head

    def _response_done(self, conn: BackConnection) -> None:
        """The response is whole, and the client's, or in `_out`."""
        backend, cluster = self._backend, self._cluster
        assert backend is not None
        now = self._back_ns
        self._conn = self._backend = None
        if (
            conn.parser.free
            and self._parser.state == COMPLETE
            and not self._back_out
            and cluster.pooled
            and (conn.lane is None or conn.lane.body.leave())
        ):
            conn.user = None
            if conn.interest != EPOLLIN:
                conn.watch(EPOLLIN)
            cluster.pool.checkin(backend, conn, now)
        else:
            cluster.pool.closed(backend)
            conn.close()
        cluster.state.released(backend)
        if self._entered is not None:
            self._leave_gate(now)
        self._back_out = b""
        self._response_over(_DONE)

    def _response_failed(self, reason: EndReason, status: int = 502) -> None:
        """No (more) response: answer if nothing of one was passed on, else cut."""
        backend = self._backend
        assert backend is not None
        now = self.ctx.reactor.now
        self._cluster.state.failed(backend, now)
        self._drop_back()
        self._leave_gate(now)
        if self._head_sent:
            self._cut(reason)
            return
        _failed.event(
            logging.INFO,
            "response_failed",
            listener=self.ctx.listener.name,
            backend=backend.name,
            reason=reason.value,
            fault=self._fault or None,
            status=status,
        )
        self._answer(status, reason)
        self._fault = ""  # the connection goes on, and the next request is another
