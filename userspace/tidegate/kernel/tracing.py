"""Stamps for a service that is not ours: programs on its cgroup, for as long as somebody looks.

Nothing of the service changes. Connections established from now on are stamped; those that its server accepts
with their address (accept(fd, &address), which nearly all do) are timed exactly, for the kernel runs the
cgroup's getpeername program then. A server that does not ask is timed when it first calls getpeername(), if
ever: `Counts.taken` then falls behind what was accepted.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, cast

from tidegate.errors import OperatorError
from tidegate.kernel import bpf, btf
from tidegate.kernel.bpf import AttachType, MapType, ProgType
from tidegate.kernel.cgroup import mount_point
from tidegate.kernel.links import Attached
from tidegate.kernel.loader import MapNumber, Program, compile_programs
from tidegate.kernel.records import AgeHistogram, Slot, Stamp

STAMPS_NAME = "tg_trace_stamps"
"""The map's name in the kernel, by which others find the stamps."""

# linux/bpf.h; only these programs use them
_CGROUP_SOCK_ADDR = cast(ProgType, 18)
_GETPEERNAME = (cast(AttachType, 29), cast(AttachType, 30))  # INET4, INET6

_SOCKOPS = Program("trace_sockops", ProgType.SOCK_OPS, AttachType.CGROUP_SOCK_OPS, load_attach=False)
_ACCEPT = tuple(Program("trace_accept", _CGROUP_SOCK_ADDR, attach) for attach in _GETPEERNAME)

# the roles of bpf/trace.h
_STAMPS, _COUNTS, _AGES = MapNumber.STAMPS, MapNumber.SLOTS, MapNumber.AGES
_FIRST = b"\0\0\0\0"


class TracingError(OperatorError):
    """The programs cannot be attached there."""


class Counts(NamedTuple):
    """Since attaching. Of those taken, `half_closed` had sent FIN by then and `gone` were reset."""

    arrived: int
    taken: int
    half_closed: int
    gone: int


@dataclass(frozen=True, slots=True)
class Ages:
    """Ages at accept, ns: bucket b counts [2^b, 2^(b+1))."""

    count: int
    sum_ns: int
    max_ns: int
    buckets: tuple[int, ...]


class Cost(NamedTuple):
    """What the programs took, while statistics were enabled."""

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


class Tracer:
    """Attached programs and their maps; what they hold is gone when this process ends, however it ends."""

    def __init__(self, cgroup: Path) -> None:
        """Compiles, loads and attaches, about half a second.

        Raises:
            KernelUnavailable: the kernel or the compiler refuses.
            TracingError: the cgroup does not exist or may not be used.
        """
        self.cgroup = cgroup
        self._attached: list[Attached] = []
        with ExitStack() as undo:
            objects = compile_programs((_SOCKOPS, _ACCEPT[0]))
            try:
                directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                raise TracingError(f"cgroup {cgroup}: {error.strerror}") from None
            undo.callback(os.close, directory)
            with ExitStack() as failed:
                self._maps = _make_maps(failed)
                failed.callback(self._close_attached)
                for program in (_SOCKOPS, *_ACCEPT):
                    fd = objects.load(program, self._maps)
                    try:
                        attached = Attached.to_cgroup(program.name, fd, directory, program.attach)
                    except OSError as error:
                        os.close(fd)
                        raise TracingError(f"cannot attach to {cgroup}: {error.strerror}") from None
                    self._attached.append(attached)
                failed.pop_all()

    def __enter__(self) -> Tracer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Detaches. Idempotent."""
        self._close_attached()
        for fd in self._maps.values():
            os.close(fd)
        self._maps = {}

    def _close_attached(self) -> None:
        for attached in self._attached:
            attached.close()
        self._attached.clear()

    def counts(self) -> Counts:
        """So far."""
        value = Slot.from_buffer_copy(bpf.map_lookup(self._maps[_COUNTS], _FIRST, ctypes.sizeof(Slot)))
        return Counts(value.arrived, value.taken, value.half_closed, value.gone)

    def ages(self) -> Ages:
        """So far."""
        size = ctypes.sizeof(AgeHistogram)
        value = AgeHistogram.from_buffer_copy(bpf.map_lookup(self._maps[_AGES], _FIRST, size))
        return Ages(value.count, value.sum_ns, value.max_ns, tuple(value.buckets))

    def cost(self) -> list[Cost]:
        """What each program took, all zeros unless bpf.enable_stats() holds."""
        costs = []
        for attached in self._attached:
            stats = bpf.prog_run_stats(attached.prog_fd)
            costs.append(Cost(attached.name, stats.run_ns, stats.runs))
        return costs


def _make_maps(undo: ExitStack) -> dict[MapNumber, int]:
    made: dict[MapNumber, int] = {}
    for number, kind, record, entries, name, flags in (
        (_STAMPS, MapType.SK_STORAGE, Stamp, 0, STAMPS_NAME, bpf.F_NO_PREALLOC),
        (_COUNTS, MapType.ARRAY, Slot, 1, "tg_trace_counts", 0),
        (_AGES, MapType.ARRAY, AgeHistogram, 1, "tg_trace_ages", 0),
    ):
        blob, key, value = btf.describe(record)
        try:
            btf_fd = bpf.btf_load(blob)
            try:
                made[number] = bpf.map_create(
                    kind, 4, ctypes.sizeof(record), entries, name, flags, btf=(btf_fd, key, value)
                )
            finally:
                os.close(btf_fd)
        except PermissionError:
            raise TracingError("attaching programs needs root", "run it as root") from None
        except OSError as error:
            raise TracingError(f"the kernel refuses a map ({name}): {error.strerror}") from None
        undo.callback(os.close, made[number])
    return made
