"""An HTTP/1.1 session: one client connection, from the first head to the last response.

The parts are modules of their own, each a class on top of the one before:
  http_state     the fields
  http_front     the client: heads, bodies, own answers, leaving
  http_exchange  the cluster: a place, a backend, a connection, retries
  http_response  the response
  http_bodies    bodies that the kernel moves
  http           (here) beginning, time, end, what others ask of a session
and what they speak is decided in the `http` package, which touches no socket.
"""

from __future__ import annotations

import logging
from time import monotonic_ns
from typing import Any, Final

from tidegate import logs
from tidegate.http.accesslog import Record
from tidegate.http.proxyproto import ProxyError, ProxyReader, not_trusted
from tidegate.http.ratelimit import retry_after_s
from tidegate.http.reader import BODY, FAILED
from tidegate.http.request import RequestParser, RequestRules
from tidegate.loop.timers import nothing
from tidegate.metrics.names import EndReason
from tidegate.metrics.segment import observe
from tidegate.session.context import reset, show_token
from tidegate.session.http_back import BackConnection
from tidegate.session.http_bodies import SplicedBodies
from tidegate.session.http_front import HEAD_RECV
from tidegate.session.http_shared import local_name
from tidegate.session.http_state import (
    BACKOFF,
    BYTES_IN,
    CLOSED,
    CONNECTING,
    DURATION,
    EXCHANGE,
    FLUSHING,
    HEAD,
    LINGER,
    NOT_WELL,
    PROXY,
    QUEUED,
    REQUESTS,
    STATE_NAMES,
    UPGRADES,
)
from tidegate.session.http_upgrade import Tunnel
from tidegate.session.tcp_state import format_peer

_log = logging.getLogger("tidegate.session")
_abnormal = logs.RateLimited(_log, per_second=10)
# Ends that are nothing to tell the operator of: clients do that.
_CLIENTS_CHOICE = frozenset(
    {EndReason.CLIENT_GONE, EndReason.CLIENT_RESET, EndReason.IDLE, EndReason.REQUEST_TIMEOUT}
)


_DONE: Final = EndReason.DONE

# What an ended session has in place of its parser.
_NO_PARSER: Final = RequestParser(RequestRules(b"http"))
_NO_PARSER.state = FAILED


