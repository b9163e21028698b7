"""A worker: one process, one loop. Accepts, relays, beats its heart, helps siblings that cannot."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import setproctitle

from tidegate import logs
from tidegate.accept.listener import Acceptor, SpareFd
from tidegate.cluster.backend import BackendState
from tidegate.cluster.balance import BAD_NEWS, ClusterEvent, ClusterState
from tidegate.config.model import Config, Listener, Protocol
from tidegate.config.resolve import Identity
from tidegate.kernel.queue_age import Reader
from tidegate.kernel.records import SlotState
from tidegate.kernel.slots import Slots
from tidegate.kernel.splicing import Splicing
from tidegate.loop.reactor import EPOLLIN, Reactor
from tidegate.loop.signals import Signals
from tidegate.loop.slab import Slab
from tidegate.loop.timers import Timer
from tidegate.metrics.names import LISTENER, WORKER, EndReason, Scope
from tidegate.metrics.segment import RowKey, Segment
from tidegate.session import tcp_guard, zombies
from tidegate.session.context import BUFFER_SIZE, Context, Session
from tidegate.session.http import HttpSession
from tidegate.session.http_back import BackConnection
from tidegate.session.http_splice import BodySplice
from tidegate.session.spliced import Spliced
from tidegate.session.splicer import Splicer
from tidegate.session.tcp import TcpSession
from tidegate.supervisor.backend_mirror import BackendMirror
from tidegate.supervisor.channel import Channel, ChannelClosed, from_memfd
from tidegate.supervisor.plan import ListenerGroup, max_connections, session_capacity
from tidegate.supervisor.process import become, die_with
from tidegate.supervisor.splice import SpliceChoice
from tidegate.supervisor.traffic import Traffic
from tidegate.supervisor.verbs_worker import WorkerAnswers

_ITERATIONS = WORKER.index("loop_iterations_total")
_BUSY = WORKER.index("loop_busy_ns_total")
_ZOMBIES = LISTENER.index("zombies_total")

# A queue that stood still for this many looks of an idle worker is one its owner is behind with.
LOOKS_BEFORE_HELP = 2
# While draining, see this often whether everything is done.
DRAIN_TICK_NS = 20_000_000
# How long a draining worker still accepts: a round trip of most clients, for handshakes under way.
LAST_CALL_NS = 200_000_000

_log = logging.getLogger("tidegate.worker")


@dataclass(slots=True)
class WorkerSetup:
    """Everything a worker inherits by fork."""

    index: int
    config: Config
    groups: list[ListenerGroup]
    slots: Slots
    read_age: Reader
    channel: Channel
    segment: Segment
    nofile: int
    generation: int  # of the configuration it was forked with
    user: Identity | None
    supervisor: int  # pid
    close_inherited: Callable[[], None]
    splice: SpliceChoice


class Worker:
    """Everything that runs in one worker process."""

    def __init__(self, setup: WorkerSetup, splicing: Splicing | None = None) -> None:
        self.setup = setup
        self.config = setup.config
        self.index = setup.index
        self.groups = list(setup.groups)
        self.reactor = Reactor()
        self.slab: Slab[Session] = Slab(session_capacity(self._nofile()))
        self.clusters: dict[str, ClusterState] = {}
        self.traffic = Traffic(self.reactor)
        self.acceptors: dict[int, Acceptor] = {}  # by the group's index
        self.draining = False
        self._buffer = bytearray(BUFFER_SIZE)
        self._view = memoryview(self._buffer)
        self._spare = SpareFd()
        self._slots = setup.slots
        self._row = self._words(Scope.WORKER)
        self._last_beat_ns = 0
        self._in_charge = True  # of its slots: not after a hand-over
        self._standing: dict[int, tuple[int, int]] = {}  # foreign slot -> (taken at the last look, looks)
        self._leaving: list[Acceptor] = []  # of listeners that a reload removed
        self._new_socks: dict[int, list[socket.socket]] = {}  # received, not yet in force
        self._mirror = BackendMirror(setup.segment, setup.index)
        self._answers = WorkerAnswers(self)
        self._beat_timer = Timer(self._on_beat)
        self._zombie_timer = Timer(self._on_zombies)
        self._drain_timer = Timer(self._on_drain_tick)
        self._drain_until_ns = 0
        self._quiet_timer = Timer(self._on_last_call)
        self._quiet = False  # while draining: the listeners are left
        self.splicer: Splicer | None = None
        if splicing is not None:
            splicing.drop_program()
            self.splicer = Splicer(
                splicing,
                self.reactor,
                self.config.splice_limit,
                self.config.splice_total,
                trusted=setup.splice.trusted,
            )
        self._settings(self.config)
        for cluster in self.config.clusters:
            self.clusters[cluster.name] = ClusterState(cluster, on_event=self._cluster_event(cluster.name))
        self.traffic.apply(self.config, self.clusters)
        limits = self._limits()
        for group in self.groups:
            self._add_acceptor(group, limits[group.name])
        self.reactor.each_batch = self._each_batch
        self.reactor.on_failure = self._on_callback_failure

    # set-up

    def _settings(self, config: Config) -> None:
        self.config = config
        self._beat_every_ns = config.hang_after_ns // 4
        if self.splicer is not None:
            self.splicer.set_budget(config.splice_limit, config.splice_total)

    def _words(self, scope: Scope, *labels: str) -> memoryview:
        """Our metric words; the supervisor allocated them before it told us of what they count."""
        row = self.setup.segment.find(RowKey(scope, self.index, labels))
        assert row is not None
        return row.words

    def _limits(self) -> dict[str, int]:
        return max_connections([group.listener for group in self.groups], self._nofile())

    def _nofile(self) -> int:
        """What the listeners of all workers, which we inherit, leave of the limit."""
        return self.setup.nofile - sum(len(group.socks) for group in self.groups)

    @property
    def own_slots(self) -> list[int]:
        return [group.slots[self.index] for group in self.groups] if self._in_charge else []

    def _add_acceptor(self, group: ListenerGroup, limit: int) -> Acceptor:
        slot = group.slots[self.index]
        slots = self._slots
        ctx = Context(
            reactor=self.reactor,
            slab=self.slab,
            buffer=self._buffer,
            view=self._view,
            listener=group.listener,
            cluster=self.clusters.get(group.listener.cluster),
            words=self._words(Scope.LISTENER, group.name),
            on_end=lambda session, reason: None,
            splicer=self.splicer,
        )
        acceptor = Acceptor(
            ctx,
            group.sock(self.index),
            self.setup.read_age,
            tcp_guard.make if group.listener.protocol is Protocol.TCP else HttpSession,
            limit,
            self._spare,
            slots.active_store(slot),
            shared=group.shared,
            waiting=slots.waiting,
        )
        self.traffic.equip(ctx, group.listener, ctx.cluster)
        ctx.on_end = acceptor.session_ended
        slots.set_active(slot, 0)
        slots.set_capacity(slot, limit)
        self.acceptors[group.index] = acceptor
        return acceptor

    def _cluster_event(self, name: str) -> Callable[[ClusterEvent, BackendState | None], None]:
        limited = logs.RateLimited(logging.getLogger("tidegate.cluster"), per_second=1)

        def tell(event: ClusterEvent, backend: BackendState | None) -> None:
            limited.event(
                logging.WARNING if event in BAD_NEWS else logging.INFO,
                event.value,
                cluster=name,
                backend=backend.name if backend else None,
                worker=self.index,
            )

        return tell

    # life

    def run(self) -> None:
        reactor, setup = self.reactor, self.setup
        reactor.add(setup.channel.fileno(), EPOLLIN, self._on_channel)
        signals = Signals(
            reactor,
            {signal.SIGTERM: lambda: self.drain(self.config.drain_timeout_ns), signal.SIGUSR1: self._reopen},
        )
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
            signal.signal(
                number, signal.SIG_IGN
            )  # a terminal sends them to the group; they are the supervisor's
        self.traffic.begin()
        now = time.monotonic_ns()
        self._beat(now)
        for slot in self.own_slots:
            self._slots.set_state(slot, SlotState.ACTIVE)
        reactor.timers.arm(self._beat_timer, now + self._beat_every_ns)
        reactor.timers.arm(self._zombie_timer, now + self.config.zombie_interval_ns)
        for acceptor in self.acceptors.values():
            acceptor.start()
        setup.channel.send({"type": "ready", "generation": setup.generation})
        gc.collect()
        gc.freeze()
        reactor.run()
        self.traffic.finish()
        signals.close()
        for slot in self.own_slots:
            self._slots.set_active(slot, 0)
        reactor.close()

    def _reopen(self) -> None:
        """SIGUSR1: log files are opened again."""
        self.traffic.reopen()

    def _on_channel(self, mask: int) -> None:
        while True:
            try:
                received = self.setup.channel.receive()
            except ChannelClosed:
                os._exit(0)  # the supervisor is dead: nobody is left to report to, nobody restarts us
            if received is None:
                return
            try:
                self._on_message(*received)
            except Exception:  # the next message must still be heard: it may be the end
                _log.exception("message_failed", extra={"kv": {"worker": self.index}})

    def _on_message(self, message: dict[str, Any], fds: list[int]) -> None:
        match message.get("type"):
            case "sockets":
                socks = self._new_socks.setdefault(int(message["index"]), [])
                socks += [socket.socket(fileno=fd) for fd in fds]
            case "reload":
                self._reload(*from_memfd(fds[0]))
                self.setup.channel.send({"type": "reloaded", "generation": message["generation"]})
            case "drain":
                self.drain(int(message["timeout_ns"]))
            case "retire":
                self._retire(int(message["timeout_ns"]))
            case "reopen":
                self._reopen()
            case "stop":
                self._finish(EndReason.SHUTDOWN)
            case "look":
                self._watch_siblings()
            case "ask":
                self._answers.asked(message)
            case "events":
                self._answers.forward_events(int(message["level"]))

    # reload and hand-over

    def _reload(self, config: Config, plan: list[tuple[Listener, int, list[int], bool]]) -> None:
        """The supervisor has checked it: nothing in here may fail for a reason of the operator's."""
        if config.log != self.config.log:
            logs.setup(config.log.level, config.log.format)
        self._settings(config)
        self._mirror.forget_rows()
        for cluster in config.clusters:
            state = self.clusters.get(cluster.name)
            if state is None:
                state = ClusterState(cluster, on_event=self._cluster_event(cluster.name))
                self.clusters[cluster.name] = state
            elif state.config != cluster:
                state.reconfigure(cluster)
        names = {cluster.name for cluster in config.clusters}
        self.clusters = {name: state for name, state in self.clusters.items() if name in names}
        self.traffic.apply(config, self.clusters)
        known = {group.index: group for group in self.groups}
        groups: list[ListenerGroup] = []
        for listener, index, slots, shared in plan:
            group = known.pop(index, None)
            if group is None:
                socks = self._new_socks.pop(index)
                for sock in socks:
                    sock.setblocking(False)
                group = ListenerGroup(listener, index, socks, slots, shared)
            group.listener = listener
            groups.append(group)
        self.groups = groups
        limits = self._limits()
        for group in groups:
            acceptor = self.acceptors.get(group.index)
            if acceptor is None:
                acceptor = self._add_acceptor(group, limits[group.name])
                self._slots.heartbeat(group.slots[self.index], time.monotonic_ns())
                self._slots.set_state(group.slots[self.index], SlotState.ACTIVE)
                acceptor.start()
                continue
            words = self._words(Scope.LISTENER, group.name)
            cluster_state = self.clusters.get(group.listener.cluster)
            self.traffic.equip(acceptor.ctx, group.listener, cluster_state)
            acceptor.apply(group.listener, cluster_state, words, limits[group.name])
            self._slots.set_capacity(group.slots[self.index], limits[group.name])
        for group in known.values():
            self._remove(group)

    def _remove(self, group: ListenerGroup) -> None:
        """Take what waits, whoever's queue it is in, then close our copies; its sessions go on."""
        acceptor = self.acceptors.pop(group.index)
        for sock in group.socks:
            acceptor.accept_waiting(sock)
        acceptor.stop_accepting()
        acceptor.disown()  # its slot will be another listener's
        self._leaving.append(acceptor)
        for _token, session in list(self.slab):
            if session.ctx is acceptor.ctx:
                session.drain()
        for sock in group.socks:
            self.reactor.close_after_batch(sock)

    def _retire(self, timeout_ns: int) -> None:
        """A successor has the listeners and the slots from now on: finish what is here, touch neither."""
        for acceptor in self.acceptors.values():
            acceptor.disown()
        self._in_charge = False
        self.drain(timeout_ns)
        self._on_last_call(time.monotonic_ns())

    # heartbeat and siblings

    def _each_batch(self, now: int) -> None:
        if now - self._last_beat_ns >= self._beat_every_ns:
            self._beat(now)

    def _beat(self, now: int) -> None:
        self._last_beat_ns = now
        for slot in self.own_slots:
            self._slots.heartbeat(slot, now)

    def _on_beat(self, now: int) -> None:
        now = time.monotonic_ns()
        self._beat(now)
        row, reactor = self._row, self.reactor
        row[_ITERATIONS] += reactor.iterations
        row[_BUSY] += reactor.busy_ns
        reactor.iterations = reactor.busy_ns = 0
        self._mirror.update(self.clusters.values(), now)
        self._watch_siblings()
        reactor.timers.arm(self._beat_timer, now + self._beat_every_ns)

    def _watch_siblings(self) -> None:
        """Accept from the listeners of siblings that hang, died, leave or stand still while we are idle."""
        if self.draining:
            return
        now = time.monotonic_ns()
        for group in self.groups:
            if group.shared:
                continue
            acceptor = self.acceptors[group.index]
            for index, slot in enumerate(group.slots):
                if index == self.index:
                    continue
                sock = group.socks[index]
                if self._needs_help(slot, now, acceptor):
                    if not acceptor.taking_over(sock):
                        acceptor.take_over(sock)
                        acceptor.accept_waiting(sock)
                elif acceptor.taking_over(sock):
                    acceptor.give_back(sock)

    def _needs_help(self, slot: int, now: int, acceptor: Acceptor) -> bool:
        slots = self._slots
        state = slots.state(slot)
        if state in (SlotState.DEAD, SlotState.DRAINING):
            return True
        if state is SlotState.FREE:
            return False
        if now - slots.heartbeat_ns(slot) > self.config.hang_after_ns:
            return True
        waiting, taken = slots.waiting(slot), slots.taken(slot)
        before, looks = self._standing.get(slot, (-1, 0))
        looks = looks + 1 if waiting and taken == before else 0
        self._standing[slot] = (taken, looks)
        return looks >= LOOKS_BEFORE_HELP and acceptor.idle

    # zombies, faults

    def _on_zombies(self, now: int) -> None:
        zombies.check(self.slab, now, self.config.max_session_age_ns, self._count_zombie)
        self._answers.tell_zombies()
        if self.splicer is not None:
            self.splicer.reap()
        self.reactor.timers.arm(self._zombie_timer, now + self.config.zombie_interval_ns)

    def _count_zombie(self, session: Session, reason: EndReason) -> None:
        session.ctx.words[_ZOMBIES] += 1
        self._answers.zombie(session, reason)

    def _on_callback_failure(self, callback: Callable[[int], None]) -> None:
        owner = getattr(callback, "__self__", None)
        if isinstance(owner, BackConnection):
            owner = owner.user
        if isinstance(owner, TcpSession | HttpSession | Spliced | BodySplice):
            owner.end(EndReason.INTERNAL_ERROR)

    # leaving

    def drain(self, timeout_ns: int) -> None:
        """Serve what waits, let sessions finish, then end; at the limit cut the rest and count it."""
        if self.draining:  # systemd signals us and the supervisor tells us: the shorter limit counts
            self._drain_until_ns = min(self._drain_until_ns, time.monotonic_ns() + timeout_ns)
            return
        self.draining = True
        now = time.monotonic_ns()
        self._drain_until_ns = now + timeout_ns
        for slot in self.own_slots:
            self._slots.set_state(slot, SlotState.DRAINING)
        for acceptor in self.acceptors.values():
            acceptor.ctx.draining = True
        for _token, session in list(self.slab):
            session.drain()
        # handshakes that have begun may finish and are served; no new one is let in meanwhile
        self.reactor.timers.arm(self._quiet_timer, min(now + LAST_CALL_NS, self._drain_until_ns))
        self._on_drain_tick(now)

    def _on_last_call(self, now: int) -> None:
        if self._quiet:
            return
        self._quiet = True
        for acceptor in self.acceptors.values():
            if self._in_charge:
                acceptor.accept_waiting()
            acceptor.stop_accepting()
        for group in self.groups:
            for sock in group.socks:
                sock.close()
        self.setup.channel.send({"type": "quiet"})

    def _on_drain_tick(self, now: int) -> None:
        waiting = any(acceptor.queue for acceptor in self._all_acceptors())
        if now >= self._drain_until_ns or (self._quiet and len(self.slab) == 0 and not waiting):
            self._finish(EndReason.SHUTDOWN)
        else:
            self.reactor.timers.arm(self._drain_timer, now + DRAIN_TICK_NS)

    def _all_acceptors(self) -> list[Acceptor]:
        return [*self.acceptors.values(), *self._leaving]

    def _finish(self, reason: EndReason) -> None:
        dropped = sum(acceptor.drop_queue() for acceptor in self._all_acceptors())
        cut = 0
        for _token, session in list(self.slab):
            session.end(reason)
            cut += 1
        if cut or dropped:
            logs.event(_log, logging.WARNING, "cut", worker=self.index, sessions=cut, queued=dropped)
        self._mirror.update(self.clusters.values(), time.monotonic_ns())
        self.setup.channel.send({"type": "finished", "cut": cut, "dropped": dropped})
        self.reactor.stop()


def main(setup: WorkerSetup) -> None:
    """The body of a worker process, from fork to exit."""
    setproctitle.setproctitle(f"tidegate: worker {setup.index}")
    setup.close_inherited()
    if setup.config.pin_workers:
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cpus[setup.index % len(cpus)]})
    splicing = setup.splice.create()  # needs what the next line gives up
    become(setup.user)
    die_with(setup.supervisor)
    Worker(setup, splicing).run()
