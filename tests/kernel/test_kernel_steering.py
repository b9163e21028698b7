"""steer.c follows what workers say of themselves; migration takes connections and counts along."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from harness.kernel_sockets import Members, accept, connect, listen, wait_arrived
from harness.waiting import wait_until

from tidegate.config.model import Steer, WhenFull
from tidegate.kernel import bpf, queue_age, tcp_info
from tidegate.kernel.half import KernelHalf
from tidegate.kernel.records import SlotState, Verdict
from tidegate.kernel.steering import SteeredGroup

pytestmark = pytest.mark.bpf

NEVER = 0
HANG_AFTER = 10_000_000_000  # no test takes that long: a heartbeat is stale only when it is made so


class Steered(Members):
    """A steered group and its clients."""

    def __init__(
        self, half: KernelHalf, count: int, policy: Steer, when_full: WhenFull = WhenFull.QUEUE
    ) -> None:
        super().__init__(half, count)
        self.index = self.slots[0]
        self.group: SteeredGroup = half.steer_listener(
            self.index, self.pairs, policy=policy, when_full=when_full, hang_after_ns=HANG_AFTER
        )
        self.address = self.listeners[0].getsockname()
        self.clients: list[socket.socket] = []
        self.beat()

    def connect(self, count: int, host: str = "") -> None:
        before = sum(self.half.slots.arrived(slot) for slot in self.slots)
        for _ in range(count):
            source = (host, 0) if host else None
            to = self.address
            self.clients.append(socket.create_connection(to, timeout=5, source_address=source))
        wait_arrived(self.half, self.slots, before + count)

    def hang(self, position: int) -> None:
        self.half.slots.heartbeat(self.slots[position], time.monotonic_ns() - 2 * HANG_AFTER)

    def state(self, position: int, state: SlotState) -> None:
        self.half.slots.set_state(self.slots[position], state)

    def active(self, *loads: int) -> None:
        for slot, load in zip(self.slots, loads, strict=True):
            self.half.slots.set_active(slot, load)

    def verdict(self, verdict: Verdict) -> int:
        return self.group.verdicts()[verdict]

    def close_clients(self) -> None:
        for client in self.clients:
            client.close()
        self.clients.clear()

    def close(self) -> None:
        self.close_clients()
        self.half.unsteer_listener(self.index)
        super().close()


Make = Callable[..., Steered]


@pytest.fixture
def steered(half: KernelHalf) -> Iterator[Make]:
    with contextlib.ExitStack() as stack:

        def make(count: int, policy: Steer, when_full: WhenFull = WhenFull.QUEUE) -> Steered:
            made = Steered(half, count, policy, when_full)
            stack.callback(made.close)
            return made

        yield make


@pytest.mark.parametrize("policy", [Steer.P2C, Steer.LEAST_QUEUE])
def test_every_connection_goes_to_the_lesser_load(steered: Make, policy: Steer) -> None:
    group = steered(2, policy)
    group.active(1000, 0)
    group.connect(50)
    assert group.waiting() == [0, 50]
    group.active(0, 1000)
    group.connect(50)
    assert group.waiting() == [50, 50]
    assert group.verdict(Verdict.FIT) == 100


@pytest.mark.parametrize("policy", [Steer.P2C, Steer.LEAST_QUEUE])
@pytest.mark.parametrize("workers", [3, 8])
def test_waiting_connections_are_load(steered: Make, policy: Steer, workers: int) -> None:
    group = steered(workers, policy)
    group.connect(30 * workers)
    waiting = group.waiting()
    assert sum(waiting) == 30 * workers
    assert max(waiting) - min(waiting) <= (1 if policy is Steer.LEAST_QUEUE else 8), waiting


def test_equal_loads_are_shared_by_chance(steered: Make) -> None:
    group = steered(4, Steer.LEAST_QUEUE)
    for _ in range(200):  # taken at once: loads stay equal, and only chance can tell the four apart
        group.connect(1)
        (position,) = [p for p, waiting in enumerate(group.waiting()) if waiting]
        with accept(group.listeners[position]) as server:
            queue_age.read_bpf(server)
    assert min(group.half.slots.taken(slot) for slot in group.slots) >= 20


@pytest.mark.parametrize("policy", list(Steer))
def test_hung_draining_and_dead_workers_get_nothing(steered: Make, policy: Steer) -> None:
    group = steered(4, policy)
    group.hang(0)
    group.state(1, SlotState.DRAINING)
    group.state(2, SlotState.DEAD)
    group.active(0, 0, 0, 500)
    group.connect(40)
    assert group.waiting() == [0, 0, 0, 40]
    group.beat(0)
    group.state(3, SlotState.DRAINING)
    group.connect(40)
    assert group.waiting() == [40, 0, 0, 40]
    assert group.verdict(Verdict.FIT) == 80


@pytest.mark.parametrize("policy", list(Steer))
def test_full_queues_and_full_workers_are_passed_over(steered: Make, policy: Steer) -> None:
    group = steered(3, policy)
    slots = group.half.slots
    slots.set_backlog(group.slots[0], 5)
    slots.set_capacity(group.slots[1], 8)
    slots.set_active(group.slots[1], 8)
    group.connect(20)
    first, second, third = group.waiting()
    assert first <= 5 and second == 0 and third == 20 - first
    assert group.verdict(Verdict.FIT) == 20


@pytest.mark.parametrize("policy", list(Steer))
def test_all_hung_means_none_is(steered: Make, policy: Steer) -> None:
    group = steered(3, policy)
    for position in range(3):
        group.hang(position)
    group.active(0, 10, 10)
    group.connect(5)
    assert group.waiting() == [5, 0, 0]
    assert group.verdict(Verdict.ALL_HUNG) == 5


def test_heartbeats_do_not_count_when_hanging_is_off(steered: Make) -> None:
    group = steered(3, Steer.LEAST_QUEUE)
    group.group.configure(Steer.LEAST_QUEUE, WhenFull.QUEUE, NEVER)
    for position in range(3):
        group.hang(position)
    group.connect(6)
    assert group.waiting() == [2, 2, 2]
    assert group.verdict(Verdict.FIT) == 6


@pytest.mark.parametrize("policy", list(Steer))
def test_all_full_queue_or_refuse(steered: Make, policy: Steer) -> None:
    group = steered(2, policy)
    for slot in group.slots:
        group.half.slots.set_capacity(slot, 1)
    group.active(1, 2)
    group.connect(4)
    assert group.waiting()[0] >= 2 and sum(group.waiting()) == 4
    assert group.verdict(Verdict.ALL_FULL) == 4
    group.group.configure(policy, WhenFull.REFUSE, HANG_AFTER)
    started = time.monotonic()
    for _ in range(3):
        with pytest.raises(ConnectionRefusedError):
            connect(group.listeners[0])
    assert time.monotonic() - started < 0.5, "refused at once, not by a timeout"
    assert group.verdict(Verdict.REFUSED) == 3
    group.active(0, 2)
    group.connect(1)
    assert sum(group.waiting()) == 5


def test_a_hung_worker_does_not_make_the_others_less_full(steered: Make) -> None:
    group = steered(2, Steer.P2C, WhenFull.REFUSE)
    group.hang(0)
    group.half.slots.set_capacity(group.slots[1], 1)
    group.active(0, 1)
    with pytest.raises(ConnectionRefusedError):
        connect(group.listeners[0])
    assert group.waiting() == [0, 0]


def test_a_full_backlog_is_worse_than_a_hung_worker(steered: Make) -> None:
    """A dropped SYN costs the client a second; a hung worker's queue is taken over by others."""
    group = steered(2, Steer.P2C)
    group.hang(0)
    group.half.slots.set_backlog(group.slots[1], 0)
    group.connect(3)
    assert group.waiting() == [3, 0]
    assert (group.verdict(Verdict.ALL_FULL), group.verdict(Verdict.ALL_HUNG)) == (3, 0)
    group.group.configure(Steer.P2C, WhenFull.REFUSE, HANG_AFTER)
    with pytest.raises(ConnectionRefusedError):
        connect(group.listeners[0])


