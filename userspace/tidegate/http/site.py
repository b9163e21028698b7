"""All of HTTP that one listener's configuration decides, compiled: what its sessions share in a worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from ipaddress import ip_address
from typing import Final

from tidegate.config.model import Listener, Protocol
from tidegate.http.accesslog import Record, formatter
from tidegate.http.answering import ResponseForm
from tidegate.http.answers import Answers
from tidegate.http.forwarded import Peer
from tidegate.http.headers import RequestForm
from tidegate.http.ratelimit import ConnectionCount, RequestRate
from tidegate.http.request import RequestParser, RequestRules
from tidegate.http.response import ResponseMemo, ResponseParser
from tidegate.http.routes import Routes
from tidegate.http.stamps import DateField, RequestIds

_SPARE_PARSERS: Final = 64  # as many connections as end and begin in one turn of the loop
_KNOWN_ADDRESSES: Final = 4096  # addresses whose trust is remembered: a gateway's few, a scanner's many


class Site:
    """Made at load, in each worker after fork (request ids are per worker); replaced whole on reload.

    A session takes its site when it begins and keeps it: routes and forms of one configuration belong
    together. Rate and connection counts are handed on to the successor, or a reload would forgive everyone.
    """

    __slots__ = (
        "_spare",
        "answers",
        "backend_memo",
        "connections",
        "listener",
        "log_line",
        "rate",
        "request_form",
        "request_rules",
        "response_form",
        "routes",
        "scheme",
        "trusts",
    )

    def __init__(
        self,
        listener: Listener,
        sticky: Mapping[str, str],
        clock: Callable[[], float],
        previous: Site | None = None,
    ) -> None:
        """`sticky`: cluster name -> its sticky cookie; `clock`: seconds since the epoch, like time.time.

        Raises OperatorErrors: RouteError, EditError, AnswerFileError.
        """
        date = DateField(clock)
        self.listener = listener
        self.scheme = b"https" if listener.protocol is Protocol.HTTPS else b"http"
        self.request_rules = RequestRules(self.scheme)
        self._spare: list[RequestParser] = []
        self.request_form = RequestForm(
            via=listener.via,
            request_start=listener.request_start,
            queue_age=listener.queue_age_header,
            ids=RequestIds(),
        )
        self.backend_memo = ResponseMemo()
        self.response_form = ResponseForm(date)
        self.answers = Answers(date, listener.answers)
        self.routes = Routes(listener, sticky)
        self.log_line: Callable[[Record], str] | None = (
            formatter(listener.access_log.format) if listener.access_log is not None else None
        )
        limits = listener.limits
        kept = previous is not None and previous.listener.limits == limits
        self.rate: RequestRate | None = None
        if limits.requests_per_second:
            self.rate = RequestRate(limits.requests_per_second, limits.burst)
        self.connections: ConnectionCount | None = None
        if limits.connections_per_client:
            self.connections = ConnectionCount(limits.connections_per_client)
        if previous is not None and kept:
            self.rate, self.connections = previous.rate, previous.connections
        self.trusts = trust(listener)

    def request_parser(self) -> RequestParser:
        """For a new client connection."""
        return self._spare.pop() if self._spare else RequestParser(self.request_rules)

    def give_back(self, parser: RequestParser) -> None:
        """Its connection has ended, and nothing of it is used any more: it may serve another one."""
        if len(self._spare) < _SPARE_PARSERS and parser.recycle(self.request_rules):
            self._spare.append(parser)

    def response_parser(self) -> ResponseParser:
        """For a new backend connection."""
        return ResponseParser(self.backend_memo)

    def peer(self, address: str, local: tuple[str, int]) -> Peer:
        """For a new client connection: its address as the PROXY header or else the socket gives it."""
        return Peer(address, self.scheme, local, trusted=self.trusts(address))


def trust(listener: Listener) -> Callable[[str], bool]:
    """The listener's `trusted` as a question about an address."""
    networks = listener.trusted
    if not networks:
        return lambda _: False

    @lru_cache(maxsize=_KNOWN_ADDRESSES)
    def trusts(address: str) -> bool:
        """Whether an address may send PROXY headers and be believed about who stands behind it."""
        if not address:
            return False
        ip = ip_address(address.partition("%")[0])
        mapped = ip.ipv4_mapped if ip.version == 6 else None
        return any((mapped or ip) in network for network in networks)

    return trusts
