"""One look at the accept queues of the host: what `ages` shows and what `top` and `record` repeat."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tidegate.kernel import bpf
from tidegate.kernel.queue_times import Asker, Running
from tidegate.kernel.sock_diag import QueuedSocket, Queues, SockDiag
from tidegate_tools import namespaces
from tidegate_tools.queues import Queue, QueueTable, Source, collect, settle

STAMP_MAP = "tg_stamps"  # the name in the kernel of tidegate's own (kernel/maps.py)
_STAMP_MAP_SIZE = 24


@dataclass(slots=True)
class Snapshot:
    """`notes` say what could not be shown, and why."""

    queues: list[Queue]
    taken_ns: int  # CLOCK_MONOTONIC, after the last answer
    took_ns: int = 0  # from the first question to the last answer
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Reader:
    """Keeps its sockets, and what it learnt of BPF maps, from one look to the next."""

    where: Sequence[namespaces.Namespace] = (namespaces.OWN,)
    _diags: list[tuple[namespaces.Namespace, SockDiag]] = field(default_factory=list)
    _maps: dict[int, Source | None] = field(default_factory=dict)
    _storages: bool = True
    _running: Running = field(default_factory=Running)
    _notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for namespace in self.where:
            try:
                self._diags.append((namespace, namespaces.open_diag(namespace)))
            except namespaces.NamespaceError as error:
                if len(self.where) == 1:
                    raise
                self._notes.append(error.message)

    def note(self, text: str) -> None:
        """Something that no look will show."""
        self._notes.append(text)

    def close(self) -> None:
        for _, diag in self._diags:
            diag.close()
        self._diags.clear()
        self._running.close()

    def read(self) -> Snapshot:
        """The queues now. OSError when the kernel refuses sock_diag as a whole."""
        start = time.monotonic_ns()
        queues = self._look()
        if any(queue.dead for queue in queues):
            settle(queues, self._look())
        now = time.monotonic_ns()
        return Snapshot(queues, now, now - start, list(self._notes))

    def passive_opens(self) -> dict[str, int]:
        """What the kernel counted of connections that came in, by network namespace, where it says."""
        counts = {namespace.name: namespaces.passive_opens(namespace) for namespace, _ in self._diags}
        return {name: count for name, count in counts.items() if count is not None}

    def _look(self) -> list[Queue]:
        found: list[Queue] = []
        askers = self._running.askers()
        for namespace, diag in self._diags:
            table = QueueTable(diag.listeners(), namespace.name)
            queued = self._queued(diag)
            for asker in askers:
                self._ask(asker, namespace, queued.waiting)
            for entry in queued.waiting:
                for map_id in entry.storages:
                    if map_id not in self._maps:
                        self._maps[map_id] = _source_of(map_id)
            stamps = {map_id: source for map_id, source in self._maps.items() if source is not None}
            collect(table, queued.waiting, queued.half_open, diag.listeners(), stamps)
            found += table.queues()
        return found

    def _ask(self, asker: Asker, namespace: namespaces.Namespace, waiting: list[QueuedSocket]) -> None:
        """Exact times for what a trace is about."""
        wanted = [one for one in waiting if not one.established_ns and asker.concerns(one)]
        if not wanted:
            return
        try:
            with namespaces.inside(namespace):
                times = asker.ask(wanted)
        except (OSError, namespaces.NamespaceError):
            return  # it ended meanwhile, or the namespace did
        for one, established_ns in zip(wanted, times, strict=True):
            one.established_ns = established_ns

    def _queued(self, diag: SockDiag) -> Queues:
        if self._storages:
            try:
                return diag.queues(storage_maps=())
            except PermissionError:
                self._storages = False
                self._notes.append("stamps need root: ages are the kernel's own (tcp_info)")
            except OSError as error:  # a kernel before 5.7 does not know the attribute
                self._storages = False
                self._notes.append(f"stamps cannot be read here: {error.strerror}")
        return diag.queues()


def _source_of(map_id: int) -> Source | None:
    """Whose stamps a socket storage map holds; None when it is none of ours."""
    try:
        fd = bpf.map_fd_by_id(map_id)
    except OSError:
        return None
    try:
        info = bpf.map_info(fd)
    finally:
        os.close(fd)
    if info.type != bpf.MapType.SK_STORAGE or info.value_size != _STAMP_MAP_SIZE:
        return None
    return Source.STAMP if info.name == STAMP_MAP else None
