"""A small HTTP/1.1 server for one document that is made anew for each request: GET and HEAD of /metrics.

Not a proxy's parser: it serves trusted scrapers on an address of the operator's choice, closes after each
answer, and is bounded in time, memory and connections.
"""

from __future__ import annotations

import errno
import gzip
import logging
import socket
from collections.abc import Callable
from typing import Final

from tidegate import logs
from tidegate.loop.reactor import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, Reactor
from tidegate.loop.timers import Timer

PATH: Final = b"/metrics"
MAX_HEAD: Final = 8192
MAX_CONNECTIONS: Final = 64
# From accept to the last byte taken: Prometheus gives up after 10 s by default.
LIMIT_NS: Final = 15_000_000_000

_log = logging.getLogger("tidegate.metrics")


class MetricsServer:
    """Serves until told to stop, one request per connection."""

    def __init__(
        self, reactor: Reactor, sock: socket.socket, content_type: str, document: Callable[[], bytes]
    ) -> None:
        self.reactor = reactor
        self.document = document
        self.content_type = content_type
        self.scrapes: dict[Scrape, None] = {}  # in order of arrival
        self._sock = sock
        self._stopping = False
        reactor.add(sock.fileno(), EPOLLIN, self._on_readable)

    def stop(self) -> None:
        """Take nobody new; the loop ends when whoever is connected has an answer."""
        self._stopping = True
        self.reactor.remove(self._sock.fileno())
        self._check_end()

    def gone(self, scrape: Scrape) -> None:
        self.scrapes.pop(scrape, None)
        self._check_end()

    def _check_end(self) -> None:
        if self._stopping and not self.scrapes:
            self.reactor.stop()

    def _on_readable(self, mask: int) -> None:
        try:
            sock, _ = self._sock.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE) and self.scrapes:
                next(iter(self.scrapes)).close()
            return
        if len(self.scrapes) >= MAX_CONNECTIONS:
            next(iter(self.scrapes)).close()
        self.scrapes[Scrape(self, sock)] = None


class Scrape:
    """One connection."""

    def __init__(self, server: MetricsServer, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.answering = False
        self._server = server
        self._sock = sock
        self._head = bytearray()
        self._out = memoryview(b"")
        self._timer = Timer(lambda now: self.close())
        server.reactor.add(sock.fileno(), EPOLLIN, self._on_event)
        server.reactor.timers.arm(self._timer, server.reactor.now + LIMIT_NS)

    def close(self) -> None:
        reactor = self._server.reactor
        if not reactor.watches(self._sock.fileno()):
            return
        reactor.timers.cancel(self._timer)
        reactor.remove(self._sock.fileno())
        reactor.close_after_batch(self._sock)
        self._server.gone(self)

    def _on_event(self, mask: int) -> None:
        if mask & (EPOLLERR | EPOLLHUP):
            self.close()
        elif mask & EPOLLOUT:
            self._flush()
        elif mask & EPOLLIN:
            self._read()

    def _read(self) -> None:
        try:
            data = self._sock.recv(MAX_HEAD)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if self.answering:  # whatever it says after its request; a FIN of a client that half-closes is fine
            if not data:
                self._server.reactor.modify(self._sock.fileno(), EPOLLOUT)
            return
        self._head += data
        end = self._head.find(b"\r\n\r\n")
        if end >= 0:
            self._answer(bytes(self._head[:end]))
        elif len(self._head) > MAX_HEAD:
            self._send(431, "Request Header Fields Too Large", b"the request head is too large\n")
        elif not data:
            self.close()

    def _answer(self, head: bytes) -> None:
        lines = head.split(b"\r\n")
        words = lines[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            self._send(400, "Bad Request", b"not an HTTP/1 request\n")
            return
        method, target = words[0], words[1].partition(b"?")[0]
        if method not in (b"GET", b"HEAD"):
            self._send(405, "Method Not Allowed", b"GET or HEAD\n", extra="Allow: GET, HEAD\r\n")
        elif target != PATH:
            self._send(404, "Not Found", b"metrics are at /metrics\n")
        else:
            self._send_document(method == b"HEAD", _accepts_gzip(lines[1:]))

    def _send_document(self, head_only: bool, zipped: bool) -> None:
        try:
            body = self._server.document()
        except Exception:
            _log.exception("metrics_failed")
            self._send(500, "Internal Server Error", b"see tidegate's log\n")
            return
        extra = "Vary: Accept-Encoding\r\n"
        if zipped:
            body = gzip.compress(body, compresslevel=1, mtime=0)
            extra += "Content-Encoding: gzip\r\n"
        self._send(200, "OK", body, self._server.content_type, head_only, extra)

    def _send(
        self,
        status: int,
        reason: str,
        body: bytes,
        content_type: str = "text/plain; charset=utf-8",
        head_only: bool = False,
        extra: str = "",
    ) -> None:
        head = (
            f"HTTP/1.1 {status} {reason}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
            f"{extra}Cache-Control: no-store\r\nConnection: close\r\n\r\n"
        )
        self.answering = True
        self._out = memoryview(head.encode() + (b"" if head_only else body))
        self._server.reactor.modify(self._sock.fileno(), EPOLLIN | EPOLLOUT)
        if status >= 500:
            logs.event(_log, logging.ERROR, "metrics_answer", status=status)

    def _flush(self) -> None:
        try:
            sent = self._sock.send(self._out)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        self._out = self._out[sent:]
        if not self._out:
            self.close()


def _accepts_gzip(fields: list[bytes]) -> bool:
    for field in fields:
        name, _, value = field.partition(b":")
        if name.strip().lower() == b"accept-encoding":
            for coding in value.split(b","):
                token, _, parameter = coding.strip().partition(b";")
                if token.strip().lower() == b"gzip":
                    return parameter.replace(b" ", b"") not in (b"q=0", b"q=0.0", b"q=0.00", b"q=0.000")
    return False
