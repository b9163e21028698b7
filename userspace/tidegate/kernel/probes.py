"""What this kernel can do for tidegate, found by doing it on sockets of our own.

    half = KernelHalf.start(...)
    probes.run(half)                 # a second

What needs more than the kernel package to be tried is added by supervisor/abilities.py.
Version numbers decide nothing but the floors below: a feature works if its probe saw it work. `since` says
from which kernel on a failed probe is a fault and not an absence; the support table is held against it.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

from tidegate.errors import OperatorError
from tidegate.kernel import bpf, maps, queue_age, tracing
from tidegate.kernel.floors import BPF_FLOOR, SPLICE_FLOOR, version
from tidegate.kernel.half import KernelHalf
from tidegate.kernel.loader import STEER, MapNumber
from tidegate.kernel.records import SteerGroup, SteerPolicy
from tidegate.kernel.sock_diag import SockDiag

_SO_ATTACH_REUSEPORT_EBPF = 52
_BACKLOG = 16
_CONNECTIONS = 16  # the kernel's hash sends as many where it should by chance once in 65,536 times
_TIMEOUT_S = 5.0


class Feature(StrEnum):
    LINKS = "bpf_links"
    QUEUE_AGE = "queue_age"
    SOCK_DIAG = "stamps_by_sock_diag"
    STEER = "steer"
    MIGRATE = "migrate"
    WAKE = "wake_after_migration"
    TRACE = "accept_trace"
    SPLICE = "splice"


@dataclass(frozen=True, slots=True)
class About:
    """What a feature is, for people. `since`: kernels from this one on must have it; None: none must."""

    what: str
    without: str
    since: tuple[int, int] | None


ABOUT: dict[Feature, About] = {
    Feature.LINKS: About(
        "programs are attached by BPF links, which the kernel undoes when tidegate dies, kill -9 included",
        "the BPF half does not start: ages are estimated from TCP_INFO, the kernel's hash chooses workers",
        BPF_FLOOR,
    ),
    Feature.QUEUE_AGE: About(
        "the exact time a connection waited, as a socket option of its own",
        "ages are estimated from TCP_INFO: a lower bound in milliseconds",
        BPF_FLOOR,
    ),
    Feature.SOCK_DIAG: About(
        "the age of every waiting connection, seen from outside while workers are stopped",
        "`tidegate ages` shows waiting connections by TCP_INFO",
        BPF_FLOOR,
    ),
    Feature.STEER: About(
        "a BPF program chooses the worker of each new connection",
        "the kernel's hash chooses the worker, hung ones included",
        BPF_FLOOR,
    ),
    Feature.MIGRATE: About(
        "connections waiting on a listener that closes move to a sibling",
        "they are reset; workers' listeners are inherited, so only scaling down closes one",
        BPF_FLOOR,
    ),
    Feature.WAKE: About(
        "a sibling that connections moved to is woken for them",
        "every worker tries accept() once whenever a listener goes",
        None,
    ),
    Feature.TRACE: About(
        "the exact age at which any service accepts, seen through its cgroup without kprobes or fentry",
        "`tidegate trace` counts arrivals and samples who waits, but times no accept()",
        BPF_FLOOR,
    ),
    Feature.SPLICE: About(
        "the bytes of long streams move in the kernel, every one once and in order",
        "they are copied through userspace",
        SPLICE_FLOOR,
    ),
}


@dataclass(frozen=True, slots=True)
class Result:
    """What one probe saw. `reason` is empty when it works."""

    feature: str
    works: bool
    reason: str = ""


class _LackingError(Exception):
    """A probe's finding: the feature is not there, and how that showed."""


def required(feature: str, release: str) -> bool:
    """Whether a kernel of that release must have a feature: its lack is then a fault."""
    since = ABOUT[Feature(feature)].since
    return since is not None and version(release) >= since


# -- the probes ------------------------------------------------------------------------------------


@contextmanager
def _listener(
    half: KernelHalf, address: tuple[str, int] = ("127.0.0.1", 0)
) -> Iterator[tuple[socket.socket, int]]:
    """A stamped listener on a slot of its own, both given back at the end."""
    slot = half.allocate_slot()
    sock = socket.socket()
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
        sock.settimeout(_TIMEOUT_S)
        half.mark_listener(sock, slot, _BACKLOG)
        yield sock, slot
    finally:
        if sock.fileno() >= 0:
            half.unmark_listener(sock)
            sock.close()
        half.reset_slot(slot)


@contextmanager
def _clients(listener: socket.socket, count: int) -> Iterator[list[socket.socket]]:
    clients: list[socket.socket] = []
    try:
        for _ in range(count):
            clients.append(socket.create_connection(listener.getsockname(), _TIMEOUT_S))
        yield clients
    finally:
        for client in clients:
            client.close()


def _queue_age(half: KernelHalf) -> None:
    with _listener(half) as (listener, slot), _clients(listener, 1):
        accepted, _ = listener.accept()
        with accepted:
            age = queue_age.read_bpf(accepted)
    if age.source != queue_age.BPF:
        raise _LackingError("the socket option answers that it is not known")
    if not age.established_ns or age.slot != slot:
        raise _LackingError(f"the record is not this connection's: {age}")


