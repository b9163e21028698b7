"""What one request costs in the HTTP core: microseconds of CPU, no sockets.

    PYTHONPATH=userspace python tests/bench/http_core.py [--requests N] [--repeat R] [--profile]

Each line is the best of R rounds (the others shared the core with somebody). "bare httptools" is what a
prototype without checks does: llhttp with one callback per field, a list of them, and a join.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable
from dataclasses import replace

import httptools

from tidegate.config.loader import parse
from tidegate.config.model import Listener, PathRule, Route
from tidegate.http.answering import ResponseForm, must_close
from tidegate.http.forwarded import Peer
from tidegate.http.headers import RequestForm
from tidegate.http.reader import BODY
from tidegate.http.request import RequestParser, RequestRules
from tidegate.http.response import ResponseMemo, ResponseParser
from tidegate.http.routes import Routes
from tidegate.http.stamps import DateField, RequestIds

REQUEST = (
    b"GET /api/v1/items/%d?full=1&lang=en HTTP/1.1\r\n"
    b"Host: www.example.org\r\n"
    b"User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0\r\n"
    b"Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8\r\n"
    b"Accept-Language: en-US,en;q=0.5\r\n"
    b"Accept-Encoding: gzip, deflate, br\r\n"
    b"Referer: https://www.example.org/start\r\n"
    b"Cookie: session=0123456789abcdef0123456789abcdef; theme=dark\r\n"
    b'If-None-Match: "%d"\r\n'
    b"Connection: keep-alive\r\n"
    b"Cache-Control: max-age=0\r\n\r\n"
)
RESPONSE = (
    b"HTTP/1.1 200 OK\r\n"
    b"Server: nginx/1.22.1\r\n"
    b"Date: Mon, 23 Nov 2026 22:13:00 GMT\r\n"
    b"Content-Type: application/json\r\n"
    b"Content-Length: 128\r\n"
    b"Last-Modified: Mon, 23 Nov 2026 20:00:00 GMT\r\n"
    b"Connection: keep-alive\r\n"
    b'ETag: "%d"\r\n'
    b"Accept-Ranges: bytes\r\n\r\n" + b"x" * 128
)
NOW_US = 1_795_472_000_000_000


class Bench:
    def __init__(self, count: int) -> None:
        self.rules = RequestRules(b"http")
        self.form = RequestForm(via="tidegate", request_start="us", queue_age=False, ids=RequestIds())
        self.peer = Peer("192.0.2.7", b"http", ("192.0.2.1", 80))
        self.answers = ResponseForm(DateField(time.time))
        self.parser = RequestParser(self.rules)
        self.backend = ResponseParser(ResponseMemo())
        self.routes = Routes(many_routes())
        self.same = [REQUEST % (1, 1)] * count
        self.targets = [REQUEST % (at, 1) for at in range(count)]
        # Fields that differ from the one before, and of which the worker has seen each.
        plain = [
            (REQUEST % (at, at % 50)).replace(b"Cookie: session", b"X-Trail: session") for at in range(count)
        ]
        self.known = plain
        self.fresh = [REQUEST % (at, at) for at in range(count)]
        self.response_same = [RESPONSE % 1] * count
        self.response_known = [RESPONSE % (at % 50) for at in range(count)]
        self.response_fresh = [RESPONSE % at for at in range(count)]

    def requests(self, heads: list[bytes]) -> None:
        parser, form, peer = self.parser, self.form, self.peer
        for head in heads:
            request = parser.receive_head(head)
            assert request is not None
            form.head(request, peer, None, NOW_US)
            parser.next()

    def routing(self, paths: list[bytes]) -> None:
        find, request = self.routes.find, self.parser.request
        request.host, request.method = b"www.h500.example.org", b"GET"
        for path in paths:
            request.path = path
            find(request)

    def responses(self, received: list[bytes]) -> None:
        backend, form, request = self.backend, self.answers, self.parser.request
        for data in received:
            backend.start(request)
            response = backend.receive_head(data)
            assert response is not None
            out = form.head(response, backend, request, must_close(request, backend))
            if backend.state == BODY:
                out += backend.receive_body(b"")


def many_routes() -> Listener:
    """A listener of 1,000 hosts with ten prefixes each."""
    config = parse(
        '[[listener]]\naddress = "127.0.0.1:8080"\nprotocol = "http"\ncluster = "app"\n'
        '[cluster.app]\nbackends = ["127.0.0.1:9000"]\n',
        allow_pending=True,
    )
    routes = tuple(
        Route(host=f"*.h{host}.example.org", path=PathRule("prefix", f"/api/v{at}"), cluster="app")
        for host in range(1000)
        for at in range(10)
    )
    return replace(config.listeners[0], routes=routes)


class Collector:
    """The prototype's side of the comparison."""

    def __init__(self) -> None:
        self.fields: list[tuple[bytes, bytes]] = []

    def on_url(self, url: bytes) -> None:
        self.url = url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name, value))

    def on_headers_complete(self) -> None:
        pass


