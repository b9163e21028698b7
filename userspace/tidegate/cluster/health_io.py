"""Runs the active health checks of one cluster on the reactor: one probe per backend, non-blocking sockets.

Every worker checks for itself: N workers make N checks per interval and backend, and none depends on another.
"""

from __future__ import annotations

import errno
import socket

from tidegate.cluster.backend import BackendState
from tidegate.cluster.balance import ClusterState
from tidegate.cluster.health import Check, CheckResult, RiseFall, first_check_ns, next_check_ns
from tidegate.config.model import Health
from tidegate.loop.reactor import EPOLLIN, EPOLLOUT, Reactor
from tidegate.loop.timers import Timer

_RECV_BYTES = 4096
# Our own want of something, not the backend's fault: such a check says nothing.
_OUR_FAULT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL})


class Checker:
    """Checks every backend of `cluster` for as long as its configuration has `health`; `start` begins."""

    def __init__(self, reactor: Reactor, cluster: ClusterState) -> None:
        self.reactor = reactor
        self.cluster = cluster
        self._probes: dict[BackendState, _Probe] = {}
        self._health: Health | None = None
        self._running = False

    def start(self) -> None:
        if not self._running:
            self._running = True
            self.cluster.on_change.append(self._sync)
            self._sync()

    def stop(self) -> None:
        """Ends all checks under way; what they found so far stays."""
        if self._running:
            self._running = False
            self.cluster.on_change.remove(self._sync)
            self._sync()

    def _sync(self) -> None:
        health = self.cluster.config.health if self._running else None
        keep = health is not None and health == self._health
        for backend in list(self._probes):
            if not keep or backend.draining:
                self._probes.pop(backend).stop()
        self._health = health
        if health is not None:
            for backend in self.cluster.backends:
                if backend not in self._probes:
                    self._probes[backend] = _Probe(self, backend, health)


class _Probe:
    """The checks of one backend, one after the other."""

    __slots__ = (
        "_backend",
        "_check",
        "_health",
        "_owner",
        "_sock",
        "_started_ns",
        "_state",
        "_timer",
        "_unsent",
    )

    def __init__(self, owner: Checker, backend: BackendState, health: Health) -> None:
        self._owner = owner
        self._backend = backend
        self._health = health
        self._state = RiseFall(health.rise, health.fall, backend.up)
        self._check: Check | None = None
        self._sock: socket.socket | None = None
        self._unsent = b""
        self._started_ns = 0
        self._timer = Timer(self._timed_out)
        reactor = owner.reactor
        reactor.timers.arm(self._timer, first_check_ns(reactor.now, health, owner.cluster.rng))

    def stop(self) -> None:
        self._close()
        self._owner.reactor.timers.cancel(self._timer)

    def _timed_out(self, now_ns: int) -> None:
        """The one timer: the next check is due, or the one under way has taken too long."""
        if self._sock is None:
            self._begin(now_ns)
            return
        # Noticed long after it was due: it was this process that slept, and the answer may lie unread.
        late_ns = now_ns - (self._started_ns + self._health.timeout_ns)
        self._finish(CheckResult.NONE if late_ns > self._health.timeout_ns // 2 else CheckResult.TIMEOUT)

    def _begin(self, now_ns: int) -> None:
        cluster = self._owner.cluster
        backend = self._backend
        self._started_ns = now_ns
        self._check = Check(self._health, backend.origin, cluster.config.send_proxy)
        self._unsent = self._check.request
        try:
            sock = socket.socket(backend.family, socket.SOCK_STREAM)
        except OSError as error:
            self._finish(_result(error.errno))
            return
        self._sock = sock
        sock.setblocking(False)
        try:
            error_number = sock.connect_ex(backend.sockaddr)
        except OSError as error:  # a path too long for sockaddr_un
            error_number = error.errno or errno.EINVAL
        if error_number not in (0, errno.EINPROGRESS):
            self._finish(_result(error_number))
            return
        reactor = self._owner.reactor
        reactor.add(sock.fileno(), EPOLLOUT, self._ready)
        reactor.timers.arm(self._timer, now_ns + self._health.timeout_ns)

    def _ready(self, mask: int) -> None:
        sock = self._sock
        check = self._check
        assert sock is not None and check is not None
        try:
            if mask & EPOLLIN:
                result = check.receive(sock.recv(_RECV_BYTES))
            else:
                result = self._connected(sock, check)
        except BlockingIOError:
            return
        except OSError as error:
            result = CheckResult.CLOSED if mask & EPOLLIN else _result(error.errno)
        if result is not None:
            self._finish(result)

    def _connected(self, sock: socket.socket, check: Check) -> CheckResult | None:
        error_number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error_number:
            return _result(error_number)
        if self._unsent:
            self._unsent = self._unsent[sock.send(self._unsent) :]
            if self._unsent:
                return None
        if not check.wants_answer:
            return CheckResult.OK
        self._owner.reactor.modify(sock.fileno(), EPOLLIN)
        return None

    def _finish(self, result: CheckResult) -> None:
        self._close()
        owner = self._owner
        backend = self._backend
        backend.last_check = result.value
        if result is not CheckResult.NONE and self._state.note(result is CheckResult.OK):
            owner.cluster.set_health(backend, self._state.up)
        now_ns = owner.reactor.now
        owner.reactor.timers.arm(
            self._timer, next_check_ns(self._started_ns, now_ns, self._health, owner.cluster.rng)
        )

    def _close(self) -> None:
        sock, self._sock = self._sock, None
        self._check = None
        if sock is not None:
            self._owner.reactor.remove(sock.fileno())
            # Only after the batch: its number must not be reused while events for it may still be dispatched.
            self._owner.reactor.close_after_batch(sock)


def _result(error_number: int | None) -> CheckResult:
    return CheckResult.NONE if error_number in _OUR_FAULT else CheckResult.REFUSED