def _sock_diag(half: KernelHalf) -> None:
    fd = half.map_fds[MapNumber.STAMPS]
    map_id = bpf.map_info(fd).id
    with _listener(half) as (listener, _), _clients(listener, 1), SockDiag() as diag:
        port = listener.getsockname()[1]
        waiting = diag.queues((socket.AF_INET,), storage_maps=(fd,)).waiting
    seen = [entry for entry in waiting if entry.port == port]
    if len(seen) != 1:
        raise _LackingError(f"sock_diag lists {len(seen)} of 1 waiting connection")
    stamp = seen[0].storages.get(map_id, b"")
    if len(stamp) < 8 or not struct.unpack_from("=Q", stamp)[0]:
        raise _LackingError("sock_diag lists the waiting connection without its stamp")


@contextmanager
def _steered(half: KernelHalf) -> Iterator[tuple[list[tuple[socket.socket, int]], int]]:
    """Two listeners of one group with the steering program over them, and the fd of the group's map."""
    with contextlib.ExitStack() as stack:
        fds = dict(half.map_fds)
        for number in (MapNumber.GROUP, MapNumber.SOCKS):
            fds[number] = maps.create(number)
            stack.callback(os.close, fds[number])
        program = half.objects().load(STEER, fds)
        stack.callback(os.close, program)
        first = stack.enter_context(_listener(half))
        second = stack.enter_context(_listener(half, first[0].getsockname()))
        for position, (listener, _) in enumerate((first, second)):
            key, value = struct.pack("=I", position), struct.pack("=Q", listener.fileno())
            bpf.map_update(fds[MapNumber.SOCKS], key, value)
        first[0].setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_EBPF, program)
        _steer_to([first[1], second[1]], fds[MapNumber.GROUP])
        yield [first, second], fds[MapNumber.GROUP]


def _steer_to(slots: list[int], group_fd: int) -> None:
    group = SteerGroup(policy=SteerPolicy.LEAST_QUEUE, hang_after_ns=0, count=len(slots))
    group.slots[: len(slots)] = slots
    bpf.map_update(group_fd, struct.pack("=I", 0), bytes(group))


def _steer(half: KernelHalf) -> None:
    with _steered(half) as (listeners, _):
        (busy, busy_slot), (idle, idle_slot) = listeners
        # the kernel's hash would give the busy one its share
        half.slots.set_active(busy_slot, 1_000_000)
        with _clients(busy, _CONNECTIONS):
            there, elsewhere = half.slots.arrived(idle_slot), half.slots.arrived(busy_slot)
    if (there, elsewhere) != (_CONNECTIONS, 0):
        raise _LackingError(f"{there} of {_CONNECTIONS} connections went where the program said")
    del idle


def _migrate(half: KernelHalf, *, woken: bool = False) -> None:
    with _steered(half) as (listeners, _), contextlib.ExitStack() as stack:
        (closing, closing_slot), (heir, heir_slot) = listeners
        half.slots.set_active(heir_slot, 1_000_000)
        stack.enter_context(_clients(closing, _CONNECTIONS))
        if half.slots.arrived(closing_slot) != _CONNECTIONS:
            raise _LackingError("the connections to be moved did not arrive")
        heir.setblocking(False)
        epoll = stack.enter_context(select.epoll())
        epoll.register(heir, select.EPOLLIN)
        half.unmark_listener(closing)
        closing.close()
        if woken:
            if not epoll.poll(0.2):
                raise _LackingError("epoll stays silent about connections that moved")
            return
        moved = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                heir.accept()[0].close()
                moved += 1
    if moved != _CONNECTIONS:
        raise _LackingError(f"{moved} of {_CONNECTIONS} waiting connections moved")


def _wake(half: KernelHalf) -> None:
    _migrate(half, woken=True)


def _trace(half: KernelHalf) -> None:
    with tracing.Tracer(half.cgroup.path) as tracer, socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(_TIMEOUT_S)
        with _clients(listener, 1):
            listener.accept()[0].close()
        counts = tracer.counts()
    if (counts.arrived, counts.taken) != (1, 1):
        raise _LackingError(f"of 1 connection {counts.arrived} arrived and {counts.taken} were timed")


_PROBES: dict[Feature, Callable[[KernelHalf], None]] = {
    Feature.QUEUE_AGE: _queue_age,
    Feature.SOCK_DIAG: _sock_diag,
    Feature.STEER: _steer,
    Feature.MIGRATE: _migrate,
    Feature.WAKE: _wake,
    Feature.TRACE: _trace,
}


def run(half: KernelHalf) -> list[Result]:
    """Every feature but splicing, on sockets of ours on 127.0.0.1; the caller has joined the half's cgroup.

    Takes two slots at a time and gives them back. Raises nothing: what goes wrong is a result.
    """
    results = [Result(Feature.LINKS, True)]  # nothing else attaches the half's programs
    for feature, probe in _PROBES.items():
        try:
            probe(half)
        except (_LackingError, OSError, OperatorError) as error:
            results.append(Result(feature, False, _one_line(error)))
        else:
            results.append(Result(feature, True))
    return results


def _one_line(error: Exception) -> str:
    text = error.message if isinstance(error, OperatorError) else str(error)
    return (text.splitlines() or [type(error).__name__])[0]
