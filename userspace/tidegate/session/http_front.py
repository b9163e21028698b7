"""The client's side of an HTTP session: what is read from it, what is written to it, how it is left."""

from __future__ import annotations

from socket import MSG_MORE, SHUT_WR
from typing import Final, TypedDict

from tidegate.config.model import FixedAnswer
from tidegate.http.answers import ALLOW, CLOSING
from tidegate.http.errors import PeerError, RequestError
from tidegate.http.headers import forwards_left
from tidegate.http.reader import BODY, COMPLETE
from tidegate.http.request import Request
from tidegate.http.routes import Action, Kind, ambiguous, location
from tidegate.loop.reactor import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP
from tidegate.metrics.names import EndReason
from tidegate.session import http_state as st
from tidegate.session.http_splice import SPLICE_LEAST, BodySplice
from tidegate.session.http_state import (
    ANSWERS,
    BYTES_IN,
    BYTES_OUT,
    CLOSED,
    EXCHANGE,
    FLUSHING,
    HEAD,
    LINGER,
    PROXY,
    WATCHED,
    HttpState,
)
from tidegate.session.refusals import RING as refusals  # noqa: N811 - one per process
from tidegate.session.splice import NEVER

# One read for a head: most are far smaller, and what a pipelining client sends beyond it waits in the kernel.
HEAD_RECV: Final = 16 * 1024
# As the worker's shared buffer: what a socket of default size holds.
BODY_RECV: Final = 64 * 1024

_CLUSTER: Final = Kind.CLUSTER
_NOTHING: Final = FixedAnswer(204)


class Manner(TypedDict):
    """How a request wants its answer."""

    head_only: bool
    close: bool
    http10: bool


