"""The reactor with real epoll and pipes: who is called, in which order, and what closes when."""

import os
import socket

import pytest

from tidegate.loop.reactor import EPOLLIN, Reactor
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
