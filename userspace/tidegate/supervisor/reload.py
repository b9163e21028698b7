"""SIGHUP: the configuration read again, in place. A bad file changes nothing.

New sockets are opened before anything is told to anybody, so that a failure leaves the old state whole.
Listeners that stay keep their sockets, with all that waits in them; workers keep their sessions.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from tidegate import config as configuration
from tidegate import logs
from tidegate.config import process_tables
from tidegate.config.diff import Changes, changes
from tidegate.config.model import Config
from tidegate.control.server import Reply
from tidegate.errors import OperatorError
from tidegate.loop.timers import Timer
from tidegate.metrics.names import ReloadResult, Scope
from tidegate.metrics.segment import SUPERVISOR, RowKey
from tidegate.supervisor.channel import MAX_FDS, to_memfd
from tidegate.supervisor.plan import ListenerGroup
from tidegate.supervisor.sockets import close_for_everyone, refuse_new

if TYPE_CHECKING:
    from tidegate.supervisor.supervisor import Supervisor

_log = logging.getLogger("tidegate.supervisor")

# A worker that has not applied a reload by then hangs; it will when it wakes, or be replaced.
ACK_LIMIT_NS = 5_000_000_000


class Reload:
    """One reload at a time; a second one waits for nothing, it is refused."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._reply: Reply | None = None
        self._changes: Changes | None = None
        self._retiring: list[ListenerGroup] = []
        self._unfreed: list[tuple[int, ListenerGroup]] = []  # by the generation that has them no more
        self._timer = Timer(lambda now: self._finish(complete=False))

    @property
    def under_way(self) -> bool:
        return self._changes is not None

    def start(self, reply: Reply | None) -> None:
        """From a signal (no reply) or the control socket."""
        supervisor = self._supervisor
        if self.under_way or supervisor.draining or supervisor.upgrades.under_way:
            self._refuse(reply, "busy", "a reload, an upgrade or the end is under way", count=False)
            return
        supervisor.notifier.reloading()
        try:
            new = configuration.load(supervisor.path)
            found = changes(supervisor.config, new)
            new = _keep_restart_keys(supervisor.config, new, found)
            opened = self._open_new(new, found)
            try:
                self._allocate_rows(new)
            except OperatorError:
                supervisor.groups.discard(opened)
                raise
        except OperatorError as error:
            supervisor.notifier.ready("the old configuration serves on: reload refused")
            self._refuse(reply, "config", str(error))
            return
        self._changes = found
        self._reply = reply
        try:
            self._apply(new, found, opened)
        except Exception as error:
            # half of it may be in force: that much is told, and the next reload is not refused as busy
            supervisor.reactor.timers.cancel(self._timer)
            self._changes = self._reply = None
            self._refuse(reply, "internal_error", f"it failed half-way, reload again: {error}")
            raise

    def acknowledged(self) -> None:
        """A worker applied the new configuration, or died: then its replacement has it."""
        supervisor = self._supervisor
        slowest = min(
            (one.generation for one in supervisor.workers.all if one.running), default=supervisor.generation
        )
        if self.under_way and slowest >= supervisor.generation:
            self._finish()
        self._free(slowest)

    def _free(self, slowest: int) -> None:
        """Slots of removed listeners, once no worker runs a configuration that has them."""
        for generation, group in self._unfreed:
            if generation <= slowest:
                self._supervisor.groups.free_slots(group)
        self._unfreed = [entry for entry in self._unfreed if entry[0] > slowest]

    def _allocate_rows(self, new: Config) -> None:
        """The counters of `new`, before anything of it is in force; raises SegmentFull."""
        supervisor = self._supervisor
        for index in range(supervisor.worker_count):
            for listener in new.listeners:
                supervisor.segment.row(RowKey(Scope.LISTENER, index, (listener.name,)))
            for cluster in new.clusters:
                for backend in cluster.backends:
                    supervisor.segment.row(RowKey(Scope.BACKEND, index, (cluster.name, str(backend.address))))

    def _open_new(self, new: Config, found: Changes) -> list[ListenerGroup]:
        wanted = [
            *found.listeners_added,
            *(change.new for change in found.listeners_changed if change.new_socket),
        ]
        return self._supervisor.groups.open(wanted, new, {})

    def _apply(self, new: Config, found: Changes, opened: list[ListenerGroup]) -> None:
        supervisor = self._supervisor
        groups = supervisor.groups
        old = supervisor.config
        gone = {listener.address for listener in found.listeners_removed}
        gone |= {change.old.address for change in found.listeners_changed if change.new_socket}
        self._retiring = [group for group in groups.groups if group.listener.address in gone]
        for group in self._retiring:
            groups.forget(group)
            # who connects from here on is refused, not left waiting for the reset at the end
            for sock in () if group.shared else group.socks:
                refuse_new(sock)
        stays = {listener.address: listener for listener in new.listeners}
        changed = {change.new.address: change for change in found.listeners_changed if not change.new_socket}
        for group in groups.groups:
            group.listener = stays[group.listener.address]
            change = changed.get(group.listener.address)
            if change is not None and ("backlog" in change.keys or "tcp_keepalive" in change.keys):
                groups.relisten(group)
        supervisor.config = new
        for group in opened:
            groups.activate(group, new)
        groups.configure(new)
        logs.setup(new.log.level, new.log.format)
        supervisor.allocate_rows()
        self.retire_rows(old, new)
        supervisor.generation += 1
        supervisor.changes.based_on(new)
        if supervisor.control is not None:
            supervisor.control.allow(new.control_users)
        self.tell_workers(new, opened)
        supervisor.workers.revive_failed()
        supervisor.reactor.timers.arm(self._timer, time.monotonic_ns() + ACK_LIMIT_NS)
        self.acknowledged()

    def tell_workers(self, new: Config, opened: list[ListenerGroup]) -> None:
        """Everybody gets the configuration that is in force; `opened` are listeners they do not know yet."""
        supervisor = self._supervisor
        plan = [(g.listener, g.index, list(g.slots), g.shared) for g in supervisor.groups.groups]
        memfd = to_memfd((new, plan), "tidegate-configuration")
        for one in supervisor.workers.all:
            if not one.running or one.channel is None:
                continue
            told = True
            for group in opened:
                fds = [sock.fileno() for sock in group.socks]
                for at in range(0, len(fds), MAX_FDS):
                    told &= one.channel.send(
                        {"type": "sockets", "index": group.index}, fds[at : at + MAX_FDS]
                    )
            told &= one.channel.send({"type": "reload", "generation": supervisor.generation}, [memfd])
            if not told:  # its queue is full: it has hung through many reloads
                logs.event(_log, logging.ERROR, "worker_not_told", worker=one.index)
                supervisor.workers.kill(one)
        os.close(memfd)

    def retire_rows(self, old: Config, new: Config) -> None:
        """The counters of listeners and backends that are no more."""
        segment, count = self._supervisor.segment, self._supervisor.worker_count
        gone = {listener.name for listener in old.listeners} - {listener.name for listener in new.listeners}
        keys: list[tuple[Scope, tuple[str, ...]]] = [(Scope.LISTENER, (name,)) for name in gone]
        before = {(c.name, str(b.address)) for c in old.clusters for b in c.backends}
        after = {(c.name, str(b.address)) for c in new.clusters for b in c.backends}
        keys += [(Scope.BACKEND, labels) for labels in before - after]
        for scope, labels in keys:
            for worker in (SUPERVISOR, *range(count)):
                key = RowKey(scope, worker, labels)
                if segment.find(key) is not None:
                    segment.retire(key)

    def _finish(self, complete: bool = True) -> None:
        supervisor = self._supervisor
        found, self._changes = self._changes, None
        reply, self._reply = self._reply, None
        assert found is not None
        supervisor.reactor.timers.cancel(self._timer)
        for group in self._retiring:
            for sock in group.socks:
                close_for_everyone(sock)
            self._unfreed.append((supervisor.generation, group))
        self._retiring = []
        notes = found.kept
        supervisor.count_reload(ReloadResult.APPLIED)
        said = found.describe() or ["nothing changed"]  # in effect; what is not is in the notes
        logged = "; ".join(found.describe() + notes) or "nothing changed"
        if not complete:
            notes.append("a worker hangs and will apply it when it wakes")
        logs.event(_log, logging.INFO, "reloaded", changes=logged, complete=complete)
        supervisor.notifier.ready(f"reloaded: {len(supervisor.groups.groups)} listeners")
        if reply is not None:
            reply.ok({"message": "reloaded: " + "; ".join(said), "changes": said, "notes": notes})

    def _refuse(self, reply: Reply | None, code: str, message: str, count: bool = True) -> None:
        logs.event(_log, logging.ERROR, "reload_refused", reason=message)
        if count:
            self._supervisor.count_reload(ReloadResult.REFUSED)
        if reply is not None:
            reply.error(code, message)


def _keep_restart_keys(old: Config, new: Config, found: Changes) -> Config:
    """What only a restart can change stays as it is."""
    kept = {}
    for name in found.restart:
        key = process_tables.PROCESS.key(name)
        assert key is not None
        kept[key.attribute] = getattr(old, key.attribute)
    return replace(new, **kept)
