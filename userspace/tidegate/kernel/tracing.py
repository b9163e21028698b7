"""Programs on the cgroup of a service that is not ours, for as long as somebody looks.

Nothing of the service changes. What its server accepts with the peer's address (accept(fd, &address), which
nearly all do) is timed exactly, for the kernel runs the cgroup's getpeername program then, and a connection
knows by itself when it was established. A second program counts what is established. It costs more than the
first one, the kernel running it four times for each connection, and is attached only while it is not known
that every connection is timed.
"""

from __future__ import annotations

import ctypes
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from tidegate.kernel import bpf
from tidegate.kernel.bpf import AttachType, ProgType
from tidegate.kernel.cgroup import mount_point
from tidegate.kernel.loader import MapNumber, Objects, Program, compile_programs
from tidegate.kernel.queue_times import READ, QueueTimes, TracingError, defines, make_map
from tidegate.kernel.records import AGE_BUCKETS, TraceAccepts

__all__ = ["Accepts", "Ages", "Cost", "Counts", "Tracer", "TracingError", "cgroup_of", "is_root"]

_SOCKOPS: Final = Program("trace_sockops", ProgType.SOCK_OPS, AttachType.CGROUP_SOCK_OPS, load_attach=False)
_ACCEPT: Final = tuple(
    Program("trace_accept", ProgType.CGROUP_SOCK_ADDR, attach)
    for attach in (AttachType.CGROUP_INET4_GETPEERNAME, AttachType.CGROUP_INET6_GETPEERNAME)
)
_FIRST: Final = bytes(4)
_WORD: Final = 8


class Counts(NamedTuple):
    """Connections. Of those taken, `half_closed` had sent FIN by then and `gone` were reset."""

    arrived: int
    taken: int
    half_closed: int
    gone: int


class Accepts(NamedTuple):
    """Since attaching. Of those taken, `half_closed` had sent FIN by then and `gone` were reset."""

    taken: int
    half_closed: int
    gone: int
    asked_again: int  # later questions for the peer, which are no accepts


@dataclass(frozen=True, slots=True)
class Ages:
    """Ages at accept, ns: bucket b counts [2^b, 2^(b+1))."""

    count: int
    sum_ns: int
    max_ns: int
    buckets: tuple[int, ...]


class Cost(NamedTuple):
    """What a program took, while statistics were enabled."""

    name: str
    run_ns: int
    runs: int


def cgroup_of(pid: int) -> Path:
    """The directory of a process's cgroup. TracingError when there is no such process or hierarchy."""
    try:
        text = Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        raise TracingError(f"no process {pid}") from None
    for line in text.splitlines():
        if line.startswith("0::"):
            return mount_point() / line[3:].lstrip("/")
    raise TracingError(f"process {pid} is in no cgroup2 hierarchy")


def is_root(cgroup: Path) -> bool:
    """Whether it is the root of the hierarchy: programs there would run for every socket of the host."""
    return cgroup.resolve() == mount_point().resolve()


class Tracer(QueueTimes):
    """Attached programs and their maps; what they hold is gone when this process ends, however it ends."""

    def __init__(self, cgroup: Path) -> None:
        """Compiles, loads and attaches, about half a second. Raises as QueueTimes does."""
        objects = compile_programs((READ, _SOCKOPS, _ACCEPT[0]), defines())
        super().__init__(cgroup, time.monotonic_ns(), objects)
        self._programs: list[tuple[Program, int]] = []  # and their fds, which stay open: they have the costs
        self._links: dict[Program, int] = {}
        self._directory = -1
        self._maps: dict[MapNumber, int] = {}
        with ExitStack() as undo:
            undo.callback(self.close)
            self._load(objects)
            try:
                self._directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                raise TracingError(f"cgroup {cgroup}: {error.strerror}") from None
            self.counts_arrivals = True
            for program in _ACCEPT:
                self._attach(program)
            undo.pop_all()

    def _load(self, objects: Objects) -> None:
        self._maps[MapNumber.TRACE_STATE] = os.dup(self._state_fd)
        for number in (MapNumber.TRACE_ARRIVED, MapNumber.TRACE_ACCEPTS):
            self._maps[number] = make_map(number)
        for program in (_SOCKOPS, *_ACCEPT):
            self._programs.append((program, objects.load(program, self._maps)))

    def _attach(self, program: Program) -> None:
        fd = next(fd for known, fd in self._programs if known == program)
        try:
            self._links[program] = bpf.link_create(fd, self._directory, program.attach)
        except OSError as error:
            raise TracingError(f"cannot attach to {self.cgroup}: {error.strerror}") from None

    def close(self) -> None:
        """Detaches. Idempotent."""
        super().close()
        fds = [*self._links.values(), *self._maps.values(), *(fd for _, fd in self._programs)]
        if self._directory >= 0:
            fds.append(self._directory)
        for fd in fds:
            os.close(fd)
        self._links, self._maps, self._programs, self._directory = {}, {}, [], -1

    @property
    def counts_arrivals(self) -> bool:
        """Whether the second program is attached. TracingError when it cannot be."""
        return _SOCKOPS in self._links

    @counts_arrivals.setter
    def counts_arrivals(self, wanted: bool) -> None:
        if wanted and not self.counts_arrivals:
            self._attach(_SOCKOPS)
        elif not wanted and self.counts_arrivals:
            os.close(self._links.pop(_SOCKOPS))

    def check_all(self, wanted: bool) -> None:
        """Whether the first program looks at every call, or only at those that may be no accept."""
        if bool(self._state.check_all) != wanted:
            self._state.check_all = wanted
            self._publish()

    def arrived(self) -> int:
        """Connections established while that was counted."""
        words = bpf.map_lookup_percpu(self._maps[MapNumber.TRACE_ARRIVED], _FIRST, _WORD)
        return sum(int.from_bytes(word, "little") for word in words)

    def accepted(self) -> tuple[Accepts, Ages]:
        """What was seen of accept so far, and the ages."""
        size = ctypes.sizeof(TraceAccepts)
        values = bpf.map_lookup_percpu(self._maps[MapNumber.TRACE_ACCEPTS], _FIRST, size)
        found = [TraceAccepts.from_buffer_copy(value) for value in values]
        buckets = tuple(sum(one.buckets[bucket] for one in found) for bucket in range(AGE_BUCKETS))
        taken = sum(buckets)
        accepts = Accepts(
            taken,
            sum(one.half_closed for one in found),
            sum(one.gone for one in found),
            sum(one.asked_again for one in found),
        )
        return accepts, Ages(
            taken, sum(one.sum_ns for one in found), max(one.max_ns for one in found), buckets
        )

    def counts(self) -> Counts:
        """Both programs' counts so far; arrivals only as long as they were counted."""
        accepts, _ = self.accepted()
        return Counts(self.arrived(), accepts.taken, accepts.half_closed, accepts.gone)

    def cost(self) -> list[Cost]:
        """What each program took, all zeros unless bpf.enable_stats() holds."""
        costs = []
        for program, fd in self._programs:
            stats = bpf.prog_run_stats(fd)
            costs.append(Cost(program.name, stats.run_ns, stats.runs))
        return costs