def test_hash_keeps_a_client_and_moves_only_the_leaver_s(steered: Make) -> None:
    group = steered(5, Steer.HASH)
    hosts = [f"127.0.1.{n}" for n in range(1, 61)]

    def owners() -> dict[str, int]:
        found = {}
        for host in hosts:
            before = group.waiting()
            group.connect(1, host)
            (found[host],) = [p for p in range(5) if group.waiting()[p] != before[p]]
        return found

    first = owners()
    assert owners() == first, "the same client, the same worker"
    assert len(Counter(first.values())) == 5, "every worker has clients"
    group.state(2, SlotState.DRAINING)
    without = owners()
    assert {host for host in hosts if first[host] != without[host]} == {
        host for host in hosts if first[host] == 2
    }
    group.state(2, SlotState.ACTIVE)
    assert owners() == first


def test_a_slot_taken_out_or_added_while_serving(steered: Make) -> None:
    group = steered(3, Steer.LEAST_QUEUE)
    group.connect(6)
    group.group.remove(group.slots[1])
    group.group.remove(group.slots[1])
    assert group.group.slots == [group.slots[0], group.slots[2]]
    group.connect(6)
    assert group.waiting() == [5, 2, 5]
    group.group.add(group.listeners[1], group.slots[1])
    group.connect(3)
    assert group.waiting() == [5, 5, 5]


