"""Pushes metrics to a StatsD server: one burst of datagrams per interval, to whoever may listen."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tidegate import logs
from tidegate.config.model import Address, Config, StatsdLabels
from tidegate.loop.reactor import Reactor
from tidegate.loop.timers import Timer
from tidegate.metrics.segment import RowSnapshot
from tidegate.metrics.statsd import Deltas, datagrams

_log = logging.getLogger("tidegate.metrics")
# Nobody listens: said when it begins, and now and then.
_limited = logs.RateLimited(_log, per_second=1 / 300)
# The kernel's default send buffer is a few hundred datagrams; a burst beyond it is not waited for.
SEND_BUFFER: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class StatsD:
    """Where to, how often, and with labels as tags or in the names."""

    address: Address
    interval_ns: int
    tags: bool

    @classmethod
    def of(cls, config: Config) -> StatsD | None:
        """None when it is off."""
        if config.statsd is None:
            return None
        return cls(config.statsd, config.statsd_interval_ns, config.statsd_labels is StatsdLabels.TAGS)


class Pusher:
    """Pushes while its reactor runs. What a datagram did not deliver is lost, as StatsD has it."""

    def __init__(
        self, reactor: Reactor, to: StatsD, read: Callable[[], list[RowSnapshot]], fresh: bool
    ) -> None:
        """`fresh`: what is counted already was told to nobody."""
        self._reactor = reactor
        self._read = read
        self._interval_ns = to.interval_ns
        self._deltas = Deltas(to.tags, () if fresh else read())
        self._address = to.address
        self._sock: socket.socket | None = None
        self._error: str | None = None  # why the last datagram that was not sent was not
        self._timer = Timer(self._on_timer)
        self._due_ns = reactor.now + self._interval_ns
        reactor.timers.arm(self._timer, self._due_ns)

    def push(self) -> None:
        """What came since the last time. Never blocks, never raises for want of a listener."""
        if self._sock is None and not self._connect():
            return  # nothing was told: it comes with the next one
        failed = 0
        for data in datagrams(self._deltas.lines(self._read())):
            failed += self._send(data)
        if failed:
            _limited.event(logging.WARNING, "statsd_not_sent", datagrams=failed, error=self._error)

    def _connect(self) -> bool:
        """Connected, it hears when nobody listens; made anew after a failure, for routes may change."""
        family = socket.AF_INET6 if self._address.is_ipv6 else socket.AF_INET
        sock = None
        try:
            sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            sock.connect((self._address.host, self._address.port))
        except OSError as failure:
            if sock is not None:
                sock.close()
            _limited.event(logging.WARNING, "statsd_not_sent", datagrams=0, error=failure.strerror)
            return False
        self._sock = sock
        return True

    def _send(self, data: bytes) -> int:
        """How many datagrams were found not to have arrived: this one, or one before it."""
        if self._sock is None:
            return 1
        try:
            try:
                self._sock.send(data)
            except ConnectionRefusedError as failure:  # the answer to an earlier one: this one was not sent
                self._error = failure.strerror
                self._sock.send(data)
                return 1
        except BlockingIOError as failure:  # no room
            self._error = failure.strerror
        except OSError as failure:
            self._error = failure.strerror
            self._sock.close()
            self._sock = None
        else:
            return 0
        return 1

    def _on_timer(self, now: int) -> None:
        try:
            self.push()
        except Exception:  # one snapshot that could not be read must not be the last
            _log.exception("statsd_failed")
        # from when it was due, so that intervals do not drift; not in the past after a stop
        self._due_ns = max(self._due_ns + self._interval_ns, now)
        self._reactor.timers.arm(self._timer, self._due_ns)
