"""The accept path with real sockets and sessions that fail."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from tidegate import config
from tidegate.accept.listener import Acceptor, SpareFd
from tidegate.kernel.queue_age import QueueAge, read_tcp_info
from tidegate.kernel.records import NO_SLOT
from tidegate.loop.reactor import Reactor
from tidegate.loop.slab import Slab
from tidegate.metrics.names import LISTENER, DropReason, EndReason
from tidegate.session.context import BUFFER_SIZE, Context

CONFIG = (
    '[[listener]]\naddress = "127.0.0.1:1"\nprotocol = "tcp"\ncluster = "app"\n'
    '[cluster.app]\nbackends = ["127.0.0.1:9"]\n'
)


class Session:
    """One that serves; `fault` says where it does not."""

    fault = ""
    made: list[Session] = []

    def __init__(self, ctx: Context, sock: socket.socket, peer: Any, established_ns: int) -> None:
        if Session.fault == "made":
            raise RuntimeError("made")
        self.ctx, self.sock = ctx, sock
        Session.made.append(self)

    def start(self) -> None:
        if Session.fault == "started":
            raise RuntimeError("started")

    def end(self, reason: EndReason) -> None:
        self.sock.close()
        self.ctx.on_end(self, reason)


@pytest.mark.parametrize("fault", ["aged", "made", "started"])
def test_a_connection_that_fails_costs_itself_and_not_the_listener(fault: str) -> None:
    reactor = Reactor()
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    buffer = bytearray(BUFFER_SIZE)
    words = memoryview(bytearray(LISTENER.words * 8)).cast("Q")
    ctx = Context(
        reactor=reactor,
        slab=Slab(8),
        buffer=buffer,
        view=memoryview(buffer),
        listener=config.parse(CONFIG).listeners[0],
        cluster=None,
        words=words,
        on_end=lambda session, reason: None,
    )

    def read_age(sock: socket.socket) -> Any:
        if Session.fault == "aged":
            raise OSError("aged")
        return read_tcp_info(sock)

    acceptor = Acceptor(ctx, listening, read_age, Session, 8, SpareFd(), lambda active: None)  # type: ignore[arg-type]
    ctx.on_end = acceptor.session_ended
    acceptor.start()
    Session.made = []
    clients = []
    for Session.fault in (fault, ""):
        clients.append(socket.create_connection(listening.getsockname()))
        reactor.run_once(0)
    assert ctx.active == 1
    assert words[LISTENER.index("accepted_total")] == 2
    assert words[LISTENER.index("sessions_total")] == 2
    assert words[LISTENER.index("sessions")] == 1
    assert words[LISTENER.index("ended_total", EndReason.INTERNAL_ERROR.value)] == 1
    assert not any(words[LISTENER.index("dropped_total", reason.value)] for reason in DropReason)
    clients[0].settimeout(1)
    try:
        assert clients[0].recv(1) == b""
    except ConnectionResetError:
        assert fault != "started"
    for sock in [*clients, listening, *(session.sock for session in Session.made)]:
        sock.close()
    reactor.close()


def test_a_renamed_listener_takes_the_counts_of_what_is_under_way_along() -> None:
    """Or more sessions would end under the new name than began there."""
    reactor = Reactor()
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    buffer = bytearray(BUFFER_SIZE)
    old, new = (memoryview(bytearray(LISTENER.words * 8)).cast("Q") for _ in range(2))
    listener = config.parse(CONFIG).listeners[0]
    ctx = Context(
        reactor=reactor,
        slab=Slab(8),
        buffer=buffer,
        view=memoryview(buffer),
        listener=listener,
        cluster=None,
        words=old,
        on_end=lambda session, reason: None,
    )
    acceptor = Acceptor(ctx, listening, read_tcp_info, Session, 1, SpareFd(), lambda active: None)  # type: ignore[arg-type]
    ctx.on_end = acceptor.session_ended
    acceptor.start()
    Session.made, Session.fault = [], ""
    clients = [socket.create_connection(listening.getsockname()) for _ in range(2)]
    reactor.run_once(0)
    assert len(acceptor.queue) == 1
    acceptor.apply(listener, None, new, 1)
    Session.made[0].end(EndReason.DONE)
    reactor.run_once(0)
    for words, accepted, begun, ended, active in ((old, 0, 0, 0, 0), (new, 2, 2, 1, 1)):
        assert words[LISTENER.index("accepted_total")] == accepted
        assert words[LISTENER.index("sessions_total")] == begun
        assert words[LISTENER.index("ended_total", EndReason.DONE.value)] == ended
        assert words[LISTENER.index("sessions")] == active
        assert words[LISTENER.index("queued")] == 0
    for sock in [*clients, listening, *(session.sock for session in Session.made)]:
        sock.close()
    reactor.close()


def test_the_kernels_count_of_the_waiting_saves_a_call_and_loses_nobody() -> None:
    """One whose count is too low is taken in the next turn, and by who asks without epoll at once."""
    reactor = Reactor()
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    buffer = bytearray(BUFFER_SIZE)
    words = memoryview(bytearray(LISTENER.words * 8)).cast("Q")
    ctx = Context(
        reactor=reactor,
        slab=Slab(8),
        buffer=buffer,
        view=memoryview(buffer),
        listener=config.parse(CONFIG).listeners[0],
        cluster=None,
        words=words,
        on_end=lambda session, reason: None,
    )
    slot = 7
    asked: list[int] = []

    def waiting(of: int) -> int:
        asked.append(of)
        return 0

    def read_age(sock: socket.socket) -> QueueAge:
        return read_tcp_info(sock)._replace(slot=slot)

    acceptor = Acceptor(ctx, listening, read_age, Session, 8, SpareFd(), lambda active: None, waiting=waiting)  # type: ignore[arg-type]
    ctx.on_end = acceptor.session_ended
    acceptor.start()
    Session.made, Session.fault = [], ""
    clients = [socket.create_connection(listening.getsockname()) for _ in range(4)]
    for turn in (1, 2):
        reactor.run_once(0)
        assert words[LISTENER.index("accepted_total")] == turn and asked == [7] * turn
    assert acceptor.accept_waiting() == 2
    assert ctx.active == 4
    slot = NO_SLOT  # an age from TCP_INFO: nobody counts
    clients += [socket.create_connection(listening.getsockname()) for _ in range(2)]
    reactor.run_once(0)
    assert ctx.active == 6 and asked == [7, 7]
    for sock in [*clients, listening, *(session.sock for session in Session.made)]:
        sock.close()
    reactor.close()
