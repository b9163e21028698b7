"""Active health checks without I/O: what a check sends, what its answer means, when a backend rises or falls.

The vocabulary is HAProxy's: `fall` failed checks in a row take a backend down, `rise` good ones bring it
back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from random import Random

from tidegate.config.model import Address, Health, ProxyProtocol
from tidegate.http.proxyproto import encode_v1, encode_v2

# Checks of N workers x M backends begin together and would stay together; a tenth either way spreads them.
JITTER = 0.1
# The first check comes soon, so that a dead backend is known before much traffic went to it, yet not all at
# once.
FIRST_WITHIN_NS = 1_000_000_000
# Enough for any status line and interim heads; more of it without a final status is not an answer.
MAX_HEAD = 16 * 1024

# RFC 9112 4: the reason phrase may be empty, and many servers then leave out the space before it too.
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])(?: [^\r\n]*)?\r?\n")


class CheckResult(StrEnum):
    """What one check found. Only `OK` counts as good; `NONE` counts as nothing."""

    OK = "ok"
    REFUSED = "refused"  # connecting failed: refused, unreachable, no such socket
    TIMEOUT = "timeout"
    CLOSED = "closed"  # the connection ended before a status
    STATUS = "status"  # an answer, but not an expected status
    GARBAGE = "garbage"  # not HTTP
    NONE = "none"  # the check could not be made or measured here; says nothing about the backend


@dataclass(slots=True)
class RiseFall:
    """The state machine of one backend.

    It starts up, as HAProxy's does, but falls at the first failure then.
    """

    rise: int
    fall: int
    up: bool = True
    streak: int = -1  # results in a row that speak against the present state; -1: no result yet

    def note(self, good: bool) -> bool:
        """Count one result; True when the state changed."""
        if good == self.up:
            self.streak = 0
            return False
        needed = 1 if self.streak < 0 else self.fall if self.up else self.rise
        self.streak = max(self.streak, 0) + 1
        if self.streak < needed:
            return False
        self.up = good
        self.streak = 0
        return True


def next_check_ns(started_ns: int, now_ns: int, health: Health, rng: Random) -> int:
    """When the check after the one that began at `started_ns` and ended now is due; never in the past."""
    spread = 1 + JITTER * (2 * rng.random() - 1)
    return max(started_ns + int(health.interval_ns * spread), now_ns)


def first_check_ns(now_ns: int, health: Health, rng: Random) -> int:
    return now_ns + int(rng.random() * min(health.interval_ns, FIRST_WITHIN_NS))


class Check:
    """One check of one backend: what to send once connected, and the verdict over what comes back.

    Without a path it is over as soon as the connect succeeded and the PROXY header, if any, was sent.
    """

    __slots__ = ("_expect", "_received", "request", "wants_answer")

    def __init__(
        self, health: Health, origin: Address, send_proxy: ProxyProtocol = ProxyProtocol.OFF
    ) -> None:
        self._expect = health.expect
        self._received = b""
        self.wants_answer = bool(health.path)
        self.request = _proxy_header(send_proxy)
        if health.path:
            host = "localhost" if origin.is_unix else str(origin)
            self.request += (
                f"GET {health.path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: tidegate-health\r\n"
                "Accept: */*\r\nConnection: close\r\n\r\n"
            ).encode("ascii")

    def receive(self, data: bytes) -> CheckResult | None:
        """Feed what arrived, b"" for its end; None while undecided. The body is of no interest."""
        if not data:
            return CheckResult.CLOSED
        self._received += data
        while True:
            match = _STATUS_LINE.match(self._received) if b"\n" in self._received else None
            if match is None:
                return self._unfinished()
            status = int(match[1])
            if status >= 200:
                good = status in self._expect if self._expect else status < 300
                return CheckResult.OK if good else CheckResult.STATUS
            # 1xx: an interim answer, the final one follows its head (RFC 9110 15.2)
            end = _head_end(self._received, match.end() - 1)
            if status == 101 or not end:
                return CheckResult.GARBAGE if status == 101 or len(self._received) > MAX_HEAD else None
            self._received = self._received[end:]

    def _unfinished(self) -> CheckResult | None:
        head = self._received
        plausible = head.startswith(b"HTTP/1.") or b"HTTP/1.".startswith(head)
        if not plausible or b"\n" in head or len(head) > MAX_HEAD:
            return CheckResult.GARBAGE
        return None


def _head_end(data: bytes, line_end: int) -> int:
    """Where the head ends whose first line's LF is at `line_end`; 0: not here yet."""
    ends = [at + len(mark) for mark in (b"\n\r\n", b"\n\n") if (at := data.find(mark, line_end)) >= 0]
    return min(ends, default=0)


def _proxy_header(version: ProxyProtocol) -> bytes:
    """The PROXY header of a connection made on our own behalf."""
    if version is ProxyProtocol.V1:
        return encode_v1(None, None)
    return encode_v2(None, None, local=True) if version is ProxyProtocol.V2 else b""
