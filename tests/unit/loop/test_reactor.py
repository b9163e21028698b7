"""The reactor with real epoll and pipes: who is called, in which order, and what closes when."""

import os
import socket

import pytest

from tidegate.loop.reactor import BATCH, EPOLLIN, Reactor
from tidegate.loop.timers import Timer


@pytest.fixture
def reactor():
    one = Reactor()
    yield one
    one.close()


def readable_pair() -> tuple[socket.socket, socket.socket]:
    a, b = socket.socketpair()
    a.setblocking(False)
    b.send(b"x")
    return a, b


def test_a_removed_fd_gets_no_event_of_the_same_batch(reactor: Reactor) -> None:
    pairs = [readable_pair() for _ in range(2)]
    called = []

    def first_removes_the_other(index: int) -> None:
        called.append(index)
        reactor.remove(pairs[1 - index][0].fileno())

    for index, (sock, _) in enumerate(pairs):
        reactor.add(sock.fileno(), EPOLLIN, lambda mask, index=index: first_removes_the_other(index))
    assert reactor.run_once(0) == 2
    assert len(called) == 1
    for pair in pairs:
        for sock in pair:
            sock.close()


def test_an_fd_number_is_not_reused_within_a_batch(reactor: Reactor) -> None:
    """The session that ends first and the connection that is made next must not share a number."""
    pairs = [readable_pair() for _ in range(2)]
    reused = []

    def end_and_open(index: int) -> None:
        sock = pairs[index][0]
        number = sock.fileno()
        reactor.remove(number)
        reactor.close_after_batch(sock)
        fresh = os.dup(0)
        reused.append(fresh == number)
        os.close(fresh)

    for index, (sock, _) in enumerate(pairs):
        reactor.add(sock.fileno(), EPOLLIN, lambda mask, index=index: end_and_open(index))
    reactor.run_once(0)
    assert reused == [False, False]
    assert all(sock.fileno() == -1 for sock, _ in pairs)
    for _, peer in pairs:
        peer.close()


def test_one_broken_callback_costs_only_its_own_fd(reactor: Reactor) -> None:
    broken, healthy = readable_pair(), readable_pair()
    failed, called = [], []
    reactor.on_failure = failed.append

    def breaks(mask: int) -> None:
        raise RuntimeError("seeded")

    reactor.add(broken[0].fileno(), EPOLLIN, breaks)
    reactor.add(healthy[0].fileno(), EPOLLIN, lambda mask: called.append(mask))
    reactor.run_once(0)
    assert failed == [breaks] and called == [EPOLLIN]
    assert not reactor.watches(broken[0].fileno()) and reactor.watches(healthy[0].fileno())
    for sock in (*broken, *healthy):
        sock.close()


def test_what_a_deferred_call_defers_waits_for_the_next_round(reactor: Reactor) -> None:
    order = []

    def again() -> None:
        order.append("again")
        if len(order) < 3:
            reactor.call_after_batch(again)

    reactor.call_after_batch(again)
    reactor.run_once(10_000_000_000)  # does not sleep: something is deferred
    assert order == ["again"]
    reactor.run_once(10_000_000_000)
    reactor.run_once(10_000_000_000)
    assert order == ["again"] * 3


def test_timers_fire_after_the_events_of_the_batch(reactor: Reactor) -> None:
    """Activity that arrived while the process was stopped moves its deadline before it is looked at."""
    a, b = readable_pair()
    order = []
    timer = Timer(lambda now: order.append("timer"))
    reactor.timers.arm(timer, reactor.now + 1)
    reactor.add(a.fileno(), EPOLLIN, lambda mask: (order.append("event"), a.recv(1)))
    while "timer" not in order:
        reactor.run_once(5_000_000)
    assert order == ["event", "timer"]
    a.close()
    b.close()


def test_an_exception_in_a_timer_or_a_deferred_call_does_not_end_the_loop(reactor: Reactor) -> None:
    def breaks(*_: object) -> None:
        raise RuntimeError("seeded")

    timer = Timer(breaks)
    reactor.timers.arm(timer, reactor.now + 1)
    reactor.call_after_batch(breaks)
    reactor.call_after_batch(reactor.stop)
    reactor.run()
    assert reactor.stopped


class Clock:
    """CLOCK_MONOTONIC of a process that is stopped now and then."""

    def __init__(self) -> None:
        self.ns = 1_000_000_000

    def __call__(self) -> int:
        return self.ns


@pytest.mark.parametrize("count", [3, 2 * BATCH + 5])
def test_after_a_stop_events_come_before_the_timers_they_would_have_moved(count: int) -> None:
    """The stopped process has data to read from everybody: nobody was silent but itself."""
    clock = Clock()
    reactor = Reactor(clock)
    pairs = [readable_pair() for _ in range(count)]
    silent = []
    timers = {}
    for sock, _ in pairs:
        fd = sock.fileno()
        timers[fd] = Timer(lambda now, fd=fd: silent.append(fd))
        reactor.timers.arm(timers[fd], clock.ns + 500_000_000)

        def heard(mask: int, sock: socket.socket = sock) -> None:
            sock.recv(1)
            reactor.timers.cancel(timers[sock.fileno()])

        reactor.add(fd, EPOLLIN, heard)
    clock.ns += 2_000_000_000
    for _ in range(count // BATCH + 2):
        reactor.run_once(0)
    assert not silent
    for a, b in pairs:
        a.close()
        b.close()
    reactor.close()


def test_timers_wait_for_events_no_longer_than_one_round() -> None:
    clock = Clock()
    reactor = Reactor(clock)
    pairs = [readable_pair() for _ in range(3 * BATCH)]
    for sock, _ in pairs:
        reactor.add(sock.fileno(), EPOLLIN, lambda mask: None)  # never read: ready for ever
    fired = []
    reactor.timers.arm(Timer(fired.append), clock.ns + 500_000_000)
    clock.ns += 2_000_000_000
    turns = 0
    while not fired and turns < 20:
        turns += 1
        reactor.run_once(0)
    assert turns <= 3 + 2
    for a, b in pairs:
        a.close()
        b.close()
    reactor.close()
