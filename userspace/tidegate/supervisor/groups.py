"""The listeners' sockets, slots and steering, as the supervisor holds them."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Collection, Sequence

from tidegate import logs
from tidegate.config.model import Config, Listener
from tidegate.errors import OperatorError
from tidegate.kernel import tcp_info
from tidegate.kernel.half import KernelHalf
from tidegate.kernel.records import MAX_SLOTS, SlotState
from tidegate.kernel.slots import Slots
from tidegate.supervisor import sockets
from tidegate.supervisor.plan import ListenerGroup

_log = logging.getLogger("tidegate.supervisor")


class ListenerGroups:
    """Opens, marks, steers and closes. Works without the kernel half too: plain reuseport, plain memory."""

    def __init__(self, half: KernelHalf | None, slots: Slots, workers: int) -> None:
        self.half = half
        self.slots = slots
        self.workers = workers
        self.groups: list[ListenerGroup] = []
        self.unsteered: dict[str, str] = {}  # listener name -> why the kernel's own hash chooses
        self._next_index = 0

    def open(
        self, listeners: Sequence[Listener], config: Config, given: dict[str, socket.socket]
    ) -> list[ListenerGroup]:
        """Open all of them or none; `given` are sockets from systemd by listener name. Not yet listening."""
        opened: list[ListenerGroup] = []
        try:
            for listener in listeners:
                sock = given.get(listener.name)
                if sock is not None:
                    group = ListenerGroup(listener, self._take_index(), [sock], [], shared=True)
                else:
                    socks = sockets.open_listeners(listener, self.workers)
                    group = ListenerGroup(listener, self._take_index(), socks)
                opened.append(group)
            for group in opened:
                for _ in range(self.workers):
                    group.slots.append(self._allocate_slot())
        except OperatorError:
            self.discard(opened)
            raise
        return opened

    def discard(self, opened: Sequence[ListenerGroup]) -> None:
        """Undo `open` of groups that nobody was told of."""
        for group in opened:
            if not group.shared:
                group.close()
            self.free_slots(group)

    def activate(self, group: ListenerGroup, config: Config) -> None:
        """Mark the sockets, let the kernel take connections in, steer them."""
        listener = group.listener
        if not group.shared:
            for sock, slot in zip(group.socks, group.slots, strict=True):
                self._mark(sock, slot, listener.backlog)
            sockets.start_listening(group.socks, listener.backlog)
            self._steer(group, config)
        self.groups.append(group)

    def adopt(
        self,
        config: Config,
        listener: Listener,
        index: int,
        socks: list[socket.socket],
        slots: list[int],
        shared: bool,
    ) -> ListenerGroup:
        """A predecessor's group, with sockets added for workers that it did not have."""
        group = ListenerGroup(listener, index, socks, slots, shared)
        self._next_index = max(self._next_index, index + 1)
        if not shared:
            steered = self.half.groups.get(index) if self.half else None
            for sock in sockets.open_more(listener, socks[0], self.workers - len(socks)):
                slot = self._allocate_slot()
                self._mark(sock, slot, listener.backlog)
                sockets.start_listening([sock], listener.backlog)
                group.socks.append(sock)
                group.slots.append(slot)
                if steered is not None:
                    steered.add(sock, slot)
        while len(group.slots) < self.workers:
            group.slots.append(self._allocate_slot())
        for slot in group.slots[self.workers :]:
            self.slots.set_state(slot, SlotState.DEAD)
        self.groups.append(group)
        if not shared and self.half is not None:
            steered = self.half.groups.get(index)
            if steered is None:
                self._steer(group, config)
            else:
                steered.configure(config.steer, listener.when_full, config.hang_after_ns)
        return group

    def reclaim(self, config: Config, alive: Collection[int]) -> None:
        """After a successor failed, whatever it wrote: slots, marks and steering are ours again.

        `alive` are the workers that accept.
        """
        for group in self.groups:
            for worker, slot in enumerate(group.slots):
                if not group.shared:
                    self._mark(group.socks[worker], slot, group.listener.backlog)
                self.slots.set_state(slot, SlotState.ACTIVE if worker in alive else SlotState.DEAD)
            steered = self.half.groups.get(group.index) if self.half is not None else None
            for slot in set(steered.slots) - set(group.slots) if steered is not None else ():
                assert steered is not None
                steered.remove(slot)
        ours = {slot for group in self.groups for slot in group.slots}
        for slot in range(MAX_SLOTS):
            if slot not in ours and self.slots.state(slot) is not SlotState.FREE:
                self._free_slot(slot)
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Apply what a reload may change of steering and backlogs."""
        for group in self.groups:
            if self.half is not None and (steered := self.half.groups.get(group.index)) is not None:
                steered.configure(config.steer, group.listener.when_full, config.hang_after_ns)

    def relisten(self, group: ListenerGroup) -> None:
        """What of a listener's sockets changes without new ones: backlog (listen(2) again), keep-alive."""
        for sock in group.socks:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, int(group.listener.tcp_keepalive))
        sockets.start_listening(group.socks, group.listener.backlog)
        for slot in group.slots:
            self.slots.set_backlog(slot, min(group.listener.backlog, sockets.somaxconn()))

    def forget(self, group: ListenerGroup) -> None:
        """The listener is on its way out: no longer marked, steered or counted. Its sockets stay open."""
        self.groups.remove(group)
        if self.half is not None:
            for sock in group.socks:
                self.half.unmark_listener(sock)
            self.half.unsteer_listener(group.index)

    def free_slots(self, group: ListenerGroup) -> None:
        """Once no worker knows of the group any more."""
        for slot in group.slots:
            self._free_slot(slot)

    def waiting(self, group: ListenerGroup) -> int:
        """Connections in the kernel's accept queues of this listener, by the kernel's own count."""
        total = 0
        for sock in group.socks:
            try:
                total += tcp_info.accept_backlog(sock)[0]
            except (OSError, ValueError):
                continue  # no longer listening
        return total

    def waiting_at(self, group: ListenerGroup, worker: int) -> int:
        if group.shared or worker >= len(group.socks):
            return 0
        try:
            return tcp_info.accept_backlog(group.socks[worker])[0]
        except (OSError, ValueError):
            return 0

    def resync(self, worker: int) -> None:
        """After a worker's death: what it accepted without reading its age must not count as waiting."""
        if self.half is None:
            return
        for group in self.groups:
            if not group.shared:
                with contextlib.suppress(OSError, ValueError):  # it listens no more
                    self.half.resync(group.slots[worker], group.socks[worker])

    def refuse_new(self) -> None:
        """Before the end: what waits is still served. Systemd's own sockets go on for our successor."""
        for group in self.groups:
            for sock in () if group.shared else group.socks:
                sockets.refuse_new(sock)

    def close_for_everyone(self) -> None:
        for group in self.groups:
            for sock in () if group.shared else group.socks:
                sockets.close_for_everyone(sock)

    def close(self) -> None:
        for group in self.groups:
            group.close()
        self.groups.clear()

    def _steer(self, group: ListenerGroup, config: Config) -> None:
        if self.half is None or len(group.socks) < 2:
            return
        try:
            self.half.steer_listener(
                group.index,
                list(zip(group.socks, group.slots, strict=True)),
                policy=config.steer,
                when_full=group.listener.when_full,
                hang_after_ns=config.hang_after_ns,
            )
        except OperatorError as error:
            self.unsteered[group.name] = error.message
            logs.event(_log, logging.WARNING, "not_steered", listener=group.name, reason=error.message)

    def _mark(self, sock: socket.socket, slot: int, backlog: int) -> None:
        if self.half is not None:
            self.half.mark_listener(sock, slot, backlog)
        else:
            self.slots.set_backlog(slot, min(backlog, sockets.somaxconn()))
            self.slots.heartbeat(slot, time.monotonic_ns())
            self.slots.set_state(slot, SlotState.ACTIVE)

    def _allocate_slot(self) -> int:
        if self.half is not None:
            return self.half.allocate_slot()
        for slot in range(MAX_SLOTS):
            if self.slots.state(slot) is SlotState.FREE:
                self.slots.set_state(slot, SlotState.DRAINING)
                return slot
        raise OperatorError(
            f"more than {MAX_SLOTS} pairs of listener and worker", "fewer listeners or workers"
        )

    def _free_slot(self, slot: int) -> None:
        if self.half is not None:
            self.half.reset_slot(slot)
        else:
            self.slots.reset(slot)

    def _take_index(self) -> int:
        self._next_index += 1
        return self._next_index - 1
