"""One kernel half passed from process to process: nothing is missed, and a misfit is refused."""

from __future__ import annotations

import json
import os
import socket
import time

import pytest
from harness.kernel_sockets import Members, accept, connect, listen, wait_arrived

from tidegate.config.model import Steer, WhenFull
from tidegate.kernel import bpf, cgroup, queue_age
from tidegate.kernel.bpf import AttachType
from tidegate.kernel.half import KernelHalf
from tidegate.kernel.loader import KernelUnavailable

pytestmark = pytest.mark.bpf


def _start(suffix: str) -> KernelHalf:
    return KernelHalf.start(f"test-{os.getpid()}-{suffix}")


def _hand_over(old: KernelHalf, **changes: object) -> KernelHalf:
    """As between two processes: the manifest as JSON, the fds by a Unix socket."""
    manifest, fds = old.export()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(ours, [json.dumps(manifest | changes).encode()], fds)
        text, received, _, _ = socket.recv_fds(theirs, 65536, len(fds))
    return KernelHalf.adopt(json.loads(text), received)


def test_a_successor_sees_what_its_predecessor_stamped_and_counted() -> None:
    old = _start("over")
    members = Members(old, 2)
    old.steer_listener(5, members.pairs, policy=Steer.LEAST_QUEUE, when_full=WhenFull.QUEUE, hang_after_ns=0)
    before = time.monotonic_ns()
    clients = [connect(members.listeners[0]) for _ in range(4)]
    wait_arrived(old, members.slots, 4)
    after = time.monotonic_ns()
    ids, path = old.map_ids(), old.cgroup.path

    new = _hand_over(old)
    old.release()
    assert (new.map_ids(), new.cgroup.path) == (ids, path)
    assert [new.slots.waiting(slot) for slot in members.slots] == [2, 2]
    with accept(members.listeners[0]) as server:
        assert before <= queue_age.read_bpf(server).established_ns <= after
    clients.append(connect(members.listeners[0]))
    wait_arrived(new, members.slots, 5)
    assert [new.slots.waiting(slot) for slot in members.slots] == [2, 2]

    # its own programs take over the links, and it may mark and steer listeners of its own
    replaced = bpf.cgroup_prog_ids(new.cgroup.fd, AttachType.CGROUP_SOCK_OPS)
    new.refresh_programs()
    attached = bpf.cgroup_prog_ids(new.cgroup.fd, AttachType.CGROUP_SOCK_OPS)
    assert len(attached) == 1 and attached != replaced
    more = Members(new, 2)
    assert not set(more.slots) & set(members.slots)
    new.steer_listener(6, more.pairs, policy=Steer.P2C, when_full=WhenFull.QUEUE, hang_after_ns=0)
    clients += [connect(more.listeners[0]), connect(members.listeners[0])]
    wait_arrived(new, members.slots + more.slots, 7)
    assert sum(more.waiting()) == 1
    assert sum(new.slots.waiting(slot) for slot in members.slots) == 5
    assert new.groups[5].slots == members.slots

    for client in clients:
        client.close()
    for group in (members, more):
        for listener in group.listeners:
            listener.close()
    assert new.close()
    assert not path.exists()


def test_the_name_stays_taken_across_a_hand_over() -> None:
    old = _start("taken")
    new = _hand_over(old)
    old.release()
    with pytest.raises(KernelUnavailable, match="is running"):
        KernelHalf.start(new.cgroup.path.name)
    assert cgroup.members(new.cgroup.path) == [os.getpid()]
    assert new.close()


def test_another_version_of_the_records_is_refused_and_the_old_one_serves_on() -> None:
    old = _start("version")
    with listen() as listener:
        slot = old.allocate_slot()
        old.mark_listener(listener, slot, 16)
        held = len(os.listdir("/proc/self/fd"))
        with pytest.raises(KernelUnavailable, match=r"version 999.*cannot take over"):
            _hand_over(old, records_version=999)
        assert len(os.listdir("/proc/self/fd")) == held, "the refused fds are closed"
        with connect(listener), accept(listener) as server:
            assert queue_age.read_bpf(server).source == queue_age.BPF
    assert old.close()
