"""A connection to a backend: in use by one session at a time, idle in the pool between requests."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final, Protocol

from tidegate.http.response import ResponseMemo, ResponseParser
from tidegate.loop.reactor import EPOLLIN, EPOLLOUT, Reactor
from tidegate.session.context import reset
from tidegate.session.plain_sockets import connect, stream

if TYPE_CHECKING:
    from tidegate.cluster.backend import BackendState
    from tidegate.cluster.pool import ConnectionPool
    from tidegate.session.http_splice import Lane


PARKED: Final = -1  # as an interest: not watched


class User(Protocol):
    """Who uses a connection."""

    def on_back(self, mask: int) -> None: ...


class BackConnection:
    """A socket, its response parser, and whose events they are. Watched from connect to close."""

    __slots__ = ("_pool", "_reactor", "fd", "interest", "lane", "parser", "sock", "user")

    def __init__(self, pool: ConnectionPool[BackConnection], memo: ResponseMemo, reactor: Reactor) -> None:
        self._pool = pool
        self._reactor = reactor
        self.parser = ResponseParser(memo)
        self.sock: socket.socket  # once it is being connected
        self.fd = -1
        self.interest = 0
        self.user: User | None = None
        self.lane: Lane | None = None  # since the kernel moved a body that it sent

    def connect(self, backend: BackendState, user: User, keepalive: bool, first: bytes) -> int:
        """Begin to connect; returns how many bytes of `first` were sent, -1 when the connect failed.

        On this host a connect is over when the call returns, and a send right behind it saves a turn of the
        loop. Otherwise nothing was sent, and EPOLLOUT tells when to. Raises OSError when no socket is to be
        had: our fault, not the backend's.
        """
        sock = self.sock = stream(backend.family)
        self.fd = sock.fileno()
        if not connect(sock, backend, keepalive):
            return -1
        try:
            sent = sock.send(first)
        except BlockingIOError:
            sent = 0
        except OSError:
            return -1
        self.interest = EPOLLIN if sent else EPOLLIN | EPOLLOUT
        self.user = user
        self._reactor.add(self.fd, self.interest, self.on_event)
        return sent

    def watch(self, interest: int) -> None:
        before = self.interest
        if interest != before:
            self.interest = interest
            if before == PARKED:
                self._reactor.add(self.fd, interest, self.on_event)
            else:
                self._reactor.modify(self.fd, interest)

    def park(self) -> None:
        """Hear nothing any more, errors included, until `watch`."""
        self._reactor.remove(self.fd)
        self.interest = PARKED

    def on_event(self, mask: int) -> None:
        user = self.user
        if user is not None:
            user.on_back(mask)
        else:  # idle: closed by the backend, or it speaks out of turn
            self._pool.discard(self)

    def close(self) -> None:
        self.user = None
        if self.lane is not None:
            unread = self.lane.body.unread
            self.lane.close()
            self.lane = None
            if unread:  # or the backend would wait for its window for a minute
                reset(self.sock)
        if self.fd >= 0:
            self._reactor.forget(self.fd)
            self._reactor.close_after_batch(self.sock)