def bare_requests(heads: list[bytes]) -> None:
    collector = Collector()
    parser = httptools.HttpRequestParser(collector)
    for head in heads:
        parser.feed_data(head)
        lines = [b"%b: %b\r\n" % pair for pair in collector.fields if pair[0] != b"Connection"]
        b"%b %b HTTP/1.1\r\n%b\r\n" % (parser.get_method(), collector.url, b"".join(lines))
        collector.fields = []


def bare_responses(received: list[bytes]) -> None:
    collector = Collector()
    parser = httptools.HttpResponseParser(collector)
    for data in received:
        parser.feed_data(data)
        lines = [b"%b: %b\r\n" % pair for pair in collector.fields if pair[0] != b"Connection"]
        b"HTTP/1.1 %d OK\r\n%b\r\n" % (parser.get_status_code(), b"".join(lines))
        collector.fields = []


def best(run: Callable[[], None], count: int, repeat: int) -> float:
    """Microseconds of CPU per item."""
    times = []
    for _ in range(repeat):
        start = time.process_time_ns()
        run()
        times.append(time.process_time_ns() - start)
    return min(times) / count / 1000


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    options.add_argument("--requests", type=int, default=5_000)
    options.add_argument("--repeat", type=int, default=7)
    options.add_argument("--profile", action="store_true", help="where the time of fresh heads goes")
    given = options.parse_args()
    count = given.requests
    bench = Bench(count)
    rows: list[tuple[str, Callable[[], None]]] = [
        ("request: bare httptools", lambda: bare_requests(bench.fresh)),
        ("request: same head again", lambda: bench.requests(bench.same)),
        ("request: same fields, other target", lambda: bench.requests(bench.targets)),
        ("request: fields known to the worker", lambda: bench.requests(bench.known)),
        ("request: fields never seen", lambda: bench.requests(bench.fresh)),
        ("route: 10,000 rules, plain path", lambda: bench.routing([b"/api/v7/items/42"] * count)),
        ("route: 10,000 rules, escaped path", lambda: bench.routing([b"/api/v7/caf%C3%A9"] * count)),
        ("response: bare httptools", lambda: bare_responses(bench.response_fresh)),
        ("response: same head again", lambda: bench.responses(bench.response_same)),
        ("response: head known to the worker", lambda: bench.responses(bench.response_known)),
        ("response: head never seen", lambda: bench.responses(bench.response_fresh)),
    ]
    print(f"{len(bench.fresh[0])} bytes of request head, {len(bench.response_fresh[0])} of response")
    for name, run in rows:
        print(f"{name:40} {best(run, count, given.repeat):7.3f} us")
    if given.profile:
        profile = cProfile.Profile()
        profile.runcall(bench.requests, bench.fresh)
        profile.runcall(bench.responses, bench.response_fresh)
        pstats.Stats(profile).sort_stats("tottime").print_stats(18)


if __name__ == "__main__":
    main()
