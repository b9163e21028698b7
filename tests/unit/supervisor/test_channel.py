"""Supervisor and worker talking: whole messages in order, fds along, no blocking, an end that is seen."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.supervisor.channel import MAX_FDS, Channel, ChannelClosed, from_memfd, to_memfd

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


@given(st.lists(st.dictionaries(st.text(max_size=10), values, max_size=5), max_size=8))
def test_messages_come_whole_and_in_order(messages: list[dict[str, object]]) -> None:
    a, b = Channel.pair()
    for message in messages:
        assert a.send(message)
    for message in messages:
        assert b.receive() == (message, [])
    assert b.receive() is None
    a.close()
    with pytest.raises(ChannelClosed):
        b.receive()
    b.close()


def test_fds_come_along_and_do_not_survive_exec() -> None:
    a, b = Channel.pair()
    reads, write = os.pipe()
    many = [os.dup(reads) for _ in range(MAX_FDS - 1)]
    assert a.send({"type": "sockets"}, [write, *many])
    for fd in (write, reads, *many):
        os.close(fd)
    received = b.receive()
    assert received is not None
    message, fds = received
    assert message == {"type": "sockets"}
    assert len(fds) == MAX_FDS
    assert not any(os.get_inheritable(fd) for fd in fds)
    os.write(fds[0], b"through")
    assert os.read(fds[1], 10) == b"through"
    for fd in fds:
        os.close(fd)
    a.close()
    b.close()


def test_one_that_does_not_listen_is_noticed_and_nobody_waits() -> None:
    a, b = Channel.pair()
    sent = 0
    while a.send({"type": "look", "padding": "x" * 1000}):
        sent += 1
        assert sent < 100_000
    assert sent > 10
    assert not a.send({"type": "look", "padding": "x" * 1000})
    assert b.receive() is not None
    b.close()
    assert not a.send({"type": "look"}), "nor is one that is gone"
    a.close()


def test_a_message_larger_than_the_queue_is_refused() -> None:
    a, b = Channel.pair()
    assert not a.send({"type": "x", "padding": "x" * 10_000_000})
    a.close()
    b.close()


@given(values)
def test_a_memfd_holds_any_value(value: object) -> None:
    assert from_memfd(to_memfd(value)) == value


def test_a_memfd_can_be_read_by_each_who_got_it() -> None:
    fd = to_memfd({"configuration": 1})
    a, b = Channel.pair()
    for _ in range(3):
        assert a.send({}, [fd])
    os.close(fd)
    for _ in range(3):
        received = b.receive()
        assert received is not None
        # the three share one file offset: reading starts at the beginning all the same
        assert from_memfd(received[1][0]) == {"configuration": 1}
    a.close()
    b.close()


def test_all_who_got_a_memfd_may_read_it_at_once() -> None:
    value = {"configuration": list(range(50_000))}  # more than one read of a buffered file
    fd = to_memfd(value)
    with ThreadPoolExecutor(4) as readers:
        read = list(readers.map(lambda _: from_memfd(os.dup(fd)), range(60)))
    os.close(fd)
    assert all(one == value for one in read)


def test_it_does_not_block() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(ours)
    assert channel.receive() is None
    channel.close()
    theirs.close()