def test_nobody_to_select_falls_back_to_the_kernel_s_hash(steered: Make) -> None:
    group = steered(2, Steer.P2C)
    for slot in group.slots:
        group.group.remove(slot)
    group.connect(4)
    assert sum(group.waiting()) == 4
    assert group.verdict(Verdict.FALLBACK) == 4


@pytest.mark.parametrize("policy", list(Steer))
def test_migration_takes_seven_of_seven_and_their_counts(steered: Make, policy: Steer) -> None:
    group = steered(3, policy)
    slots = group.half.slots
    group.state(1, SlotState.DRAINING)
    group.state(2, SlotState.DRAINING)
    before = time.monotonic_ns()
    group.connect(7)
    after = time.monotonic_ns()
    assert group.waiting() == [7, 0, 0]
    group.state(0, SlotState.DRAINING)
    group.state(1, SlotState.ACTIVE)
    group.listeners[0].close()
    assert group.waiting() == [0, 7, 0]
    assert tcp_info.accept_backlog(group.listeners[1])[0] == 7
    assert (slots.read(group.slots[0]).migrated, group.verdict(Verdict.MIGRATED)) == (7, 7)
    for _ in range(7):
        with accept(group.listeners[1]) as server:
            age = queue_age.read_bpf(server)
        assert before <= age.established_ns <= after, "the stamp is the first one"
        assert age.slot == group.slots[1]
    assert group.waiting() == [0, 0, 0]
    assert slots.taken(group.slots[1]) == 7 and slots.taken(group.slots[0]) == 0
    group.connect(2)
    assert group.waiting() == [0, 2, 0]


def test_migrating_twice_counts_once(steered: Make) -> None:
    group = steered(3, Steer.P2C)
    for position in (1, 2):
        group.state(position, SlotState.DRAINING)
    group.connect(5)
    for leaving, coming in ((0, 1), (1, 2)):
        group.state(leaving, SlotState.DRAINING)
        group.state(coming, SlotState.ACTIVE)
        group.listeners[leaving].shutdown(socket.SHUT_RD)
    assert group.waiting() == [0, 0, 5]
    servers = [accept(group.listeners[2]) for _ in range(5)]
    assert {queue_age.read_bpf(server).slot for server in servers} == {group.slots[2]}
    assert group.waiting() == [0, 0, 0]
    for server in servers:
        server.close()


def test_groups_do_not_disturb_each_other(steered: Make) -> None:
    one, other = steered(2, Steer.LEAST_QUEUE), steered(2, Steer.LEAST_QUEUE)
    one.active(100, 0)
    other.active(0, 100)
    one.connect(10)
    other.connect(10)
    assert (one.waiting(), other.waiting()) == ([0, 10], [10, 0])


def test_64_workers_and_what_a_selection_costs(steered: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """The program verifies with the most workers there may be; what a selection costs is printed."""
    stats = bpf.enable_stats()
    figures = {}
    try:
        for policy in Steer:
            group = steered(64, policy)
            group.connect(500)
            assert sum(group.waiting()) == 500
            run_ns, runs = bpf.prog_run_stats(group.group.prog_fd)
            assert runs >= 500
            group.close_clients()
            figures[policy] = run_ns / runs
    finally:
        os.close(stats)
    with capsys.disabled():
        print("\nns per selection, 64 workers:", {str(p): round(ns) for p, ns in figures.items()})


def test_a_listener_that_is_closed_may_be_replaced(steered: Make) -> None:
    group = steered(2, Steer.LEAST_QUEUE)
    group.half.unmark_listener(group.listeners[0])
    group.group.remove(group.slots[0])
    port = group.listeners[0].getsockname()[1]
    group.listeners[0].close()
    fresh = listen(port=port, backlog=1024, reuseport=True)
    group.listeners[0] = fresh
    group.half.mark_listener(fresh, group.slots[0], 1024)
    group.group.add(fresh, group.slots[0])
    group.connect(10)
    assert group.waiting() == [5, 5]
    wait_until(lambda: tcp_info.accept_backlog(fresh)[0] == 5, 2, "five in the new listener's queue")
