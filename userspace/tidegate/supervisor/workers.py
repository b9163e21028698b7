"""The worker processes as the supervisor sees them: started, watched, replaced, drained."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tidegate import logs
from tidegate.loop.reactor import EPOLLIN, Reactor
from tidegate.loop.timers import Timer
from tidegate.metrics.names import DeathCause
from tidegate.supervisor.channel import Channel, ChannelClosed
from tidegate.supervisor.process import fork
from tidegate.supervisor.restarts import RestartPolicy

_log = logging.getLogger("tidegate.supervisor")

STARTING, ACTIVE, DRAINING, DEAD, ENDED, FAILED, RETIRED = (
    "starting",
    "active",
    "draining",
    "dead",
    "ended",  # as told, and nobody takes its place
    "failed",
    "retired",
)


@dataclass(slots=True)
class WorkerProcess:
    """One worker position. The process in it changes; counters and slots stay."""

    index: int
    pid: int = 0
    state: str = DEAD
    started_ns: int = 0
    restarts: int = 0
    restart_policy: RestartPolicy = field(default_factory=RestartPolicy)
    channel: Channel | None = None
    pidfd: int = -1
    expected: bool = False  # its end was asked for
    killed_hung: bool = False
    generation: int = 0  # of the configuration it runs
    restart_timer: Timer | None = None

    @property
    def running(self) -> bool:
        return self.pid != 0


class Workers:
    """Owns the processes. What a worker does is `body(worker, its end of the channel)`."""

    def __init__(
        self,
        reactor: Reactor,
        count: int,
        body: Callable[[WorkerProcess, Channel], None],
        on_message: Callable[[WorkerProcess, dict[str, Any], list[int]], None],
        on_death: Callable[[WorkerProcess, DeathCause | None], None],
        on_gone: Callable[[], None],
    ) -> None:
        self.reactor = reactor
        self.all = [WorkerProcess(index) for index in range(count)]
        self.stopping = False  # nobody is replaced any more
        self._body = body
        self._on_message = on_message
        self._on_death = on_death
        self._on_gone = on_gone  # the last one ended and nobody will be started

    def start_all(self) -> None:
        for worker in self.all:
            self.start(worker)

    def start(self, worker: WorkerProcess) -> None:
        if self.stopping or worker.running:
            return
        worker.started_ns = time.monotonic_ns()
        worker.expected = worker.killed_hung = False
        try:
            ours, theirs = Channel.pair()
        except OSError as error:
            self._not_started(worker, error)
            return
        worker.channel = ours
        worker.state = STARTING
        try:
            pid = fork(lambda: self._body(worker, theirs))
        except OSError as error:  # EAGAIN, ENOMEM: no room for another process now
            ours.close()
            worker.channel = None
            self._not_started(worker, error)
            return
        finally:
            theirs.close()
        worker.pid = pid
        worker.pidfd = os.pidfd_open(pid)
        self.reactor.add(worker.pidfd, EPOLLIN, lambda mask: self._reap(worker))
        self.reactor.add(ours.fileno(), EPOLLIN, lambda mask: self._receive(worker))

    def _not_started(self, worker: WorkerProcess, error: OSError) -> None:
        worker.state = DEAD
        logs.event(_log, logging.ERROR, "worker_not_started", worker=worker.index, reason=error.strerror)
        self._replace(worker, DeathCause.EXITED)

    def inherited_channels(self) -> list[Channel]:
        """What a fork copies of the others' channels: the child closes them."""
        return [worker.channel for worker in self.all if worker.channel is not None]

    def drain(self, worker: WorkerProcess, timeout_ns: int, message: str = "drain") -> None:
        worker.expected = True
        worker.state = RETIRED if message == "retire" else DRAINING
        if worker.channel is None or not worker.channel.send({"type": message, "timeout_ns": timeout_ns}):
            self.kill(worker)

    def drain_all(self, timeout_ns: int, message: str = "drain") -> None:
        self.stopping = True
        for worker in self.all:
            self._forget_restart(worker)
            if worker.running:
                self.drain(worker, timeout_ns, message)
        self._check_gone()

    def stop_all(self) -> None:
        """Now: sessions are cut, and counted."""
        self.stopping = True
        for worker in self.all:
            self._forget_restart(worker)
            if worker.running:
                worker.expected = True
                if worker.channel is None or not worker.channel.send({"type": "stop"}):
                    self.kill(worker)
        self._check_gone()

    def kill(self, worker: WorkerProcess) -> None:
        if worker.running:
            signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)

    def kill_all(self) -> None:
        for worker in self.all:
            self.kill(worker)

    def broadcast(self, message: dict[str, Any]) -> None:
        for worker in self.all:
            if worker.running and worker.channel is not None:
                worker.channel.send(message)

    @property
    def running(self) -> int:
        return sum(worker.running for worker in self.all)

    def _receive(self, worker: WorkerProcess) -> None:
        while worker.channel is not None:
            try:
                received = worker.channel.receive()
            except ChannelClosed:
                self.reactor.remove(worker.channel.fileno())
                return  # its pidfd tells the rest
            if received is None:
                return
            message, fds = received
            if message.get("type") == "ready" and worker.state == STARTING:
                worker.state = ACTIVE
                if worker.restarts:
                    logs.event(_log, logging.INFO, "worker_replaced", worker=worker.index, pid=worker.pid)
            try:
                self._on_message(worker, message, fds)
            finally:
                for fd in fds:
                    os.close(fd)

    def _reap(self, worker: WorkerProcess) -> None:
        self._receive(worker)  # its last words
        _, status = os.waitpid(worker.pid, 0)
        pid, worker.pid = worker.pid, 0
        self.reactor.remove(worker.pidfd)
        os.close(worker.pidfd)
        worker.pidfd = -1
        if worker.channel is not None:
            self.reactor.remove(worker.channel.fileno())
            worker.channel.close()
            worker.channel = None
        planned = worker.expected and not os.WIFSIGNALED(status)
        cause = None if planned else self._cause(worker, status)
        worker.state = ENDED if planned and self.stopping else DEAD
        if cause is not None:
            ended = (
                f"signal {os.WTERMSIG(status)}"
                if os.WIFSIGNALED(status)
                else f"status {os.WEXITSTATUS(status)}"
            )
            logs.event(
                _log, logging.ERROR, "worker_died", worker=worker.index, pid=pid, ended_by=ended, cause=cause
            )
        self._on_death(worker, cause)
        if not self.stopping:
            self._replace(worker, cause)
        self._check_gone()

    @staticmethod
    def _cause(worker: WorkerProcess, status: int) -> DeathCause:
        if worker.killed_hung:
            return DeathCause.HUNG
        return DeathCause.SIGNALED if os.WIFSIGNALED(status) else DeathCause.EXITED

    def _replace(self, worker: WorkerProcess, cause: DeathCause | None) -> None:
        worker.restarts += 1
        now = time.monotonic_ns()
        delay = 0 if cause is None else worker.restart_policy.died(now - worker.started_ns)
        if delay is None:
            worker.state = FAILED
            logs.event(
                _log,
                logging.ERROR,
                "worker_given_up",
                worker=worker.index,
                deaths=worker.restart_policy.young_deaths,
                fix="see worker_died above; tidegate reload or a restart tries again",
            )
            return
        if delay == 0:
            self.start(worker)
            return
        logs.event(
            _log, logging.WARNING, "worker_restart_delayed", worker=worker.index, delay_ms=delay // 1_000_000
        )
        worker.restart_timer = Timer(lambda now: self.start(worker))
        self.reactor.timers.arm(worker.restart_timer, now + delay)

    def revive_failed(self) -> None:
        """A reload is a new chance for those given up."""
        for worker in self.all:
            if worker.state == FAILED:
                worker.restart_policy.young_deaths = 0
                self.start(worker)

    def _forget_restart(self, worker: WorkerProcess) -> None:
        if worker.restart_timer is not None:
            self.reactor.timers.cancel(worker.restart_timer)
            worker.restart_timer = None

    def _check_gone(self) -> None:
        if self.running:
            return
        if self.stopping or all(worker.state == FAILED for worker in self.all):
            self._on_gone()
