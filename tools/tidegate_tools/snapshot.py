"""One look at the accept queues of the host: what `ages` shows and what `top` and `record` repeat."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tidegate.kernel import bpf
from tidegate.kernel.sock_diag import Queues, SockDiag
from tidegate_tools import namespaces
from tidegate_tools.queues import Queue, QueueTable, Source, collect, settle

# the maps' names in the kernel
STAMP_MAP = "tg_stamps"  # tidegate's (kernel/maps.py)
TRACE_MAP = "tg_trace_stamps"  # that of `tidegate trace`
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
    _diags: list[tuple[str, SockDiag]] = field(default_factory=list)
    _maps: dict[int, Source | None] = field(default_factory=dict)
    _storages: bool = True
    _notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for namespace in self.where:
            try:
                self._diags.append((namespace.name, namespaces.open_diag(namespace)))
            except namespaces.NamespaceError as error:
                if len(self.where) == 1:
                    raise
                self._notes.append(error.message)

    def close(self) -> None:
        for _, diag in self._diags:
            diag.close()
        self._diags.clear()

    def read(self) -> Snapshot:
        """The queues now. OSError when the kernel refuses sock_diag as a whole."""
        start = time.monotonic_ns()
        queues = self._look()
        if any(queue.dead for queue in queues):
            settle(queues, self._look())
        now = time.monotonic_ns()
        return Snapshot(queues, now, now - start, list(self._notes))

    def _look(self) -> list[Queue]:
        found: list[Queue] = []
        for name, diag in self._diags:
            table = QueueTable(diag.listeners(), name)
            queued = self._queued(diag)
            for entry in queued.waiting:
                for map_id in entry.storages:
                    if map_id not in self._maps:
                        self._maps[map_id] = _source_of(map_id)
            stamps = {map_id: source for map_id, source in self._maps.items() if source is not None}
            collect(table, queued.waiting, queued.half_open, diag.listeners(), stamps)
            found += table.queues()
        return found

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
    if info.name == TRACE_MAP:
        return Source.ATTACHED
    return Source.STAMP if info.name == STAMP_MAP else None
