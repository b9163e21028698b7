"""The metrics process: it reads the shared counters, answers Prometheus and pushes to StatsD.

It reads the counters through a mapping that it cannot write, runs without privileges, and can be slow, stuck
or killed without anybody noticing but who reads them. The listening socket stays the supervisor's and goes
along with an upgrade, so a scrape waits rather than fails while the process is replaced.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

import setproctitle

from tidegate import logs
from tidegate.config.model import Address
from tidegate.errors import OperatorError
from tidegate.loop.reactor import EPOLLIN, Reactor
from tidegate.loop.signals import Signals
from tidegate.loop.timers import Timer
from tidegate.metrics.prometheus import CONTENT_TYPE, render
from tidegate.metrics.segment import RowSnapshot, Segment
from tidegate.metrics.totals import totals
from tidegate.supervisor.exporter_http import MetricsServer
from tidegate.supervisor.exporter_statsd import Pusher, StatsD
from tidegate.supervisor.process import become, die_with, fork
from tidegate.supervisor.restarts import RestartPolicy

if TYPE_CHECKING:
    from tidegate.config.resolve import Identity

_log = logging.getLogger("tidegate.metrics")

BACKLOG: Final = 128
# How long a scrape under way may go on when the process is told to end.
STOP_LIMIT_NS: Final = 1_000_000_000
# How long the end of tidegate waits for the last push.
LAST_PUSH_MS: Final = 500


class Gate:
    """Two shared words that let a reader take two segments as one while counters move between them.

    A sequence lock: the sequence is odd while the supervisor moves, and a reader whose sequence changed takes
    its snapshot again.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._words = memoryview(self._memory).cast("Q")

    @contextlib.contextmanager
    def moving(self) -> Iterator[None]:
        """The predecessor's counters are being added to ours: afterwards they count no more themselves."""
        words = self._words
        words[0] += 1
        try:
            yield
        finally:
            words[1] = 1
            words[0] += 1

    def read(self, ours: Segment, predecessor: Segment | None) -> list[RowSnapshot]:
        words = self._words
        while True:
            before = words[0]
            if before & 1 == 0:
                rows = list(ours.snapshot())
                if predecessor is not None and not words[1]:
                    rows += predecessor.snapshot()
                if words[0] == before:
                    return rows
            time.sleep(0.001)


