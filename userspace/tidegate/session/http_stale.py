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
from tidegate.metrics.names import DropReason
from tidegate.metrics.segment import observe
from tidegate.session.http_shared import HttpSide, local_name
from tidegate.session.http_state import ANSWERS, BYTES_IN, BYTES_OUT, DURATION, REQUESTS

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
        address = peer[0] if isinstance(peer, tuple) else ""
        record = Record()
        record.client = http.peer(address, lambda: local_name(sock)).address.decode("ascii")
        record.method, record.host, record.path = request.method, request.host, request.raw_target
        record.status = STATUS
        record.bytes_in, record.bytes_out = received, sent
        record.queue_age_ns = begun_ns - established_ns
        record.total_ns = now_ns - begun_ns
        record.end_reason = DropReason.STALE.value
        http.write(record, words, now_ns)
    return True