class FrontSide(HttpState):
    """See the module."""

    __slots__ = ()

    # what the socket is watched for

    def _watch(self, interest: int) -> None:
        watched = self._front_watch
        if interest != watched:
            self._front_watch = interest
            reactor = self.ctx.reactor
            if watched == -1:
                reactor.add(self.front.fileno(), interest, self._on_front)
            else:
                reactor.modify(self.front.fileno(), interest)

    def _listen(self) -> None:
        """Watch for all there is; also what calls to `_quiet` made deaf hears again."""
        self._watch(WATCHED | EPOLLOUT if self._out else WATCHED)

    def _quiet(self, keep: int) -> None:
        """Something came that has to wait: level-triggered, it would be told over and over."""
        self._watch(keep | EPOLLOUT if self._out else keep)

    def _on_front(self, mask: int) -> None:
        if mask == EPOLLIN and self._state == HEAD and not self._out:
            self._read_head()  # nearly always
            return
        if mask & EPOLLOUT:
            self._flush_front()
            if self._state == CLOSED:
                return
        state = self._state
        if mask & (EPOLLERR | EPOLLHUP):
            self._front_broken()
        elif state == HEAD:
            if self._out:
                self._quiet(0)
            elif mask & EPOLLIN:
                self._read_head()
        elif state == EXCHANGE and self._parser.state == BODY and not self._upstream_broken:
            if self._back_out:
                self._quiet(0)
            elif mask & EPOLLIN:
                self._read_body()
        elif state == LINGER:
            self._read_away()
        elif state == PROXY:
            self._read_proxy()
        elif mask & EPOLLRDHUP:
            if self.ctx.listener.abort_on_close and self._in_request and not self._head_sent:
                self._end(EndReason.CLIENT_GONE)
            else:
                self._quiet(0)
        elif mask & EPOLLIN:
            self._quiet(EPOLLRDHUP)

    def _front_broken(self) -> None:
        if self._state == LINGER:
            self._end(self._reason)
        elif self._state == HEAD and not self._first_request:
            self._end(EndReason.DONE)  # nothing was lost by it
        else:
            self._end(EndReason.CLIENT_RESET)

    # reading

    def _read_head(self) -> None:
        try:
            data = self.front.recv(HEAD_RECV)
        except BlockingIOError:
            self._listen()
            return
        except OSError:
            self._front_broken()
            return
        if not data:
            gone = self._first_request or not self._parser.idle
            self._end(EndReason.CLIENT_GONE if gone else EndReason.DONE)
            return
        ctx = self.ctx
        size = len(data)
        self._front_ns = ctx.reactor.now
        ctx.words[BYTES_IN] += size
        if self.lane is not None:
            self.lane.body.skip(size)
        if self.http is not ctx.http:
            self._adopt_configuration()
        self._bytes_in += size
        self._heads(data)

    def _heads(self, data: bytes) -> None:
        """One request after the other, until one has to wait for a backend or the client."""
        parser = self._parser
        while True:
            try:
                request = parser.receive_head(data)
            except RequestError as error:
                self._refuse(error)
                return
            if request is None:
                if not self._partial:
                    self._partial = True
                    if not self._first_request:
                        self._since_ns = self.ctx.reactor.now
                break
            self._looping = True
            self._serve(request)
            self._looping = False
            if self._state != HEAD:  # nearly always: a backend has it now
                return
            if self._out or not parser.rest:
                break
            data = b""
        if self._front_watch != WATCHED:
            self._listen()

    def _read_body(self) -> None:
        try:
            data = self.front.recv(BODY_RECV)
        except BlockingIOError:
            return
        except OSError:
            self._end(EndReason.CLIENT_RESET)
            return
        if not data:
            self._end(EndReason.CLIENT_GONE)
            return
        ctx = self.ctx
        self._front_ns = ctx.reactor.now
        size = len(data)
        ctx.words[BYTES_IN] += size
        self._bytes_in += size
        if self.lane is not None:
            self.lane.body.skip(size)
        try:
            payload = self._parser.receive_body(data)
        except RequestError as error:
            self._refuse(error)
            return
        if payload:
            self._to_back(payload)
        conn = self._conn
        if (
            self._parser.left > SPLICE_LEAST
            and conn is not None
            and not self._back_out
            and not self._head_sent
        ):
            BodySplice.begin(self, conn, down=False)

    def _read_away(self) -> None:
        try:
            if count := self.front.recv_into(self.ctx.buffer):
                if self.lane is not None:
                    self.lane.body.skip(count)
                return
        except BlockingIOError:
            return
        except OSError:
            pass  # it left the hard way: as good as the soft one now
        self._end(self._reason)

    # serving

    def _serve(self, request: Request) -> None:
        now = self.ctx.reactor.now
        http = self.http
        site = http.site
        self._in_request = True
        self._partial = self._head_sent = self._reused = False
        self._head_ns = now
        self._status = 0
        self._retries = 0
        self._served_by = None
        self.splice_below = NEVER
        action: Action | None = request.route
        if action is None:
            action = request.route = site.routes.find(request)
        if http.log is not None:
            self._begin_record()
        if (site.rate is not None or self._over) and self._limited(now):
            return
        if action.kind is _CLUSTER and request.fields.max_forwards is None:
            self._begin(action, request)
        else:
            self._answer_route(action, request)

    def _answer_route(self, action: Action, request: Request) -> None:
        if action.kind is Kind.CLUSTER:
            if forwards_left(request):
                self._begin(action, request)
            elif request.method == b"OPTIONS":  # RFC 9110 7.6.2: we are the final recipient
                self._send_answer(self.http.site.answers.fixed(_NOTHING, extra=ALLOW, **self._manner()), 204)
            else:
                self._answer(405)
            return
        if action.kind is Kind.REDIRECT:
            to = location(action, request, self._peer.local)
            answers = self.http.site.answers
            self._send_answer(answers.redirect(action.status, to, **self._manner()), action.status)
        elif action.kind is Kind.ANSWER:
            assert action.answer is not None
            answer = self.http.site.answers.fixed(action.answer, **self._manner())
            self._send_answer(answer, action.status)
        elif action.kind is Kind.AMBIGUOUS:
            self._note(ambiguous(request))
            self._answer(action.status, EndReason.BAD_REQUEST)
        else:
            self._answer(action.status)

    def _manner(self) -> Manner:
        """Also decides whether the connection goes on."""
        request = self._request
        if self._parser.state == BODY:  # a small one is here already, and need not cost the connection
            try:
                self._parser.receive_body(b"")
            except RequestError:
                self._closing = True
        if self._parser.state != COMPLETE:
            self._closing = self._must_linger = True
        elif not request.keep_alive or self.ctx.draining:
            self._closing = True
        return Manner(head_only=request.method == b"HEAD", close=self._closing, http10=request.http10)

    def _answer(
        self,
        status: int,
        reason: EndReason = EndReason.DONE,
        *,
        retry_after_s: int = 0,
        close: bool = False,
    ) -> None:
        """Our own answer to the request under way, or, after what is no request, to the connection."""
        self._closing = self._closing or close or status in CLOSING
        if self._in_request:
            manner = self._manner()
        else:
            self._in_request = self._closing = True
            self._head_ns = self._begun_ns()
            self._status = self._retries = 0
            self._reused = False
            if self.http.log is not None:
                self._begin_record(named=False)
            manner = Manner(head_only=False, close=True, http10=False)
        answer = self.http.site.answers.answer(status, retry_after_s=retry_after_s, **manner)
        self._send_answer(answer, status, reason)

    def _begun_ns(self) -> int:
        """Since when there has been something of the request whose head is not whole, or never will be."""
        if not self._partial:
            return self.ctx.reactor.now
        return self.started_ns if self._first_request else self._since_ns

    def _send_answer(self, answer: bytes, status: int, reason: EndReason = EndReason.DONE) -> None:
        self.ctx.words[ANSWERS] += 1
        self._status = status
        self._head_sent = True
        self._to_front(answer, self._closing)
        if self._state != CLOSED:
            self._response_over(reason)

    def _note(self, error: PeerError, client: str = "", side: str = "client") -> None:
        """For the ring of refused messages; `client` where its PROXY header has not named it."""
        self._fault = error.fault
        client = client or self._peer.address.decode("ascii")
        refusals.note(error, listener=self.ctx.listener.name, client=client, side=side)

    def _refuse(self, error: RequestError) -> None:
        """The client broke the protocol: answer if that is still possible, then close."""
        self._note(error)
        self._must_linger = True
        self._reason = EndReason.BAD_REQUEST
        self._drop_back()
        if self._in_request and self._head_sent:
            self._cut(EndReason.BAD_REQUEST)
        else:
            self._answer(error.status, EndReason.BAD_REQUEST, close=True)

    # writing

    def _to_front(self, data: bytes, last: bool = False) -> None:
        """Send it, or keep what the client does not take yet and stop reading the backend.

        `last`: the connection's end follows. Both go in one segment then: half as much for both hosts to do.
        """
        ctx = self.ctx
        size = len(data)
        self._bytes_out += size
        ctx.words[BYTES_OUT] += size
        if self._out:
            self._out += data
            return
        try:
            sent = self.front.send(data, MSG_MORE) if last else self.front.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._end(EndReason.CLIENT_RESET)
            return
        self._front_ns = ctx.reactor.now
        if last and sent == size:
            # Not by close(): over bytes that nobody read it would throw away what it has not sent yet.
            try:
                self.front.shutdown(SHUT_WR)
            except OSError:
                return  # it is gone, which is nothing to this response any more
        elif sent < size:
            self._out = data[sent:]
            watched = self._front_watch
            self._watch((WATCHED if watched == -1 else watched) | EPOLLOUT)
            self._update_back()

    def _flush_front(self) -> None:
        out = self._out
        if not out:
            return
        try:
            sent = self.front.send(out)
        except BlockingIOError:
            return
        except OSError:
            self._end(EndReason.CLIENT_RESET)
            return
        self._front_ns = self.ctx.reactor.now
        if sent < len(out):
            self._out = out[sent:]
            return
        self._out = b""
        self._watch(self._front_watch & ~EPOLLOUT)
        if self._state == FLUSHING:
            self._after_response()
        elif self._state == HEAD:
            self._heads(b"")
        else:
            self._update_back()

    def _after_response(self) -> None:
        """Every byte of a response is with the kernel: the next request, or the end."""
        if self._closing:
            self._leave()
            return
        parser = self._parser
        parser.next()
        self._state = HEAD
        self._first_request = False
        self._since_ns = self.ctx.reactor.now
        if self._looping:
            return
        if self.ctx.draining and not parser.rest:
            self._end(EndReason.DONE)
        elif parser.rest:
            self._heads(b"")
        elif self._front_watch != WATCHED:
            self._listen()

    # leaving

    def _leave(self) -> None:
        """Close once the client has had a chance to read what it was sent.

        Closing with bytes unread makes a reset of it, which may overtake the answer: then what the client
        still sends is read away, until it closes or for a while (RFC 9112 9.6).
        """
        unread = self._must_linger or self._parser.rest or self._front_watch not in (-1, WATCHED)
        if not unread and not self._request.keep_alive:
            self._end(self._reason)
            return
        try:
            self.front.shutdown(SHUT_WR)
        except OSError:
            self._end(self._reason)
            return
        self._state = LINGER
        self._wake_ns = self.ctx.reactor.now + st.LINGER_NS
        self.ctx.reactor.timers.arm(self._timer, self._wake_ns)
        self._watch(EPOLLIN)

    def _cut(self, reason: EndReason) -> None:
        """End in the middle of a response, so that the client can tell."""
        self._end(reason, reset_front=self._by_close)
