"""The start-up test of splicing: what a relay must never get wrong, done on sockets of our own.

Each check runs real bytes through a session of four sockets on 127.0.0.1: a client, our two, a backend.
"""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tidegate.kernel.loader import Objects
from tidegate.kernel.splicing import CannotSplice, Splicing
from tidegate.kernel.tcp_info import TCP_CLOSE, progress
from tidegate.session.splice import Direction, SourceError, TargetError, Wait
from tidegate.session.splice_ends import SocketEnds

# Where it works all of it takes less than 100 ms; a busy machine must not be taken for a broken one.
_LIMIT_S = 1.0
_BUFFERS = 64 * 1024
_CREDIT = 128 * 1024
_LARGE = 2 << 20
# What a client may get rid of when the backend does not read: every buffer on the way, and the credit.
_HELD_AT_MOST = 4 << 20


class _LackingError(Exception):
    """What went wrong."""


class _Session:
    """Four sockets and the two directions between the inner ones."""

    def __init__(self, splicing: Splicing, early: bytes = b"", read: int = 0) -> None:
        """`early` is sent before the hand-over, and `read` bytes of it are moved by copying."""
        self._splicing = splicing
        self._stack = contextlib.ExitStack()
        self.client, self.front = self._pair()
        self.back, self.server = self._pair()
        self.client.sendall(early)
        if early:
            self._until(lambda: len(self._peek(self.front, len(early))) == len(early))
            self.back.sendall(self.front.recv(read))
        self._flows = splicing.join(self.front, self.back, _CREDIT)
        self._stack.callback(splicing.release, self._flows)
        buffer = bytearray(_BUFFERS)
        self.directions = [
            Direction(flow, SocketEnds(buffer, memoryview(buffer), splicing, flow)) for flow in self._flows
        ]
        self._finished = [False, False]

    def enter(self) -> None:
        for direction in self.directions:
            direction.enter()
            if not direction.joined:
                raise _LackingError("net.ipv4.tcp_rmem or tcp_wmem leave a socket less room than it needs")

    def _pair(self) -> tuple[socket.socket, socket.socket]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            active = self._stack.enter_context(socket.create_connection(listener.getsockname(), _LIMIT_S))
            passive = self._stack.enter_context(listener.accept()[0])
        for sock in (active, passive):
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFERS)
        return active, passive

    @staticmethod
    def _peek(sock: socket.socket, size: int) -> bytes:
        try:
            return sock.recv(size, socket.MSG_PEEK)
        except BlockingIOError:
            return b""

    def turn(self) -> None:
        """What the relay does meanwhile."""
        for index, direction in enumerate(self.directions):
            if self._finished[index] or not direction.step() & Wait.END:
                continue
            self._flows[index].target.shutdown(socket.SHUT_WR)
            self._finished[index] = True

    def _until(self, done: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + _LIMIT_S
        while not done():
            if time.monotonic() > deadline:
                return False
        return True

    def send(self, sock: socket.socket, data: bytes, reader: socket.socket, expected: int) -> bytes:
        """Sends, and reads until so many bytes came or the limit is over; what came."""
        view, got = memoryview(data), bytearray()

        def more() -> bool:
            nonlocal view
            self.turn()
            if view:
                with contextlib.suppress(BlockingIOError):
                    view = view[sock.send(view) :]
            with contextlib.suppress(BlockingIOError):
                got.extend(reader.recv(_BUFFERS))
            return len(got) >= expected

        self._until(more)
        return bytes(got)

    def ends(self, sock: socket.socket) -> bool:
        """Whether a clean end of file comes, and nothing before it."""
        seen: list[bytes] = []

        def end() -> bool:
            self.turn()
            with contextlib.suppress(BlockingIOError):
                seen.append(sock.recv(1))
            return bool(seen)

        return self._until(end) and seen[0] == b""

    def close(self) -> None:
        self._stack.close()


@contextmanager
def _session(splicing: Splicing, early: bytes = b"", read: int = 0) -> Iterator[_Session]:
    session = _Session(splicing, early, read)
    try:
        session.enter()
        yield session
    finally:
        session.close()


def _early_data(splicing: Splicing) -> None:
    with _session(splicing, b"early", 2) as session:
        if session.send(session.client, b" bird", session.server, 10) != b"early bird":
            raise _LackingError("bytes that came before the hand-over are lost or doubled")
        if session._flows[0].repeated != 2:
            raise _LackingError("the kernel does not say where in the stream a packet begins")


def _large_and_ends(splicing: Splicing) -> None:
    data = random.Random(1).randbytes(_LARGE)
    with _session(splicing) as session:
        for sender, reader in ((session.client, session.server), (session.server, session.client)):
            if session.send(sender, data, reader, _LARGE) != data:
                raise _LackingError("a stream arrived damaged, or did not arrive in time")
        if not all(flow.redirected for flow in session._flows):
            raise _LackingError("the kernel redirected nothing")
        session.client.shutdown(socket.SHUT_WR)
        if not session.ends(session.server):
            raise _LackingError("the end of a stream is not passed on")
        if session.send(session.server, data, session.client, _LARGE) != data:
            raise _LackingError("a half-closed session lost bytes")
        session.server.shutdown(socket.SHUT_WR)
        if not session.ends(session.client):
            raise _LackingError("the end of the second stream is not passed on")


def _flow_control(splicing: Splicing) -> None:
    data = random.Random(2).randbytes(2 * _HELD_AT_MOST)
    with _session(splicing) as session:
        deadline = time.monotonic() + 0.02
        view = memoryview(data)
        while time.monotonic() < deadline:
            session.turn()
            with contextlib.suppress(BlockingIOError):
                view = view[session.client.send(view) :]
        sent = len(data) - len(view)
        if sent > _HELD_AT_MOST:
            raise _LackingError(f"{sent} bytes were taken for a backend that does not read")
        # all that was taken is in the kernel or with us: the end comes behind it
        session.client.shutdown(socket.SHUT_WR)
        if session.send(session.client, b"", session.server, sent) != data[:sent]:
            raise _LackingError("bytes that waited for credit are lost or out of order")
        if not session.ends(session.server):
            raise _LackingError("the end of a stream that waited is not passed on")


def _passed_outlives_the_end(splicing: Splicing) -> None:
    with _session(splicing) as session:
        flow = session._flows[0]
        flow.set_limit(0)
        session.client.sendall(b"passed")
        session.client.shutdown(socket.SHUT_WR)
        session.front.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + _LIMIT_S
        while progress(session.front).state != TCP_CLOSE and time.monotonic() < deadline:
            pass
        if session.send(session.server, b"", session.server, len(b"passed")) != b"passed":
            raise _LackingError("what was passed is lost when both directions have ended")


def run(objects: Objects) -> str:
    """Why it must not be used here; "" when all of it works. Under 200 ms; KernelUnavailable as create()."""
    splicing = Splicing.create(objects)
    try:
        for check in (_early_data, _large_and_ends, _flow_control, _passed_outlives_the_end):
            check(splicing)
    except (_LackingError, CannotSplice, SourceError, TargetError, OSError) as error:
        return f"the start-up test failed: {error or type(error).__name__}"
    finally:
        splicing.close()
    return ""
