"""When connections were established that nobody accepted yet, read from their sockets: for any server.

The kernel notes the moment in the socket itself (bpf/trace.h), to the microsecond, and no interface tells it:
not TCP_INFO, not sock_diag. A program that looks the socket up may read it. `QueueTimes` holds such a program
for one cgroup; nothing is attached, and nothing of the service is touched. Others find it, for as long as it
lives, by the name of its map: `running`.
"""

from __future__ import annotations

import ctypes
import os
import platform
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tidegate.errors import OperatorError
from tidegate.kernel import bpf, maps
from tidegate.kernel.bpf import AttachType, ProgType
from tidegate.kernel.cgroup import is_cgroup, mount_point
from tidegate.kernel.kernel_types import member_offset
from tidegate.kernel.loader import MapNumber, Objects, Program, compile_programs
from tidegate.kernel.records import MAX_QUEUED_ASKS, QueuedAsk, TraceState
from tidegate.kernel.sock_diag import QueuedSocket

READ: Final = Program("trace_read", ProgType.SCHED_CLS, AttachType.NONE, load_attach=False)

_FIRST: Final = bytes(4)
_MAPPED: Final = "::ffff:"
# behind what would be an Ethernet header
_HEADER: Final = bytes(14)
_ASK: Final = struct.Struct("=I2s2s16s16sQ")
_ANSWER_AT: Final = QueuedAsk.established_us.offset
_CHECK_NS: Final = 1_000_000_000
# struct __sk_buff, whose interface a look-up goes by
_CONTEXT: Final = struct.Struct("=40xI148x")

# where a task's registers have the number of its system call, how wide, and the numbers of getpeername and
# getsockopt, of 32-bit programs too
_CALLS: Final = {
    "x86_64": ("orig_ax", "u64", 52, 55, 368, 365),
    "aarch64": ("syscallno", "u32", 205, 209, 287, 295),
}


class TracingError(OperatorError):
    """The programs cannot be loaded, or not attached there."""


def defines() -> list[str]:
    """What the programs are compiled with. Raises TracingError where this kernel does not tell."""
    machine = platform.machine()
    if machine not in _CALLS:
        raise TracingError(f"tracing is not known to work on {machine}")
    number, kind, *calls = _CALLS[machine]
    # struct { u32 space; u32 seq; u64 time; } rcvq_space
    space = member_offset("tcp_sock", "rcvq_space")
    at = member_offset("pt_regs", number)
    if space is None or at is None:
        raise TracingError(
            "this kernel lacks the type information (BTF) that tracing needs",
            "run a kernel that has /sys/kernel/btf/vmlinux, as those of distributions do",
        )
    names = ("GETPEERNAME", "GETSOCKOPT", "GETPEERNAME_32", "GETSOCKOPT_32")
    return [
        f"RCVQ_TIME={space + 8}",
        f"CALL_NUMBER_AT={at}",
        f'CALL_NUMBER_TYPE="{kind}"',
        *(f"CALL_{name}={call}" for name, call in zip(names, calls, strict=True)),
    ]


def make_map(number: MapNumber) -> int:
    """The fd of a new map. Raises TracingError."""
    try:
        return maps.create(number)
    except PermissionError:
        raise TracingError("loading programs needs root", "run it as root") from None
    except OSError as error:
        raise TracingError(f"the kernel refuses a map: {error.strerror}") from None


class Asker:
    """Runs a program that tells times, for one trace."""

    def __init__(self, prog_fd: int, state: TraceState) -> None:
        """Takes over `prog_fd`."""
        self._prog_fd = prog_fd
        self._since_ns = int(state.since_ns)
        self._cgroup_id = int(state.cgroup_id)
        self._inside: frozenset[int] = frozenset()  # ids of the traced cgroup and those below it
        self._outside: set[int] = set()

    def concerns(self, one: QueuedSocket) -> bool:
        """Whether it is in the traced cgroup. Cgroups are looked up when an unknown one comes."""
        number = one.cgroup_id
        if number not in self._inside and number not in self._outside:
            self._inside = _subtree(self._cgroup_id)
            if number not in self._inside:
                self._outside.add(number)
        return number in self._inside

    def close(self) -> None:
        if self._prog_fd >= 0:
            os.close(self._prog_fd)
            self._prog_fd = -1

    def ask(self, queued: Sequence[QueuedSocket]) -> list[int]:
        """When each was established, ns of CLOCK_MONOTONIC cut to us; 0 where that is not known.

        For connections of the network namespace that the caller is in. OSError when the kernel refuses.
        """
        times = [0] * len(queued)
        by_interface: dict[int, list[int]] = {}
        for index, one in enumerate(queued):
            by_interface.setdefault(one.ifindex, []).append(index)
        for ifindex, indexes in by_interface.items():
            context = _CONTEXT.pack(ifindex) if ifindex else b""
            for at in range(0, len(indexes), MAX_QUEUED_ASKS):
                some = indexes[at : at + MAX_QUEUED_ASKS]
                packet = _HEADER + b"".join(_packed(queued[index]) for index in some)
                answer = bpf.prog_test_run(self._prog_fd, packet, context)
                for number, index in enumerate(some):
                    where = len(_HEADER) + number * _ASK.size + _ANSWER_AT
                    times[index] = int.from_bytes(answer[where : where + 8], "little") * 1000
        return [time_ns if time_ns >= self._since_ns else 0 for time_ns in times]