class HttpSession(SplicedBodies):
    """Serves one client connection; see the module."""

    __slots__ = ()

    # beginning

    def start(self) -> None:
        ctx = self.ctx
        now = ctx.reactor.now
        address = self.peer[0] if isinstance(self.peer, tuple) else ""
        if self.http.expect_proxy:
            if address and not self.http.site.trusts(address):
                self._note(not_trusted(), format_peer(self.peer))
                self._end(EndReason.BAD_PROXY_HEADER, reset_front=True)
                return
            self._state = PROXY
            self._proxy = ProxyReader(self.http.listener.proxy_protocol)
            ctx.reactor.timers.arm(self._timer, now + self.http.first_tick_ns)
            self._read_proxy()
            return
        self._known_client(address)
        # One timer, armed once; see `_on_timer`.
        ctx.reactor.timers.arm(self._timer, now + self.http.first_tick_ns)
        self._read_head()

    def _known_client(self, address: str) -> None:
        self._peer = self.http.peer(address, self._local)
        counts = self.http.site.connections
        if counts is not None:
            self._counted = counts.enter(self._peer.address)
            self._over = not self._counted

    def _local(self) -> tuple[str, int]:
        if self._proxied is not None and self._proxied.destination is not None:
            return self._proxied.destination
        return local_name(self.front)

    def _read_proxy(self) -> None:
        reader = self._proxy
        assert reader is not None
        try:
            data = self.front.recv(HEAD_RECV)
            if not data:
                self._end(EndReason.CLIENT_GONE)
                return
            header = reader.receive(data)
        except BlockingIOError:
            self._listen()
            return
        except ProxyError as error:
            self._note(error, format_peer(self.peer))
            self._end(EndReason.BAD_PROXY_HEADER, reset_front=True)
            return
        except OSError:
            self._end(EndReason.CLIENT_RESET)
            return
        if header is None:
            self._listen()
            return
        self._proxy = None
        self._proxied = header
        self._state = HEAD
        if header.source is not None:
            # Its address is told in place of the socket's, and whether that is trusted is asked anew.
            self._peer = self.http.site.peer(header.source[0], self._local())
            counts = self.http.site.connections
            if counts is not None:
                self._counted = counts.enter(self._peer.address)
                self._over = not self._counted
        else:
            self._known_client(self.peer[0])
        if reader.rest:
            self.ctx.words[BYTES_IN] += len(reader.rest)
            self._bytes_in += len(reader.rest)
            self._heads(reader.rest)
        else:
            self._read_head()

    def _addresses(self) -> tuple[tuple[str, int] | None, tuple[str, int] | None]:
        """Who the client is and where it connected to, for a PROXY header to a backend."""
        header = self._proxied
        if header is not None and header.source is not None:
            return header.source, header.destination
        if not isinstance(self.peer, tuple):
            return None, None
        local = self._local()
        return (self.peer[0], self.peer[1]), local if local[0] else None

    def _adopt_configuration(self) -> None:
        """A reload came between two requests: the next one is served by the new rules."""
        http = self.ctx.http
        assert http is not None
        before, self.http = self.http, http
        if before.log is None:
            self._bytes_in = 0
        self._parser.forget()
        if before.site.connections is not http.site.connections:
            if self._counted and before.site.connections is not None:
                before.site.connections.leave(self._peer.address)
            self._counted = self._over = False
        source = self._proxied.source[0] if self._proxied and self._proxied.source else ""
        self._peer = http.site.peer(
            source or (self.peer[0] if isinstance(self.peer, tuple) else ""), self._local()
        )

    def _limited(self, now: int) -> bool:
        """Whether the client is over a limit; then it was answered."""
        rate = self.http.site.rate
        if self._over:
            self._answer(429, EndReason.LIMITED, retry_after_s=1, close=True)
            return True
        wait_ns = rate.take(self._peer.address, now) if rate is not None else 0
        if wait_ns:
            self._answer(429, EndReason.LIMITED, retry_after_s=retry_after_s(wait_ns))
        return wait_ns > 0

    # the end of a response

    def _response_over(self, reason: EndReason) -> None:
        ctx = self.ctx
        words = ctx.words
        words[REQUESTS[self._status // 100]] += 1
        if reason is not _DONE:
            words[NOT_WELL[reason]] += 1
        now = monotonic_ns()  # not the batch's: an answer of our own begins and ends within one
        observe(words, DURATION, now - self._head_ns)
        if self.http.log is not None:
            self._write_record(reason, now)
        self._in_request = False
        if self._out:
            self._state = FLUSHING
        else:
            self._after_response()

    # the access log

    def _begin_record(self, *, named: bool = True) -> None:
        self._named = named
        self._request.id = b""  # it has none unless it goes to a backend
        self._connect_ns = self._first_byte_ns = -1
        self._served_by = None
        self._bytes_out = 0

    def _write_record(self, reason: EndReason, now: int) -> None:
        http, request = self.http, self._request
        record = Record()
        record.client = self._peer.address.decode("ascii")
        if self._named:
            record.method = request.method
            record.host = request.host
            record.path = request.raw_target
            record.request_id = request.id
        record.status = self._status
        unread = len(self._parser.rest) if self._named else 0  # the next request's
        record.bytes_in = self._bytes_in - unread
        self._bytes_in = unread
        record.bytes_out = self._bytes_out
        if self._first_request:
            record.queue_age_ns = self.started_ns - self.established_ns
        record.total_ns = now - self._head_ns
        record.connect_ns = self._connect_ns
        if self._first_byte_ns >= 0:
            record.first_byte_ns = self._first_byte_ns - self._head_ns
        if self._served_by is not None:
            record.backend = self._served_by.name
        record.retries = self._retries
        record.reused = self._reused
        record.end_reason = f"{reason.value}:{self._fault}" if self._fault else reason.value
        http.write(record, self.ctx.words, now)

    # time

    def _deadline(self) -> tuple[int, EndReason]:
        """When silence ends what is going on now, ns, and as what."""
        if self.splice is not None:
            self.splice.sync()
            return self.splice.deadline
        state, listener = self._state, self.http.listener
        if state == HEAD:
            if self._first_request or self._partial:
                return self._since_ns + listener.request_timeout_ns, EndReason.REQUEST_TIMEOUT
            return self._since_ns + listener.keepalive_timeout_ns, EndReason.IDLE
        if state == PROXY:
            return self.established_ns + listener.request_timeout_ns, EndReason.REQUEST_TIMEOUT
        if state == EXCHANGE and not self._out:
            back = self._back_ns + self._cluster.state.config.back_timeout_ns
            if not self._back_out and self._parser.state == BODY and not self._upstream_broken:
                # The client's turn; while it is silent the backend may speak.
                return self.last_progress_ns + listener.front_timeout_ns, EndReason.FRONT_TIMEOUT
            return back, EndReason.BACK_TIMEOUT
        if state in (EXCHANGE, FLUSHING):
            return self._front_ns + listener.front_timeout_ns, EndReason.FRONT_TIMEOUT
        if state == QUEUED:
            return self.ctx.reactor.now + self.http.tick_ns, EndReason.OVERLOADED  # the gate's own clock runs
        return self._wake_ns, EndReason.DONE

    def _on_timer(self, now: int) -> None:
        """Fires at least every `tick_ns`, which no timeout is shorter than, or at `_wake_ns`.

        So no event has to move it: whatever was begun since it was armed is not due yet.
        """
        deadline, reason = self._deadline()
        if now >= deadline:
            self._timed_out(now, reason)
            if self._state == CLOSED or self._timer.armed:
                return
            deadline, _ = self._deadline()
        if self._front_watch == -1 and self._state != CLOSED:
            self._listen()
        if self._state != CLOSED:
            self.ctx.reactor.timers.arm(self._timer, max(now + 1, min(deadline, now + self.http.tick_ns)))

    def _timed_out(self, now: int, reason: EndReason) -> None:
        state = self._state
        if state == HEAD:
            if self._partial:
                self._must_linger = True
                self._reason = reason
                self._answer(408, reason, close=True)
            else:
                self._end(reason)  # nothing was asked: nothing is answered
        elif state == CONNECTING:
            self._connect_failed(now, 504)
        elif state == BACKOFF:
            self._next_attempt(now)
        elif state == LINGER:
            self._end(self._reason)
        elif reason is EndReason.BACK_TIMEOUT:
            self._response_failed(reason, 504)
        elif state == EXCHANGE and not self._head_sent:
            self._drop_back()
            self._leave_gate(now)
            self._reason = reason
            self._answer(408, reason, close=True)
        else:
            self._end(reason, reset_front=True)

    # upgrades

    def _tunnel(self, conn: BackConnection) -> None:
        """101 was passed on: from here on the connection is bytes both ways, and another session's."""
        backend, cluster, ctx = self._backend, self._cluster, self.ctx
        assert backend is not None
        if self._parser.state == BODY:  # an upgrade before the request's end: nobody knows where it begins
            self._response_failed(EndReason.BAD_RESPONSE)
            return
        self._leave_gate(ctx.reactor.now)
        if self._front_watch != -1:
            ctx.reactor.remove(self.front.fileno())
        ctx.reactor.remove(conn.fd)
        cluster.pool.closed(backend)
        early_up, early_down = self._parser.rest, self._out + conn.parser.rest
        self._in_request = False
        words = ctx.words
        words[REQUESTS[1]] += 1
        if self.http.log is not None:
            self._write_record(EndReason.DONE, monotonic_ns())
        self._state = CLOSED
        lanes = [lane for lane in (self.lane, conn.lane) if lane is not None]
        self.lane = conn.lane = None
        self._let_go()
        conn.user = None
        words[UPGRADES] += 1
        tunnel = Tunnel(ctx, self.front, self.peer, self.established_ns, cluster.state)
        tunnel.keep(lanes)
        tunnel.adopt(conn.sock, backend, early_up, early_down)

    # what others ask

    def describe(self) -> dict[str, Any]:
        now = self.ctx.reactor.now
        return {
            "token": show_token(self.token),
            "protocol": "http",
            "listener": self.ctx.listener.name,
            "state": STATE_NAMES[self._state],
            "client": format_peer(self.peer),
            "cluster": self._cluster.state.config.name if self._in_request and self._served_by else "",
            "backend": self._served_by.name if self._in_request and self._served_by else "",
            "age_ms": (now - self.established_ns) // 1_000_000,
            "idle_ms": (now - self.last_progress_ns) // 1_000_000,
            "first_request": self._first_request,
            "status": self._status if self._in_request else 0,
            "pending_in": len(self._back_out),
            "pending_out": len(self._out),
            "spliced": self.splice is not None,
            "fault": self._fault,
        }

    def drain(self) -> None:
        """`ctx.draining` is set: finish what is under way; a connection between requests ends now."""
        if self._state == HEAD and not self._first_request and not self._partial and not self._out:
            self._end(EndReason.DONE)

    def end(self, reason: EndReason) -> None:
        self._end(reason, reset_front=self._in_request)

    def _end(self, reason: EndReason, *, reset_front: bool = False) -> None:
        state = self._state
        if state == CLOSED:
            return
        ctx = self.ctx
        if reason is not _DONE and _log.isEnabledFor(logging.INFO):
            level = logging.DEBUG if reason in _CLIENTS_CHOICE else logging.INFO
            _abnormal.event(level, "session_ended", reason=reason.value, **self.describe())
        if state == QUEUED and self._entered is not None:
            self._entered.cancel(self)
            self._entered = None
        if self._backend is not None or self.splice is not None:
            self._drop_back()
        self._state = CLOSED
        if self._entered is not None:
            self._leave_gate(ctx.reactor.now)
        if self._in_request:
            words = ctx.words
            words[REQUESTS[self._status // 100 if self._head_sent else 0]] += 1
            words[NOT_WELL[reason]] += 1
            if self.http.log is not None:
                self._write_record(reason, monotonic_ns())
        reset_front = reset_front or (self.lane is not None and self.lane.body.unread)
        if self._front_watch != -1:
            ctx.reactor.forget(self.front.fileno())
        ctx.reactor.close_after_batch(self.front)
        self._let_go()
        if reset_front:
            reset(self.front)
        ctx.on_end(self, reason)

    def _let_go(self) -> None:
        """Of all but the socket."""
        ctx = self.ctx
        ctx.reactor.timers.abandon(self._timer)
        self._timer.callback = nothing
        self._conn = self._backend = None
        if self.lane is not None:
            self.lane.close()
            self.lane = None
        site = self.http.site
        if self._counted and site.connections is not None:
            site.connections.leave(self._peer.address)
        # Another session's from here on: whatever should still look at it must find none.
        site.give_back(self._parser)
        self._parser = _NO_PARSER
        self._request = _NO_PARSER.request
        ctx.slab.remove(self.token)
