"""One connection to the control socket: its requests, one after the other, and its answers."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from tidegate.control.framing import LineSplitter, LineTooLong
from tidegate.control.protocol import (
    MAX_REQUEST,
    PROTOCOL_VERSION,
    ErrorCode,
    MalformedError,
    VerbError,
    error_line,
    parse_request,
    read_args,
)
from tidegate.errors import OperatorError
from tidegate.loop.reactor import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT
from tidegate.loop.timers import Timer

if TYPE_CHECKING:
    from tidegate.control.server import ControlServer

# A peer that neither asks nor takes its answer for this long is closed.
IDLE_NS: Final = 60_000_000_000
# From the first byte of a request to its line end.
REQUEST_NS: Final = 10_000_000_000
# Requests answered in one turn of the loop: who sends thousands at once does not hold it for all of them.
REQUESTS_PER_TURN: Final = 8
# Bytes of answers that may wait for a peer before its next request is looked at.
OUT_HIGH: Final = 256 * 1024
# Bytes of events that may wait for a peer; further ones are counted and lost.
STREAM_HIGH: Final = 1 << 20
MAX_STREAMS: Final = 16
_READ: Final = 65536

_log = logging.getLogger("tidegate.control")


class EventStream:
    """The rest of a connection after a verb that streams: one JSON line per event."""

    def __init__(self, peer: Peer, request_id: int | str | None, on_close: Callable[[], None]) -> None:
        self._peer = peer
        self._head = f'{{"v":{PROTOCOL_VERSION},"id":{json.dumps(request_id)},'
        self.on_close = on_close
        self.lost = 0  # events that the peer was too slow for, since the last it was told of

    def send(self, event: str) -> None:
        """`event` is JSON. Never blocks: a peer that does not read loses events, and is told how many."""
        peer = self._peer
        if peer.out_bytes > STREAM_HIGH:
            self.lost += 1
            return
        text = ""
        if self.lost:
            text, self.lost = f'{self._head}"lost":{self.lost}}}\n', 0
        peer.push(f'{text}{self._head}"event":{event}}}\n'.encode())

    def end(self) -> None:
        """Nothing more comes: the connection is closed when what was sent is taken."""
        self._peer.end_stream()


class Peer:
    """One connection: requests are answered one after the other."""

    def __init__(self, server: ControlServer, sock: socket.socket, uid: int, pid: int) -> None:
        self.server = server
        self.sock = sock
        self.uid = uid
        self.pid = pid
        self.heard_ns = server.reactor.now
        self.busy = False  # a request is being answered
        self.stream: EventStream | None = None
        self._lines = LineSplitter(MAX_REQUEST)
        self._out = bytearray()
        self._advancing = False
        self._scheduled = False
        self._ended = False  # the peer sent all it will, or all we listen to
        self._closed = False
        self._interest = EPOLLIN
        self._partial_since_ns = 0  # a request has begun and not ended
        self._timer = Timer(self._on_timer)
        server.reactor.add(sock.fileno(), EPOLLIN, self._on_event)
        server.reactor.timers.arm(self._timer, server.reactor.now + IDLE_NS)

    @property
    def out_bytes(self) -> int:
        return len(self._out)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        reactor = self.server.reactor
        reactor.timers.cancel(self._timer)
        reactor.remove(self.sock.fileno())
        reactor.close_after_batch(self.sock)
        self.server.peers.discard(self)
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.on_close()

    # answers

    def answered(self, line: bytes) -> None:
        """The request is done: `line` goes out, and the next request may be looked at."""
        self.busy = False
        self.push(line)
        self._advance()

    def begin_stream(
        self, line: bytes, request_id: int | str | None, on_close: Callable[[], None]
    ) -> EventStream:
        """Stays busy for the rest of the connection: further requests are not looked at."""
        self.stream = EventStream(self, request_id, on_close)
        self.push(line)
        return self.stream

    def end_stream(self) -> None:
        stream, self.stream = self.stream, None
        if stream is None:
            return
        stream.on_close()
        self.busy = False
        self._lines.clear()
        self._ended = True
        self._advance()

    def push(self, data: bytes) -> None:
        if self._closed:
            return
        self._out += data
        if len(self._out) == len(data):  # nothing waited before: worth a try at once
            self._flush()

    # events

    def _on_event(self, mask: int) -> None:
        self.heard_ns = self.server.reactor.now
        if mask & EPOLLERR:
            self.close()
            return
        if mask & EPOLLOUT:
            self._flush()
            self._advance()
        if self._closed:
            return
        if mask & EPOLLIN and not self._ended:
            self._read()
        elif mask & EPOLLHUP:  # both directions are closed: nobody is left to answer
            self.close()

    def _read(self) -> None:
        try:
            data = self.sock.recv(_READ)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if data:
            self._lines.feed(data)
        else:
            self._ended = True
        self._advance()

    def _flush(self) -> None:
        try:
            sent = self.sock.send(self._out)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.close()
            return
        if sent:
            del self._out[:sent]
            self.heard_ns = self.server.reactor.now
        self._update_interest()

    # requests

    def _advance(self) -> None:
        """Look at what came, as far as the peer takes its answers and the loop's turn allows."""
        if self._advancing or self._closed:
            return  # an answer given at once: the loop below goes on
        self._advancing = True
        try:
            for _ in range(REQUESTS_PER_TURN):
                if self.busy or self._closed or len(self._out) > OUT_HIGH or not self._next():
                    break
            else:
                self._schedule()
        finally:
            self._advancing = False
        if self._closed:
            return
        if self._ended and not (self.busy or self._out or self._scheduled):
            self.close()
            return
        self._note_partial()
        self._update_interest()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self.server.reactor.call_after_batch(self._on_turn)

    def _on_turn(self) -> None:
        self._scheduled = False
        self._advance()

    def _next(self) -> bool:
        """Start on the next request; False when there is none."""
        try:
            line = self._lines.next()
            if line is None:
                return False
            request = parse_request(line)
        except LineTooLong:
            self._refuse(ErrorCode.TOO_LARGE, f"a request is one line of at most {MAX_REQUEST} bytes")
            return False
        except MalformedError as error:
            example = '{"v":1,"id":1,"verb":"status","args":{}}'
            self._refuse(ErrorCode.MALFORMED, f"{error}: a request is a line of JSON, {example}")
            return False
        self.busy = True
        name = request.verb
        verb = self.server.verbs.get(name) if isinstance(name, str) else None
        reply = self.server.start_request(
            self, request.id, str(name), request.args, verb is not None and verb.mutates
        )
        if request.version != PROTOCOL_VERSION or isinstance(request.version, bool):
            reply.error(
                ErrorCode.VERSION, f"this tidegate speaks version {PROTOCOL_VERSION} of the control protocol"
            )
            return True
        if verb is None:
            known = ", ".join(sorted(self.server.verbs))
            reply.error(ErrorCode.UNKNOWN_VERB, f"verb is one of: {known}")
            return True
        try:
            verb.run(read_args(verb.args, request.args), reply)
        except VerbError as error:
            reply.error(error.code, error.message)
        except OperatorError as error:
            reply.error(ErrorCode.FAILED, str(error))
        except Exception:
            _log.exception("control_verb_failed")
            reply.error(ErrorCode.INTERNAL_ERROR, f"{name} failed: see the log")
        return True

    def _refuse(self, code: ErrorCode, message: str) -> None:
        """What came is not our protocol: say so and close when it is said."""
        self._lines.clear()
        self._ended = True
        self.push(error_line(None, code, message))

    # what is watched

    def _update_interest(self) -> None:
        if self._closed:
            return
        # while a request is being answered nothing more is read: a flood waits in the peer's own buffer
        reading = not (self.busy or self._ended or self._scheduled or len(self._out) > OUT_HIGH)
        interest = (EPOLLIN if reading else 0) | (EPOLLOUT if self._out else 0)
        if interest != self._interest:
            self._interest = interest
            self.server.reactor.modify(self.sock.fileno(), interest)

    # time

    def _note_partial(self) -> None:
        """A request that drips in has a limit of its own, whatever the pace of its bytes."""
        reactor = self.server.reactor
        if self.busy or not len(self._lines) or self._lines.has_line():
            self._partial_since_ns = 0
        elif not self._partial_since_ns:
            self._partial_since_ns = reactor.now
            reactor.timers.arm(self._timer, reactor.now + REQUEST_NS)

    def _on_timer(self, now: int) -> None:
        due = self.heard_ns + IDLE_NS
        if self._partial_since_ns:
            due = min(due, self._partial_since_ns + REQUEST_NS)
        if self.busy:
            due = now + IDLE_NS
        if now >= due:
            self.close()
        else:
            self.server.reactor.timers.arm(self._timer, due)
