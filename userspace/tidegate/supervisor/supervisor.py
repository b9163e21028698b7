"""The main process: opens listeners, forks workers, replaces the dead, answers control, ends cleanly.

Single-threaded, one loop. Workers inherit everything by fork; what changes later reaches them over their
channel. Ends by SIGTERM (drain), a second SIGTERM or SIGINT (now), or when every worker was given up.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import time
from typing import Any

import setproctitle

from tidegate import config as configuration
from tidegate import logs
from tidegate.config.model import Config, QueueAgeSource
from tidegate.config.resolve import run_as, worker_count
from tidegate.control.server import ControlServer, is_served
from tidegate.errors import EXIT_FAILED, EXIT_OK, OperatorError
from tidegate.kernel.half import KernelHalf
from tidegate.kernel.loader import MapNumber
from tidegate.kernel.queue_age import AgeSource, choose
from tidegate.kernel.records import MAX_SLOTS, Slot, SlotState
from tidegate.kernel.slots import Slots
from tidegate.loop.reactor import Reactor
from tidegate.loop.signals import Signals
from tidegate.loop.timers import Timer
from tidegate.metrics.names import LISTENER, PROCESS, WORKER, DeathCause, ReloadResult, Scope
from tidegate.metrics.recovery import worker_died
from tidegate.metrics.segment import SUPERVISOR, RowKey, Segment
from tidegate.supervisor import splice, worker
from tidegate.supervisor.activation import given_sockets
from tidegate.supervisor.channel import Channel
from tidegate.supervisor.exporter import Exporter
from tidegate.supervisor.exporter_statsd import StatsD
from tidegate.supervisor.groups import ListenerGroups
from tidegate.supervisor.notify import Notifier
from tidegate.supervisor.process import raise_nofile
from tidegate.supervisor.queries import Queries
from tidegate.supervisor.reload import Reload
from tidegate.supervisor.traffic import prepare_logs
from tidegate.supervisor.upgrade import Handover, Upgrade
from tidegate.supervisor.verbs import Verbs
from tidegate.supervisor.verbs_change import RuntimeChanges
from tidegate.supervisor.verbs_events import EventHub
from tidegate.supervisor.workers import ACTIVE, WorkerProcess, Workers

_log = logging.getLogger("tidegate.supervisor")

# Rows that reloads may add over the life of a process; memory nobody uses costs nothing.
SPARE_LISTENERS = 256
SPARE_BACKENDS = 2048
# How much longer than its drain limit a worker may take to say goodbye before it is killed.
GRACE_NS = 2_000_000_000
WATCH_NS = 500_000_000
# A worker that has not emptied its queues by then hangs; siblings did it for it.
QUIET_LIMIT_NS = 1_000_000_000
WORKERS_GAUGE = PROCESS.index("workers")


class Supervisor:
    def __init__(self, config: Config, path: str, handover: Handover | None = None) -> None:
        self.config = config
        self.path = path
        self.pid = os.getpid()
        self.started_ns = time.monotonic_ns()
        self.reactor = Reactor()
        self.notifier = Notifier()
        self.nofile = raise_nofile()
        self.worker_count = worker_count(config)
        self.user = run_as(config)
        self.generation = 0
        self.exit_code = EXIT_OK
        self.ready = False
        self.draining = False
        self._ends_ns = 0  # while draining: when whatever is left is cut
        self._told_to_end = False  # by a signal
        self.predecessor: Segment | None = None
        self.handover = handover
        self.half, self.age = self._kernel_half()
        self.splice = splice.choose(config, self.half)
        self.slots_fd = self._slots_memory()
        self.slots = self.half.slots if self.half is not None else Slots(self.slots_fd)
        self.groups = ListenerGroups(self.half, self.slots, self.worker_count)
        self.segment = self._new_segment()
        self.workers = Workers(
            self.reactor,
            self.worker_count,
            self._worker_body,
            self._on_message,
            self._on_death,
            self._all_gone,
        )
        self.reloads = Reload(self)
        self.upgrades = Upgrade(self)
        self.queries = Queries(self.reactor)
        self.changes = RuntimeChanges(self)
        self.events = EventHub(lambda level: self.workers.broadcast({"type": "events", "level": level}))
        self.verbs = Verbs(self)
        self.exporter = Exporter(
            self.reactor, self.segment, self.user, self._close_in_exporter, StatsD.of(config)
        )
        self.control: ControlServer | None = None
        self._watch_timer = Timer(self._on_watch)
        self._watched_ns = self.started_ns
        self._quiet: set[int] = set()  # workers that took the last connection that waited for them
        self._quiet_timer = Timer(lambda now: self.groups.close_for_everyone())
        self._limit_timer = Timer(lambda now: self.workers.kill_all())
        self._resync_timers: dict[int, Timer] = {}
        self._signals: Signals | None = None

    # set-up

    def _kernel_half(self) -> tuple[KernelHalf | None, AgeSource]:
        if self.config.queue_age is QueueAgeSource.TCP_INFO:
            return None, choose(self.config.queue_age, None)
        if self.handover is not None:
            half = self.handover.half()
            failure = (
                None if half is not None else OperatorError("the predecessor ran without the kernel half")
            )
            return half, choose(self.config.queue_age, failure)
        try:
            half = KernelHalf.start(self.config.cgroup)
        except OperatorError as error:
            age = choose(self.config.queue_age, error)
            logs.event(
                _log,
                logging.WARNING,
                "queue_age_estimated",
                source=age.source,
                reason=error.message,
                fix=error.fix,
            )
            return None, age
        return half, choose(self.config.queue_age, None)

    def _slots_memory(self) -> int:
        """The fd behind the slots: the kernel's map, or plain shared memory of the same form."""
        if self.half is not None:
            return self.half.map_fds[MapNumber.SLOTS]
        if self.handover is not None:
            return self.handover.slots_fd
        fd = os.memfd_create("tidegate-slots", os.MFD_CLOEXEC)
        os.ftruncate(fd, MAX_SLOTS * ctypes.sizeof(Slot))
        return fd

    def _new_segment(self) -> Segment:
        per_worker = self.worker_count + 1
        backends = sum(len(cluster.backends) for cluster in self.config.clusters)
        return Segment.sized_for(
            {
                Scope.PROCESS: 1,
                Scope.WORKER: self.worker_count,
                Scope.LISTENER: (len(self.config.listeners) + SPARE_LISTENERS) * per_worker,
                Scope.BACKEND: (backends + SPARE_BACKENDS) * per_worker,
            }
        )

    def allocate_rows(self) -> None:
        """Every row that a worker may write, before it is forked or told of it; its log files likewise."""
        prepare_logs(self.config, self.user)
        for index in range(self.worker_count):
            self.segment.row(RowKey(Scope.WORKER, index))
            for group in self.groups.groups:
                self.segment.row(RowKey(Scope.LISTENER, index, (group.name,)))
            for cluster in self.config.clusters:
                for backend in cluster.backends:
                    self.segment.row(RowKey(Scope.BACKEND, index, (cluster.name, str(backend.address))))

    def start(self) -> None:
        """Listeners, control, workers. Raises OperatorError; the caller then calls `clean_up`."""
        if self.handover is not None:
            self.handover.adopt_listeners(self)
        else:
            given = given_sockets(self.config.listeners)
            for group in self.groups.open(self.config.listeners, self.config, given):
                self.groups.activate(group, self.config)
        self.allocate_rows()
        if self.handover is None:
            self.exporter.open(self.config.metrics)
        self.control = ControlServer(
            self.reactor, self.config.control, self.verbs.table(), self.config.control_users
        )
        self._signals = Signals(
            self.reactor,
            {
                signal.SIGTERM: self._on_term,
                signal.SIGINT: self.stop_now,
                signal.SIGHUP: lambda: self.reloads.start(None),
                signal.SIGUSR1: self._reopen_logs,
                signal.SIGUSR2: lambda: self.upgrades.start(None),
            },
        )
        self.workers.start_all()
        if self.handover is None:
            self.exporter.start()
        self.reactor.timers.arm(self._watch_timer, time.monotonic_ns() + WATCH_NS)

    def run(self) -> int:
        gc.collect()
        gc.freeze()
        self.reactor.run()
        return self.exit_code

    def clean_up(self) -> None:
        """Whatever way it ends: no socket, process, link or cgroup stays."""
        self.workers.stopping = True
        self.exporter.close()
        self.workers.kill_all()
        for one in self.workers.all:
            if one.running:
                os.waitpid(one.pid, 0)
                one.pid = 0
        if self.control is not None:
            self.control.close()
        self.groups.close()
        if self.half is not None:
            if self.upgrades.handed_over:
                self.half.release()
            else:
                self.half.close()

    def _close_inherited(self) -> None:
        """In a forked child: what is the supervisor's alone."""
        self.reactor.close()  # first: the epoll is shared, a removal would be the parent's too
        if self._signals is not None:
            self._signals.close()
        if self.control is not None:
            self.control.abandon()
        self.events.abandon()
        self.exporter.abandon()
        for other in self.workers.inherited_channels():
            other.close()
        for one in self.workers.all:
            if one.pidfd >= 0:
                os.close(one.pidfd)
        self.upgrades.abandon()
        if self.handover is not None:
            self.handover.abandon()
        if self.half is not None:
            self.half.worker_close()

    def _close_in_exporter(self) -> None:
        self._close_inherited()
        self.groups.close()

    def _worker_body(self, process: WorkerProcess, channel: Channel) -> None:
        worker.main(
            worker.WorkerSetup(
                index=process.index,
                config=self.config,
                groups=self.groups.groups,
                slots=self.slots,
                read_age=self.age.read,
                channel=channel,
                segment=self.segment,
                nofile=self.nofile,
                user=self.user,
                supervisor=self.pid,
                close_inherited=self._close_inherited,
                splice=self.splice,
                generation=self.generation,
            )
        )

    # workers

    def heartbeat_ns(self, index: int) -> int:
        return max((self.slots.heartbeat_ns(group.slots[index]) for group in self.groups.groups), default=0)

    def _on_message(self, process: WorkerProcess, message: dict[str, Any], fds: list[int]) -> None:
        match message.get("type"):
            case "ready":
                process.generation = int(message["generation"])
                self.reloads.acknowledged()
                if self.events.wanted and process.channel is not None:
                    process.channel.send({"type": "events", "level": self.events.wanted})
                self._check_ready()
                self.changes.acknowledged()
            case "quiet" if self.draining and not self.upgrades.handed_over:
                self._quiet.add(process.index)
                if all(one.index in self._quiet for one in self.workers.all if one.running):
                    self.groups.close_for_everyone()
            case "reloaded":
                process.generation = int(message["generation"])
                self.reloads.acknowledged()
                self.changes.acknowledged()
            case "answer":
                self.queries.on_message(process.index, message, fds)
            case "zombies":
                self.verbs.on_zombies(message)
            case "event":
                self.events.from_worker(process.index, message)

    def _check_ready(self) -> None:
        if self.ready or not all(one.state == ACTIVE for one in self.workers.all):
            return
        self.ready = True
        logs.event(
            _log,
            logging.INFO,
            "ready",
            pid=self.pid,
            workers=self.worker_count,
            listeners=[str(group.listener.address) for group in self.groups.groups],
            queue_age=self.age.source,
            splice=self.splice.by,
        )
        self.notifier.ready(f"{self.worker_count} workers, {len(self.groups.groups)} listeners")
        if self.handover is not None:
            self.handover.ready()

    def _on_death(self, process: WorkerProcess, cause: DeathCause | None) -> None:
        for group in self.groups.groups:
            slot = group.slots[process.index]
            if not self.upgrades.handed_over:
                self.slots.set_state(slot, SlotState.DEAD)
                self.slots.set_active(slot, 0)
        sessions, waiting = worker_died(self.segment, process.index)
        if cause is not None:
            row = self.segment.row(RowKey(Scope.WORKER, process.index))
            row.words[WORKER.index("worker_restarts_total", cause.value)] += 1
            if sessions or waiting:
                logs.event(
                    _log,
                    logging.ERROR,
                    "lost_with_worker",
                    worker=process.index,
                    sessions=sessions,
                    queued=waiting,
                )
        if not self.draining:
            self.groups.resync(process.index)
            self.workers.broadcast({"type": "look"})
            timer = self._resync_timers.setdefault(
                process.index, Timer(lambda now: self.groups.resync(process.index))
            )
            self.reactor.timers.arm(timer, time.monotonic_ns() + 1_000_000_000)
        self.reloads.acknowledged()
        self.changes.acknowledged()
        self.queries.on_death(process.index)

    def _all_gone(self) -> None:
        if not self.workers.stopping:
            logs.event(_log, logging.ERROR, "no_worker_left")
            self.exit_code = EXIT_FAILED
        self.upgrades.workers_gone()
        logs.event(_log, logging.INFO, "stopped", pid=self.pid)
        self.reactor.stop()

    def _on_watch(self, now: int) -> None:
        now = time.monotonic_ns()
        # stopped ourselves, with the workers perhaps: their silence proves nothing yet
        stood_still = now - self._watched_ns > 4 * WATCH_NS
        self._watched_ns = now
        self.notifier.watchdog()
        active = 0
        for one in self.workers.all:
            if one.state != ACTIVE:
                continue
            active += 1
            silent = now - self.heartbeat_ns(one.index)
            if (
                silent > self.config.kill_hung_after_ns
                and not stood_still
                and now - one.started_ns > self.config.kill_hung_after_ns
            ):
                logs.event(
                    _log,
                    logging.ERROR,
                    "worker_hung",
                    worker=one.index,
                    pid=one.pid,
                    silent_ms=silent // 1_000_000,
                )
                one.killed_hung = True
                self.workers.kill(one)
        self.segment.row(RowKey(Scope.PROCESS, SUPERVISOR)).words[WORKERS_GAUGE] = active
        if self.exporter.wanted:
            self.mirror_verdicts()
        interval = WATCH_NS
        if self.notifier.watchdog_ns:
            interval = min(interval, self.notifier.watchdog_ns)
        self.reactor.timers.arm(self._watch_timer, now + interval)

    def mirror_verdicts(self) -> None:
        """Bring the steering programs' counters into the segment."""
        if self.half is None:
            return
        for group in self.groups.groups:
            steered = self.half.groups.get(group.index)
            if steered is None:
                continue
            words = self.segment.row(RowKey(Scope.LISTENER, SUPERVISOR, (group.name,))).words
            for verdict, count in steered.verdicts().items():
                words[LISTENER.index("steer_verdicts_total", verdict.name.lower())] = count

    # the end

    def _on_term(self) -> None:
        """Let everything finish within drain_timeout. A second one: now."""
        if self._told_to_end:
            self.stop_now()
            return
        self._told_to_end = True
        if self.draining:  # by the verb, or for a successor: that the signal came is worth a line
            self._log_draining(self.ends_in_ns)
        self.drain()

    @property
    def ends_in_ns(self) -> int:
        """While draining: how long what is left may still take, at least 0."""
        return max(0, self._ends_ns - time.monotonic_ns())

    def drain(self) -> None:
        """Let everything finish within drain_timeout. Asked for again it changes nothing, the limit included:
        whoever drains twice wants sessions to finish, not to be cut.
        """
        if self.draining:
            return
        self.draining = True
        self._log_draining(self.config.drain_timeout_ns)
        self.notifier.stopping("draining")
        self.limit_end(self.config.drain_timeout_ns)
        self.groups.refuse_new()
        self.reactor.timers.arm(self._quiet_timer, time.monotonic_ns() + QUIET_LIMIT_NS)
        self.workers.drain_all(self.config.drain_timeout_ns)

    @staticmethod
    def _log_draining(timeout_ns: int) -> None:
        logs.event(_log, logging.INFO, "draining", timeout_ms=timeout_ns // 1_000_000)

    def stop_now(self) -> None:
        self.draining = True
        self.notifier.stopping("stopping")
        self.limit_end(0)
        self.workers.stop_all()

    def limit_end(self, timeout_ns: int) -> None:
        """Whoever is still there some time after its limit is killed."""
        self._ends_ns = time.monotonic_ns() + timeout_ns
        self.reactor.timers.arm(self._limit_timer, self._ends_ns + GRACE_NS)

    def _reopen_logs(self) -> None:
        prepare_logs(self.config, self.user)
        self.workers.broadcast({"type": "reopen"})

    def count_reload(self, result: ReloadResult) -> None:
        words = self.segment.row(RowKey(Scope.PROCESS, SUPERVISOR)).words
        words[PROCESS.index("reloads_total", result.value)] += 1


def run(path: str) -> int:
    """The whole life of `tidegate run FILE`; the exit code. Raises OperatorError before it serves."""
    handover = Handover.from_environment()
    try:
        config = configuration.load(path)
        logs.setup(config.log.level, config.log.format)
        if handover is None and is_served(config.control):
            raise OperatorError(
                f"another tidegate answers at {config.control}",
                "stop it (tidegate drain), upgrade it (tidegate upgrade), or set another `control`",
            )
        setproctitle.setproctitle("tidegate: supervisor")
        supervisor = Supervisor(config, os.path.abspath(path), handover)
    except OperatorError as error:
        if handover is not None:
            handover.failed(str(error))
        raise
    try:
        supervisor.start()
        return supervisor.run()
    except OperatorError as error:
        if handover is not None:
            handover.failed(str(error))
            supervisor.upgrades.handed_over = True  # the predecessor still owns what is shared
        raise
    finally:
        supervisor.clean_up()