class Exporter:
    """The supervisor's side: holds the socket, keeps the process running."""

    def __init__(
        self,
        reactor: Reactor,
        segment: Segment,
        user: Identity | None,
        close_inherited: Callable[[], None],
        statsd: StatsD | None,
    ) -> None:
        """`close_inherited` runs first in the new process: what it must not hold."""
        self.gate = Gate()
        self.sock: socket.socket | None = None
        self.statsd = statsd
        self.fresh = True  # nothing that is counted was pushed yet
        self.predecessor: Segment | None = None  # whose counters are shown besides, until they are moved
        self.pid = 0
        self._reactor = reactor
        self._segment = segment
        self._user = user
        self._close_inherited = close_inherited
        self._pidfd = -1
        self._wanted = False
        self._started_ns = 0
        self._restarts = RestartPolicy()
        self._restart_timer = Timer(lambda now: self._fork())
        self._kill_timer = Timer(lambda now: self._signal(signal.SIGKILL))
        self._on_stopped: Callable[[], None] | None = None

    def open(self, address: Address | None, given: socket.socket | None = None) -> None:
        """Listen at `address`, with the predecessor's socket when it is the same. Raises OperatorError."""
        if (
            given is not None
            and address is not None
            and given.getsockname()[:2] == (address.host, address.port)
        ):
            self.sock = given
            return
        if given is not None:
            given.close()
        if address is None:
            return
        family = socket.AF_INET6 if address.is_ipv6 else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address.host, address.port))
            sock.listen(BACKLOG)
        except OSError as error:
            sock.close()
            raise OperatorError(
                f"cannot serve metrics at {address}: {os.strerror(error.errno or 0)}",
                'free the address, write another metrics = "127.0.0.1:9464", or "off"',
            ) from None
        self.sock = sock

    def start(self) -> None:
        """From now on a process answers and pushes, if either is wanted. Harmless when it runs."""
        if self.wanted and not self._wanted:
            self._wanted = True
            self._fork()

    @property
    def wanted(self) -> bool:
        """Whether anybody is to read the counters."""
        return self.sock is not None or self.statsd is not None

    def stop(self, stopped: Callable[[], None]) -> None:
        """Let it finish the scrape under way and end, then call `stopped`; at once when none runs."""
        self._wanted = False
        self._reactor.timers.cancel(self._restart_timer)
        if not self.pid:
            stopped()
            return
        self._on_stopped = stopped
        self._signal(signal.SIGTERM)
        self._reactor.timers.arm(self._kill_timer, time.monotonic_ns() + STOP_LIMIT_NS)

    def end(self) -> None:
        """Now: it is gone when this returns, whatever it did."""
        self._wanted = False
        self._reactor.timers.cancel(self._restart_timer)
        if self.pid:
            self._signal(signal.SIGKILL)
            self._reap()

    def close(self) -> None:
        if self.pid and self.statsd is not None:
            self._wanted = False
            self._signal(signal.SIGTERM)
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            poll.poll(LAST_PUSH_MS)
        self.end()
        if self.sock is not None:
            self.sock.close()
            self.sock = None

    def abandon(self) -> None:
        """In another forked child."""
        if self.sock is not None:
            self.sock.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)

    def _fork(self) -> None:
        if not self._wanted or self.pid:
            return
        self._started_ns = time.monotonic_ns()
        parent = os.getpid()
        self.pid = fork(lambda: self._body(parent))
        self.fresh = False
        self._pidfd = os.pidfd_open(self.pid)
        self._reactor.add(self._pidfd, EPOLLIN, lambda mask: self._on_end())

    def _signal(self, number: int) -> None:
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _reap(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        self._reactor.remove(self._pidfd)
        os.close(self._pidfd)
        self._pidfd, self.pid = -1, 0
        self._reactor.timers.cancel(self._kill_timer)
        stopped, self._on_stopped = self._on_stopped, None
        if stopped is not None:
            stopped()
        return status

    def _on_end(self) -> None:
        pid = self.pid
        status = self._reap()
        if not self._wanted:
            return
        now = time.monotonic_ns()
        delay = self._restarts.died(now - self._started_ns)
        logs.event(
            _log,
            logging.ERROR,
            "metrics_process_died",
            pid=pid,
            status=status,
            again="no" if delay is None else f"in {delay // 1_000_000} ms" if delay else "at once",
        )
        if delay == 0:
            self._fork()
        elif delay is not None:
            self._reactor.timers.arm(self._restart_timer, now + delay)

    def _body(self, parent: int) -> None:
        """The process."""
        setproctitle.setproctitle("tidegate: metrics")
        gate, statsd, fresh = self.gate, self.statsd, self.fresh
        # its listening socket and the counters, read-only, are all it keeps
        ours = _read_only(self._segment)
        predecessor = _read_only(self.predecessor) if self.predecessor is not None else None
        sock, self.sock = self.sock, None
        self._close_inherited()
        kept = {0, 1, 2, ours.fd}
        if sock is not None:
            kept.add(sock.fileno())
        if predecessor is not None:
            kept.add(predecessor.fd)
        _close_all_but(kept)
        with contextlib.suppress(OSError):
            os.nice(5)
        become(self._user)
        die_with(parent)
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        reactor = Reactor()
        server = pusher = None
        if sock is not None:
            server = MetricsServer(
                reactor, sock, CONTENT_TYPE, lambda: render(totals(gate.read(ours, predecessor))).encode()
            )
        if statsd is not None:
            pusher = Pusher(reactor, statsd, lambda: gate.read(ours, predecessor), fresh)

        def stop() -> None:
            if pusher is not None:
                pusher.push()
            if server is not None:
                server.stop()
            else:
                reactor.stop()

        signals = Signals(reactor, {signal.SIGTERM: stop})
        reactor.run()
        signals.close()
        reactor.close()


def _close_all_but(kept: set[int]) -> None:
    """Mappings hold duplicates of their fds, maps of the kernel half among them: those go too."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(name))


def _read_only(segment: Segment) -> Segment:
    """The same counters in a mapping that cannot be written; the writable one goes."""
    attached = Segment.attach(segment.fd, read_only=True)
    segment.close()
    return attached
