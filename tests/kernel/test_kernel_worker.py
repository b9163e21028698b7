"""What a worker without privileges can do with the kernel half, and what it cannot."""

from __future__ import annotations

import errno
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.kernel_objects import held_by
from harness.kernel_sockets import Members, accept, connect, listen, wait_arrived

from tidegate.config.model import Steer, WhenFull
from tidegate.kernel import bpf, queue_age
from tidegate.kernel.bpf import AttachType, MapType, ProgType
from tidegate.kernel.half import KernelHalf
from tidegate.kernel.loader import Objects

pytestmark = pytest.mark.bpf

_NOBODY = 65534
# r0 = 1; exit
_RETURN_1 = bytes.fromhex("b7000000010000009500000000000000")


def _in_worker(half: KernelHalf, work: Callable[[], Any]) -> Any:
    """What `work` returns in a forked worker that has dropped everything; what it raises, here."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            half.worker_close()
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
            answer: tuple[bool, Any] = (True, work())
        except BaseException as error:
            answer = (False, repr(error))
        with os.fdopen(write_end, "wb") as pipe:
            pickle.dump(answer, pipe)
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        succeeded, result = pickle.load(pipe)
    os.waitpid(pid, 0)
    assert succeeded, result
    return result


def _capabilities() -> list[int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return [int(line.split()[1], 16) for line in lines if line.startswith(("CapPrm", "CapEff"))]


def test_a_worker_reads_ages_and_stores_to_slots(half: KernelHalf) -> None:
    with listen() as listener:
        slot = half.allocate_slot()
        half.mark_listener(listener, slot, 128)
        before = time.monotonic_ns()
        client = connect(listener)
        wait_arrived(half, [slot], 1)
        after = time.monotonic_ns()

        def work() -> tuple[list[int], tuple[int, ...]]:
            with accept(listener) as server:
                age = queue_age.read_bpf(server)
            half.slots.heartbeat(slot, 12345)
            half.slots.set_active(slot, 6)
            assert half.age_histogram(slot).count == 1
            assert half.slots.waiting(slot) == 0
            return _capabilities(), tuple(age)

        capabilities, age = _in_worker(half, work)
        client.close()
        assert capabilities == [0, 0]
        assert before <= age[0] <= after
        counts = half.slots.read(slot)
        assert (counts.heartbeat_ns, counts.active, counts.taken) == (12345, 6, 1)
    half.reset_slot(slot)


def test_a_worker_s_heartbeat_steers(half: KernelHalf) -> None:
    members = Members(half, 2)
    half.steer_listener(
        members.slots[0],
        members.pairs,
        policy=Steer.P2C,
        when_full=WhenFull.QUEUE,
        hang_after_ns=10_000_000_000,
    )

    def work() -> None:
        half.slots.heartbeat(members.slots[0], time.monotonic_ns() - 20_000_000_000)
        half.slots.heartbeat(members.slots[1], time.monotonic_ns())

    _in_worker(half, work)
    with connect(members.listeners[0]), connect(members.listeners[0]):
        wait_arrived(half, members.slots, 2)
        assert members.waiting() == [0, 2]
    half.unsteer_listener(members.slots[0])
    members.close()


def test_a_worker_holds_nothing_by_which_to_detach_or_load(half: KernelHalf) -> None:
    members = Members(half, 1)
    half.steer_listener(
        members.slots[0], members.pairs, policy=Steer.P2C, when_full=WhenFull.QUEUE, hang_after_ns=0
    )
    link_fd = half.attached["sockops"].link_fd
    directory = str(half.cgroup.path)
    stamps = half.map_fds

    def refused(call: Callable[[], object]) -> int:
        try:
            call()
        except OSError as error:
            return error.errno or 0
        return 0

    def work() -> dict[str, Any]:
        held = held_by([os.getpid()]).ids
        return {
            "links": held["link"],
            "programs": held["prog"],
            "map fds": dict(stamps),
            "cgroup fd": [fd for fd in os.listdir("/proc/self/fd") if _points_to(fd, directory)],
            "detach": refused(lambda: bpf.link_detach(link_fd)),
            "load": refused(
                lambda: bpf.prog_load(ProgType.CGROUP_SOCKOPT, _RETURN_1, "no", AttachType.CGROUP_GETSOCKOPT)
            ),
            "map": refused(lambda: bpf.map_create(MapType.ARRAY, 4, 8, 1, "no")),
            "cgroup": refused(lambda: os.listdir(directory)),
            "by id": refused(lambda: bpf.map_fd_by_id(1)),
        }

    found = _in_worker(half, work)
    assert (found["links"], found["programs"]) == (set(), set())
    assert (found["map fds"], found["cgroup fd"]) == ({}, [])
    assert found["detach"] == errno.EBADF
    assert {found[key] for key in ("load", "map", "by id")} == {errno.EPERM}
    assert found["cgroup"] == errno.EACCES
    # and we still hold all of it
    assert len(held_by([os.getpid()]).ids["link"]) == 2
    half.unsteer_listener(members.slots[0])
    members.close()


def _points_to(fd: str, path: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == path
    except OSError:
        return False


def test_the_loading_process_keeps_no_compiler(half: KernelHalf) -> None:
    assert isinstance(half.objects(), Objects)
    maps = Path("/proc/self/maps").read_text()
    assert "libbcc" not in maps and "libLLVM" not in maps