def _packed(one: QueuedSocket) -> bytes:
    family, hosts = one.family, (one.peer_host, one.host)
    if family == socket.AF_INET6 and hosts[0].startswith(_MAPPED) and "." in hosts[0]:
        # IPv4 on an IPv6 socket: the kernel files it under IPv4
        family, hosts = socket.AF_INET, (hosts[0].removeprefix(_MAPPED), hosts[1].removeprefix(_MAPPED))
    peer, local = (socket.inet_pton(family, host).ljust(16, b"\0") for host in hosts)
    ports = one.peer_port.to_bytes(2, "big"), one.port.to_bytes(2, "big")
    return _ASK.pack(family, *ports, peer, local, 0)


def _subtree(cgroup_id: int) -> frozenset[int]:
    """Ids of a cgroup and all below it, none when it is gone; walks the hierarchy until it is found."""
    for top, names, _ in os.walk(mount_point()):
        with suppress(OSError):
            if os.stat(top).st_ino == cgroup_id:
                below = (Path(directory) for directory, _, _ in os.walk(top))
                return frozenset(directory.stat().st_ino for directory in below)
        names.sort()
    return frozenset()


class QueueTimes:
    """Makes exact times readable for the connections of one cgroup and those below it, while it lives."""

    def __init__(self, cgroup: Path, since_ns: int = 0, objects: Objects | None = None) -> None:
        """Older connections than `since_ns` are left out. Compiles the program where it is not given.

        Raises:
            KernelUnavailable: the kernel or the compiler refuses.
            TracingError: the cgroup does not exist or may not be used.
        """
        self.cgroup = cgroup
        with ExitStack() as undo:
            if objects is None:
                objects = compile_programs((READ,), defines())
            self._state = TraceState(cgroup_id=_cgroup_id(cgroup), since_ns=since_ns, check_all=1)
            self._state_fd = make_map(MapNumber.TRACE_STATE)
            undo.callback(os.close, self._state_fd)
            self._reader_fd = objects.load(READ, {})
            undo.callback(os.close, self._reader_fd)
            _check(self._reader_fd)
            self._state.reader_id = bpf.prog_info(self._reader_fd).id
            self._publish()
            undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent."""
        for fd in (self._state_fd, self._reader_fd):
            if fd >= 0:
                os.close(fd)
        self._state_fd = self._reader_fd = -1

    def _publish(self) -> None:
        bpf.map_update(self._state_fd, _FIRST, bytes(self._state))


def _cgroup_id(cgroup: Path) -> int:
    try:
        number = cgroup.stat().st_ino
    except OSError as error:
        raise TracingError(f"cgroup {cgroup}: {error.strerror}") from None
    if not is_cgroup(cgroup):
        raise TracingError(f"{cgroup} is not a cgroup v2 directory", f"name one below {mount_point()}")
    return number


def _check(reader_fd: int) -> None:
    """Holds the program to our own clock, on a connection to ourselves: kernels differ, and may one day here.

    Raises TracingError. Where there is no loopback nothing is checked.
    """
    with ExitStack() as stack:
        try:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1))
            before = time.monotonic_ns()
            client = stack.enter_context(socket.create_connection(listener.getsockname(), timeout=1))
        except OSError:
            return
        (host, port), (peer, peer_port) = listener.getsockname(), client.getsockname()
        queued = QueuedSocket(socket.AF_INET, host, port, peer, peer_port, 0, False, 0, 0, before)
        asker = Asker(os.dup(reader_fd), TraceState())
        stack.callback(asker.close)
        told = 0
        # connect() may return before the last packet of the handshake is dealt with
        while not told and time.monotonic_ns() < before + _CHECK_NS:
            try:
                (told,) = asker.ask([queued])
            except OSError as error:
                raise TracingError(f"the kernel refuses to run trace_read.c: {error.strerror}") from None
        if not before - 1000 <= told <= time.monotonic_ns():
            raise TracingError("this kernel keeps the time of a handshake elsewhere than those known here")


class Running:
    """The traces that run on this host, found anew as they come and go."""

    def __init__(self) -> None:
        self._askers: dict[int, Asker] = {}  # by the id of the trace's map
        self._others: set[int] = set()  # ids of maps that are of no trace; no id is used twice

    def askers(self) -> list[Asker]:
        """Those that can be asked now; none without root."""
        try:
            ids = list(bpf.map_ids())
        except OSError:
            return []
        for gone in self._askers.keys() - ids:
            self._askers.pop(gone).close()
        for map_id in ids:
            if map_id not in self._askers and map_id not in self._others:
                state = _state_of(map_id)
                if state is None:
                    self._others.add(map_id)
                elif state.reader_id:  # 0: it is being made
                    with suppress(OSError):
                        self._askers[map_id] = Asker(bpf.prog_fd_by_id(state.reader_id), state)
        return list(self._askers.values())

    def close(self) -> None:
        for asker in self._askers.values():
            asker.close()
        self._askers.clear()


def _state_of(map_id: int) -> TraceState | None:
    """What a trace's map says; None when the map is another one, or gone."""
    with suppress(OSError), ExitStack() as stack:
        fd = bpf.map_fd_by_id(map_id)
        stack.callback(os.close, fd)
        info = bpf.map_info(fd)
        if info.name == maps.TRACE_STATE_NAME and info.value_size == ctypes.sizeof(TraceState):
            return TraceState.from_buffer_copy(bpf.map_lookup(fd, _FIRST, info.value_size))
    return None
