"""What an HTTP session is made of, and its states."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from tidegate.http.forwarded import Peer
from tidegate.http.proxyproto import ProxyHeader, ProxyReader
from tidegate.http.request import Request
from tidegate.loop.reactor import EPOLLIN, EPOLLRDHUP
from tidegate.loop.timers import Timer
from tidegate.metrics.names import LISTENER, EndReason, StatusClass
from tidegate.session.context import Context
from tidegate.session.http_shared import Queued
from tidegate.session.splice import NEVER

if TYPE_CHECKING:
    from tidegate.cluster.backend import BackendState
    from tidegate.cluster.inflight import Gate
    from tidegate.cluster.retry import RetryPlan
    from tidegate.http.routes import Action
    from tidegate.session.http_back import BackConnection
    from tidegate.session.http_shared import HttpCluster
    from tidegate.session.http_splice import BodySplice, Lane

# PROXY: a PROXY header is expected. HEAD: no request, or a part of its head. QUEUED: waits at the cluster's
# gate. CONNECTING: an attempt is under way. BACKOFF: the next one waits. EXCHANGE: request and response
# pass. FLUSHING: the response is over, the client has yet to take its end. LINGER: everything is sent, what
# the client still sends is thrown away, so that no reset overtakes the answer.
PROXY, HEAD, QUEUED, CONNECTING, BACKOFF, EXCHANGE, FLUSHING, LINGER, CLOSED = range(9)
STATE_NAMES: Final = (
    "proxy_header",
    "waiting_for_head",
    "queued",
    "connecting",
    "backing_off",
    "exchange",
    "flushing",
    "lingering",
    "closed",
)

# What the client's socket is watched for while nothing is special. RDHUP is in it although a FIN is EPOLLIN
# too: so the interest is the same while a request is under way, and no call changes it.
WATCHED: Final = EPOLLIN | EPOLLRDHUP

# What follows an answer that ends the connection is read for this long.
LINGER_NS: Final = 2_000_000_000

BYTES_IN: Final = LISTENER.index("received_bytes_total")
BYTES_OUT: Final = LISTENER.index("sent_bytes_total")
ATTEMPTS: Final = LISTENER.index("connect_attempts_total")
FAILURES: Final = LISTENER.index("connect_failures_total")
RETRIES: Final = LISTENER.index("request_retries_total")
CONNECT_TIME: Final = LISTENER.index("connect_duration_ns")
DURATION: Final = LISTENER.index("request_duration_ns")
REUSED: Final = LISTENER.index("reused_connections_total")
ANSWERS: Final = LISTENER.index("own_answers_total")
UPGRADES: Final = LISTENER.index("upgrades_total")
REQUESTS: Final = [LISTENER.index("requests_total", name) for name in StatusClass]  # by status // 100
NOT_WELL: Final = {reason: LISTENER.index("request_failures_total", reason.value) for reason in EndReason}


class HttpState(Queued):
    """The fields of a session, and the small questions about them."""

    __slots__ = (
        "_action",
        "_back_ns",
        "_back_out",
        "_backend",
        "_by_close",
        "_bytes_in",
        "_bytes_out",
        "_closing",
        "_cluster",
        "_conn",
        "_connect_ns",
        "_connect_started_ns",
        "_counted",
        "_entered",
        "_fault",
        "_first",
        "_first_byte_ns",
        "_first_request",
        "_first_whole",
        "_fresh",
        "_front_ns",
        "_front_watch",
        "_head_ns",
        "_head_sent",
        "_in_request",
        "_looping",
        "_must_linger",
        "_named",
        "_out",
        "_over",
        "_parser",
        "_partial",
        "_peer",
        "_plan",
        "_proxied",
        "_proxy",
        "_reason",
        "_request",
        "_retries",
        "_reused",
        "_sent",
        "_served_by",
        "_since_ns",
        "_state",
        "_status",
        "_sticky_named",
        "_timer",
        "_unusual",
        "_upstream_broken",
        "_wake_ns",
        "ctx",
        "established_ns",
        "front",
        "http",
        "lane",
        "peer",
        "splice",
        "splice_below",
        "started_ns",
        "token",
    )

    def __init__(self, ctx: Context, front: socket.socket, peer: Any, established_ns: int) -> None:
        http = ctx.http
        assert http is not None
        self.ctx = ctx
        self.http = http
        self.front = front
        self.peer = peer
        now = ctx.reactor.now
        # The loop's time is when its batch began; who came since has waited for no time, not for less.
        self.established_ns = established_ns if established_ns < now else now
        self.started_ns = now
        self._state = HEAD
        self._front_watch = -1  # the interest; -1: not watched yet
        self._front_ns = self._back_ns = now  # last progress of either side
        self._since_ns = self.established_ns  # HEAD: when the wait for this head began
        self._first_request = True
        self._in_request = False  # from a whole head to the end of its response
        self._partial = False  # HEAD: a part of one is here
        self._counted = False  # in the client's number of connections
        self._over = False  # over that number
        self._parser = http.site.request_parser()
        self._request: Request = self._parser.request
        self._out = b""  # for the client, not taken yet
        self._closing = False  # after this response
        self._must_linger = False
        self._upstream_broken = False  # the backend takes no more of the request; its answer may yet come
        self._looping = False
        self._reason = EndReason.DONE  # why the session ends, once that is decided
        self._conn: BackConnection | None = None
        self._backend: BackendState | None = None
        self._entered: Gate[Queued] | None = None  # where it holds a place
        self._proxy: ProxyReader | None = None
        self._bytes_in = 0  # read, of requests that are not in the access log yet
        self._bytes_out = 0
        self._fault = ""  # what exactly was wrong with a request or response, for the log
        self._proxied: ProxyHeader | None = None  # who the client is, by its PROXY header
        self._wake_ns = 0  # CONNECTING, BACKOFF, LINGER: when it ends
        self._timer = Timer(self._on_timer)
        self.token = ctx.slab.insert(self)  # type: ignore[arg-type]
        # what a request sets before it is read:
        self._action: Action
        self._cluster: HttpCluster
        self._peer: Peer
        self._back_out = b""  # for the backend, not taken yet
        self._unusual = True  # something in what follows differs from how a plain request leaves it
        self._plan: RetryPlan | None
        self._first: bytes  # head and what of the body came with it
        self._first_whole: bool  # that is all of the request
        self._sent: bool  # a byte of it
        self._fresh: bool  # on a new connection only
        self._by_close = False  # the response ends with the connection
        self._sticky_named: BackendState | None  # by the client's cookie
        self._served_by: BackendState | None = None
        self.splice: BodySplice | None = None  # while the kernel moves a body
        self.splice_below = NEVER  # what may be left of a body, at most, for the kernel to be asked again
        self.lane: Lane | None = None  # since it moved one that the client sent
        self._named: bool  # the access log's next record is of a request, not of what never became one

    # what others ask of a session

    @property
    def last_progress_ns(self) -> int:
        if self.splice is not None:
            self.splice.sync()
        return max(self._front_ns, self._back_ns)

    # what the parts of a session, each in its own module, want of the others

    @property
    def front_deadline_ns(self) -> int:
        raise NotImplementedError

    @property
    def back_deadline_ns(self) -> int:
        raise NotImplementedError

    def listen_for(self, callback: Callable[[int], None]) -> None:
        raise NotImplementedError

    def body_moved(self, up: int, down: int, front_ns: int, back_ns: int) -> None:
        raise NotImplementedError

    def body_over(self, conn: BackConnection, down: bool) -> None:
        raise NotImplementedError

    def copy_on(self, rest: bytes) -> None:
        raise NotImplementedError

    def response_cut(self, short: bool) -> None:
        raise NotImplementedError

    def request_cut(self, short: bool) -> None:
        raise NotImplementedError

    def _watch(self, interest: int) -> None:
        raise NotImplementedError

    def _front_broken(self) -> None:
        raise NotImplementedError

    def _upstream_lost(self) -> None:
        raise NotImplementedError

    def _on_timer(self, now: int) -> None:
        raise NotImplementedError

    def _on_front(self, mask: int) -> None:
        raise NotImplementedError

    def _read_proxy(self) -> None:
        raise NotImplementedError

    def _adopt_configuration(self) -> None:
        raise NotImplementedError

    def _begin_record(self, *, named: bool = True) -> None:
        raise NotImplementedError

    def _limited(self, now: int) -> bool:
        raise NotImplementedError

    def _begin(self, action: Action, request: Request) -> None:
        raise NotImplementedError

    def _addresses(self) -> tuple[tuple[str, int] | None, tuple[str, int] | None]:
        raise NotImplementedError

    def on_back(self, mask: int) -> None:
        raise NotImplementedError

    def end(self, reason: EndReason) -> None:
        raise NotImplementedError

    def _to_back(self, payload: bytes) -> None:
        raise NotImplementedError

    def _update_back(self) -> None:
        raise NotImplementedError

    def _drop_back(self) -> None:
        raise NotImplementedError

    def _response_over(self, reason: EndReason) -> None:
        raise NotImplementedError

    def _end(self, reason: EndReason, *, reset_front: bool = False) -> None:
        raise NotImplementedError
