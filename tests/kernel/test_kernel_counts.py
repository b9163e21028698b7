"""arrived - taken against the kernel's own queue length, whatever clients and workers do."""

from __future__ import annotations

import random
import select
import socket
from collections.abc import Iterator

import pytest
from harness.kernel_sockets import accept, connect, listen, reset, wait_arrived
from harness.waiting import wait_until

from tidegate.kernel import queue_age, tcp_info
from tidegate.kernel.half import KernelHalf

pytestmark = pytest.mark.bpf

Marked = tuple[socket.socket, int]
STEPS = 3000


@pytest.fixture
def marked(half: KernelHalf, request: pytest.FixtureRequest) -> Iterator[Marked]:
    backlog: int = getattr(request, "param", 256)
    listener = listen(backlog=backlog)
    slot = half.allocate_slot()
    half.mark_listener(listener, slot, backlog)
    yield listener, slot
    half.unmark_listener(listener)
    listener.close()
    half.reset_slot(slot)


class Flood:
    """Random clients and a random worker on one listener."""

    def __init__(self, listener: socket.socket, seed: int) -> None:
        self.listener = listener
        self.random = random.Random(seed)
        self.clients: list[socket.socket] = []
        self.pending: list[socket.socket] = []
        self.servers: list[socket.socket] = []

    def step(self) -> None:
        action = self.random.choice(
            (self.connect, self.connect, self.connect, self.leave, self.reset, self.half_close, self.take)
        )
        action()

    def connect(self) -> None:
        client = socket.socket()
        client.setblocking(False)
        client.connect_ex(self.listener.getsockname())
        self.pending.append(client)
        if len(self.pending) > 20:  # the backlog is full: these clients' SYNs are being tried again
            self.pending.pop(0).close()
        self.settle()

    def settle(self) -> None:
        _, done, _ = select.select([], self.pending, [], 0)
        for client in done:
            self.pending.remove(client)
            self.clients.append(client)

    def _any_client(self) -> socket.socket | None:
        if not self.clients:
            return None
        return self.clients.pop(self.random.randrange(len(self.clients)))

    def leave(self) -> None:
        if client := self._any_client():
            client.close()

    def reset(self) -> None:
        if client := self._any_client():
            reset(client)

    def half_close(self) -> None:
        if client := self._any_client():
            try:
                client.send(b"x" * self.random.randrange(1, 3000))
                client.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # we reset it from the other side
            self.clients.append(client)

    def take(self) -> None:
        for _ in range(self.random.randrange(6)):
            try:
                server = accept(self.listener, timeout_s=0)
            except BlockingIOError:
                return
            queue_age.read_bpf(server)
            if self.random.random() < 0.5:
                reset(server)
            else:
                self.servers.append(server)
        while len(self.servers) > 50:
            self.servers.pop(0).close()

    def close(self) -> None:
        for sock in (*self.clients, *self.pending, *self.servers):
            sock.close()


@pytest.mark.parametrize("marked", [512, 8], indirect=True, ids=["roomy backlog", "full backlog"])
def test_waiting_is_the_kernel_s_queue_length(half: KernelHalf, marked: Marked) -> None:
    listener, slot = marked
    flood = Flood(listener, seed=slot)
    most = 0
    try:
        for step in range(STEPS):
            flood.step()
            most = max(most, half.slots.waiting(slot))

            def equal() -> bool:
                return half.slots.waiting(slot) == tcp_info.accept_backlog(listener)[0]

            # a softirq may be between the two counts; it does not stay there
            assert equal() or wait_until(equal, 2, f"equal counts after step {step}", every_s=0.0005)
    finally:
        flood.close()
    counts = half.slots.read(slot)
    assert counts.arrived > STEPS / 20 and counts.taken > STEPS / 20 and most >= 8
    assert counts.gone > 0 and counts.half_closed > 0
    assert half.age_histogram(slot).count == counts.taken
    assert counts.lost == 0


def test_resync_after_a_worker_died_between_accept_and_reading(half: KernelHalf, marked: Marked) -> None:
    listener, slot = marked
    clients = [connect(listener) for _ in range(5)]
    wait_arrived(half, [slot], 5)
    for _ in range(2):
        accept(listener).close()
    assert half.slots.waiting(slot) == 5
    assert half.resync(slot, listener) == 2
    assert half.slots.waiting(slot) == tcp_info.accept_backlog(listener)[0] == 3
    assert half.resync(slot, listener) == 0
    late = accept(listener)
    assert half.resync(slot, listener) == 1
    queue_age.read_bpf(late)  # it was only slow: the correction is itself corrected
    assert half.resync(slot, listener) == -1
    assert half.slots.waiting(slot) == tcp_info.accept_backlog(listener)[0] == 2
    for sock in (*clients, late):
        sock.close()


def test_resync_refuses_a_socket_that_is_no_listener(half: KernelHalf, marked: Marked) -> None:
    listener, slot = marked
    with connect(listener) as client, pytest.raises(ValueError):
        half.resync(slot, client)


def test_slots_are_given_in_turn_and_zeroed(half: KernelHalf) -> None:
    first = half.allocate_slot()
    second = half.allocate_slot()
    half.slots.set_active(first, 7)
    half.reset_slot(first)
    third = half.allocate_slot()
    assert len({first, second, third}) == 3, "a slot just freed is not the next one used"
    assert half.slots.active(first) == 0
    half.reset_slot(second)
    half.reset_slot(third)
