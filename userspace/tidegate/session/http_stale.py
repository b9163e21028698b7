"""503 to who waited too long: the one answer that is given without a session.

It counts and is logged as any other answer, where the head is here to be read. Who has sent none is reset,
and all that tells of it is the listener's count of the dropped.
"""

from __future__ import annotations

import socket
import time
from typing import Any, Final

from tidegate.http.accesslog import Record
from tidegate.http.errors import RequestError
from tidegate.http.request import Request
from tidegate.metrics.names import DropReason
from tidegate.metrics.segment import observe
from tidegate.session.http_shared import HttpSide
from tidegate.session.http_state import ANSWERS, BYTES_IN, BYTES_OUT, DURATION, LOG_DROPPED, REQUESTS

# What of a stale connection's bytes is looked at: most heads are far smaller.
HEAD_PEEK: Final = 16 * 1024
STATUS: Final = 503


def answer_stale(
    http: HttpSide, words: memoryview, sock: socket.socket, peer: Any, established_ns: int
) -> bool:
    """503 if the request's head is here already; False: nothing was sent. The caller closes."""
    begun_ns = time.monotonic_ns()
    site = http.site
    try:
        request = site.request_parser().receive_head(sock.recv(HEAD_PEEK, socket.MSG_PEEK))
        if request is None:
            return False
        sent = sock.send(
            site.answers.answer(
                STATUS,
                head_only=request.method == b"HEAD",
                close=True,
                http10=request.http10,
                retry_after_s=1,
            )
        )
        # Read what was looked at: closing over unread bytes would be a reset, and overtake the answer.
        received = len(sock.recv(HEAD_PEEK))
    except (OSError, RequestError):
        return False
    now_ns = time.monotonic_ns()
    words[ANSWERS] += 1
    words[REQUESTS[STATUS // 100]] += 1
    words[BYTES_IN] += received
    words[BYTES_OUT] += sent
    observe(words, DURATION, now_ns - begun_ns)
    if http.log is not None:
        record = Record()
        record.bytes_in, record.bytes_out = received, sent
        record.queue_age_ns = begun_ns - established_ns
        record.total_ns = now_ns - begun_ns
        _write(http, words, record, request, _client(http, sock, peer), now_ns)
    return True


def _client(http: HttpSide, sock: socket.socket, peer: Any) -> str:
    def local() -> tuple[str, int]:
        try:
            name = sock.getsockname()
        except OSError:
            return "", 0
        return name[0], name[1]

    address = http.peer(peer[0] if isinstance(peer, tuple) else "", local).address
    return address.decode("ascii")


def _write(
    http: HttpSide, words: memoryview, record: Record, request: Request, client: str, now_ns: int
) -> None:
    log = http.log
    assert log is not None and http.site.log_line is not None
    record.time_ns = now_ns + http.epoch_offset_ns(now_ns)
    record.client = client
    record.listener = http.listener.name
    record.method, record.host, record.path = request.method, request.host, request.raw_target
    record.status = STATUS
    record.end_reason = DropReason.STALE.value
    log.write(http.site.log_line(record))
    if log.dropped:
        words[LOG_DROPPED] += log.dropped
        log.dropped = 0
