"""Keeps host-name backends resolved, by one helper process per worker that starts with the first name."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from random import Random

from tidegate import logs
from tidegate.cluster import resolve_helper
from tidegate.cluster.balance import ClusterState
from tidegate.cluster.resolve import Answer, Lookups, question
from tidegate.config.model import Address
from tidegate.loop.reactor import EPOLLIN, Reactor
from tidegate.loop.timers import Timer

_log = logging.getLogger("tidegate.resolve")
_RECV_BYTES = 65536
# A helper that dies at once would otherwise be restarted in a loop.
_RESTART_NS = 1_000_000_000
_RESTART_MAX_NS = 60_000_000_000


class Resolver:
    """Looks up the names of all watched clusters and tells each cluster what its names resolve to."""

    def __init__(
        self,
        reactor: Reactor,
        rng: Random,
        serve: Callable[[socket.socket], None] = resolve_helper.serve,
    ) -> None:
        self._reactor = reactor
        self._serve = serve  # what the helper does with its end of the channel
        self._lookups = Lookups(rng)
        self._clusters: list[ClusterState] = []
        self._timer = Timer(self._on_timer)
        self._log = logs.RateLimited(_log)
        self._pid = 0
        self._channel: socket.socket | None = None
        self._received = b""
        self._unsent = b""
        self._restart_ns = _RESTART_NS
        self._not_before_ns = 0
        self._answered: set[str] = set()

    def watch(self, cluster: ClusterState) -> None:
        """From now on, through every reload of `cluster`, keep its names resolved."""
        self._clusters.append(cluster)
        cluster.on_change.append(self._sync)
        self._sync()

    def unwatch(self, cluster: ClusterState) -> None:
        self._clusters.remove(cluster)
        cluster.on_change.remove(self._sync)
        self._sync()

    def prime(self, timeout_s: float) -> set[str]:
        """Block until every name has an answer or a failure, or the time is up; the hosts without addresses.

        For start-up, before the loop runs and connections arrive.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            self._on_timer(time.monotonic_ns())
            missing = {host for host in self._lookups.hosts if host not in self._answered}
            left = deadline - time.monotonic()
            if not missing or left <= 0 or self._channel is None:
                return self._unresolved()
            poller = select.poll()
            poller.register(self._channel, select.POLLIN)
            if poller.poll(left * 1000):
                self._readable(EPOLLIN)

    def close(self) -> None:
        """End the helper."""
        for cluster in self._clusters:
            cluster.on_change.remove(self._sync)
        self._clusters.clear()
        self._reactor.timers.cancel(self._timer)
        self._end_helper()

    # -- inside

    def _unresolved(self) -> set[str]:
        return {
            origin.host
            for cluster in self._clusters
            for origin in cluster.names()
            if not any(backend.origin == origin for backend in cluster.backends)
        }

    def _sync(self) -> None:
        """The clusters changed: ask about new names, forget those that nobody uses."""
        hosts = {origin.host for cluster in self._clusters for origin in cluster.names()}
        if hosts == self._lookups.hosts:
            return
        self._answered &= hosts
        self._lookups.want(hosts, self._reactor.now)
        self._arm(self._reactor.now)
        if not hosts:
            self._end_helper()

    def _arm(self, now_ns: int) -> None:
        due_ns = self._lookups.next_due_ns()
        if due_ns is None:
            self._reactor.timers.cancel(self._timer)
        else:
            self._reactor.timers.arm(self._timer, max(due_ns, self._not_before_ns, now_ns, 1))

    def _on_timer(self, now_ns: int) -> None:
        if self._lookups.hosts and self._channel is None and now_ns >= self._not_before_ns:
            self._start_helper(now_ns)
        if self._channel is not None:
            for number, host in self._lookups.due(now_ns):
                self._unsent += question(number, host)
            self._send()
        self._arm(now_ns)

    def _start_helper(self, now_ns: int) -> None:
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            self._cannot_start(error, now_ns)
            return
        try:
            pid = os.fork()
        except OSError as error:
            ours.close()
            theirs.close()
            self._cannot_start(error, now_ns)
            return
        if pid == 0:
            resolve_helper.run(theirs, self._serve)
        theirs.close()
        ours.setblocking(False)
        self._pid = pid
        self._channel = ours
        self._received = b""
        self._unsent = b""
        self._reactor.add(ours.fileno(), EPOLLIN, self._readable)

    def _cannot_start(self, error: OSError, now_ns: int) -> None:
        self._log.event(logging.ERROR, "resolver_failed", error=error)
        self._postpone(now_ns)

    def _end_helper(self) -> None:
        channel, self._channel = self._channel, None
        if channel is None:
            return
        self._reactor.remove(channel.fileno())
        self._reactor.close_after_batch(channel)
        # It keeps nothing that a kill could spoil, and waiting for a look-up of its own accord would block
        # us.
        try:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass  # somebody reaped it: SIGCHLD is ignored, or handled by a general waitpid

    def _postpone(self, now_ns: int) -> None:
        self._not_before_ns = now_ns + self._restart_ns
        self._restart_ns = min(self._restart_ns * 2, _RESTART_MAX_NS)

    def _helper_died(self) -> None:
        now_ns = self._reactor.now
        self._log.event(logging.WARNING, "resolver_died", retry_ms=self._restart_ns // 1_000_000)
        self._end_helper()
        self._lookups.helper_died(now_ns)
        self._postpone(now_ns)
        self._arm(now_ns)

    def _send(self) -> None:
        assert self._channel is not None
        if self._unsent:
            try:
                self._unsent = self._unsent[self._channel.send(self._unsent) :]
            except BlockingIOError:
                return
            except OSError:
                self._helper_died()

    def _readable(self, mask: int) -> None:
        assert self._channel is not None
        try:
            data = self._channel.recv(_RECV_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._helper_died()
            return
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            answer = self._lookups.receive(line, self._reactor.now)
            if answer is not None:
                self._restart_ns = _RESTART_NS
                self._answered.add(answer.host)
                self._tell(answer)
        self._arm(self._reactor.now)

    def _tell(self, answer: Answer) -> None:
        if not answer.addresses:
            self._log.event(logging.WARNING, "resolve_failed", host=answer.host, error=answer.error)
            return
        for cluster in list(self._clusters):
            for origin in cluster.names():
                if origin.host == answer.host:
                    cluster.set_addresses(origin, [Address(ip, origin.port) for ip in answer.addresses])
