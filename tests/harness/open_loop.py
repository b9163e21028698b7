"""The open-loop client itself: one process, one epoll loop, up to some thousand connections.

`python -m harness.open_loop` reads a plan from stdin (one JSON line), says {"ready": true}, starts at the
next line, and prints the result. Use it through `harness.client`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import resource
import select
import socket
import struct
import sys
import termios
import time
from collections import deque

from harness.plan import Attempt, GiveUp, Outcome, Plan, Result, Send, Then

_BURST = 32  # connects between two looks at the events
_CONNECT_ERRORS = {errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.EAGAIN, errno.ENOBUFS}
_SLEEP_AT_MOST_S = 0.05


class _Connection:
    __slots__ = ("answer", "attempt", "expected", "given_up", "open", "sock")

    def __init__(self, sock: socket.socket, attempt: Attempt, expected: bytes) -> None:
        self.sock = sock
        self.attempt = attempt
        self.expected = expected
        self.answer = b""
        self.given_up = False
        self.open = True


class OpenLoop:
    """Runs a plan. The schedule never waits for the connections."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.result = Result()
        self._epoll = select.epoll()
        self._by_fd: dict[int, _Connection] = {}
        self._patience: deque[_Connection] = deque()
        self._leaving: deque[tuple[int, _Connection]] = deque()
        self._holding: deque[tuple[int, _Connection]] = deque()
        self._unacked: list[_Connection] = []
        self._undecided = 0

    def run(self) -> Result:
        """All attempts, each with its outcome; every socket is closed at the end."""
        plan = self.plan
        interval_ns = int(1e9 / plan.rate)
        start_ns = time.monotonic_ns()
        started = 0
        last_decided_ns = start_ns
        while True:
            now = time.monotonic_ns()
            burst = 0
            while started < plan.count and start_ns + started * interval_ns <= now and burst < _BURST:
                self._start(started, start_ns + started * interval_ns)
                started += 1
                burst += 1
                now = time.monotonic_ns()
            if started < plan.count or self._undecided or self._holding:
                last_decided_ns = now
            elif not self._by_fd or now - last_decided_ns > plan.linger_ns:
                break
            self._look_for_acks()
            self._expire(now)
            wake_ns = now + int(_SLEEP_AT_MOST_S * 1e9)
            if started < plan.count:
                wake_ns = min(wake_ns, start_ns + started * interval_ns)
            if self._patience:
                wake_ns = min(wake_ns, self._patience[0].attempt.before_connect_ns + plan.patience_ns)
            for waiting in (self._leaving, self._holding):
                if waiting:
                    wake_ns = min(wake_ns, waiting[0][0])
            # epoll sleeps whole milliseconds, rounded up: the lag that this causes is in the result
            for fd, mask in self._epoll.poll(max(0.0, (wake_ns - now) / 1e9)):
                self._event(self._by_fd[fd], mask)
        for connection in list(self._by_fd.values()):
            self._close(connection)
        self._epoll.close()
        return self.result

    def _request(self, name: str) -> tuple[bytes, bytes]:
        """What is sent, and what has to come back (the end of it)."""
        line = name.encode() + b"\n"
        if self.plan.send in (Send.LINE, Send.LINE_FIN):
            return line, line
        if self.plan.send is Send.NOTHING:
            return b"", b""  # any byte is an answer
        close = b"Connection: close\r\n" if self.plan.send is Send.HTTP_CLOSE else b""
        return b"GET /%s HTTP/1.1\r\nHost: bench\r\n%s\r\n" % (name.encode(), close), b"\r\n\r\n" + line

    def _start(self, number: int, due_ns: int) -> None:
        plan = self.plan
        family = socket.AF_INET6 if ":" in plan.host else socket.AF_INET
        attempt = Attempt(f"{plan.prefix}{number}", due_ns, time.monotonic_ns())
        self.result.attempts.append(attempt)
        try:
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError:
            attempt.outcome_ns = time.monotonic_ns()
            return
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if plan.source:
            sock.bind((plan.source, 0))
        connection = _Connection(sock, attempt, self._request(attempt.id)[1])
        attempt.before_connect_ns = time.monotonic_ns()
        failure = sock.connect_ex((plan.host, plan.port))
        if failure not in (0, errno.EINPROGRESS):
            attempt.outcome_ns = time.monotonic_ns()
            if failure not in _CONNECT_ERRORS:
                attempt.outcome = Outcome.REFUSED if failure == errno.ECONNREFUSED else Outcome.RESET
            sock.close()
            return
        self._by_fd[sock.fileno()] = connection
        self._epoll.register(sock.fileno(), select.EPOLLOUT)
        self._undecided += 1
        if plan.patience_ns:
            self._patience.append(connection)

    def _event(self, connection: _Connection, mask: int) -> None:
        attempt = connection.attempt
        if not attempt.connected_ns:
            failure = connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if failure:
                self._ended(connection, Outcome.REFUSED if failure == errno.ECONNREFUSED else Outcome.RESET)
                return
            self._connected(connection)
            return
        try:
            data = connection.sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            self._ended(connection, Outcome.RESET)
            return
        if not data:
            self._ended(connection, Outcome.EOF)
            return
        connection.answer += data
        if connection.answer.endswith(connection.expected):
            self._ended(connection, Outcome.ANSWERED)
        elif self._is_other(connection.answer):
            self._ended(connection, Outcome.WRONG)

    def _is_other(self, answer: bytes) -> bool:
        """Whether that is an answer, though not the expected one."""
        if self.plan.send in (Send.HTTP, Send.HTTP_CLOSE):
            return b"\r\n\r\n" in answer and not answer.startswith(b"HTTP/1.1 200 ")
        return answer.endswith(b"\n")

    def _connected(self, connection: _Connection) -> None:
        attempt = connection.attempt
        attempt.connected_ns = time.monotonic_ns()
        request, _ = self._request(attempt.id)
        self._epoll.modify(connection.sock.fileno(), select.EPOLLIN)
        if request:
            try:
                connection.sock.send(request)
            except OSError:
                self._ended(connection, Outcome.RESET)
                return
            self._unacked.append(connection)
            self._look_for_acks()
        if self.plan.send is Send.LINE_FIN:
            connection.sock.shutdown(socket.SHUT_WR)
        if self.plan.leave_after_ns:
            self._leaving.append((attempt.connected_ns + self.plan.leave_after_ns, connection))

    def _look_for_acks(self) -> None:
        """Notes when the kernel at the other end is seen to have the bytes of a connection."""
        waiting = []
        for connection in self._unacked:
            if not connection.open or connection.attempt.acked_ns:
                continue
            unacked = struct.unpack("i", fcntl.ioctl(connection.sock.fileno(), termios.TIOCOUTQ, b"\0" * 4))[
                0
            ]
            if unacked:
                waiting.append(connection)
            else:
                connection.attempt.acked_ns = time.monotonic_ns()
        self._unacked = waiting

    def _expire(self, now: int) -> None:
        plan = self.plan
        while self._patience:
            first = self._patience[0]
            if first.open and not first.given_up and now < first.attempt.before_connect_ns + plan.patience_ns:
                break
            self._patience.popleft()
            if first.open and not first.given_up and not first.attempt.outcome_ns:
                self._give_up(first, Outcome.TIMEOUT)
        while self._leaving and self._leaving[0][0] <= now:
            connection = self._leaving.popleft()[1]
            if connection.open and not connection.given_up:
                self._give_up(connection, Outcome.LEFT)
        while self._holding and self._holding[0][0] <= now:
            connection = self._holding.popleft()[1]
            if connection.open:
                self._close(connection)

    def _give_up(self, connection: _Connection, outcome: Outcome) -> None:
        self._decide(connection, outcome)
        if self.plan.give_up is GiveUp.SILENT:
            connection.given_up = True
            return
        if self.plan.give_up is GiveUp.RESET:
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._close(connection)

    def _ended(self, connection: _Connection, outcome: Outcome) -> None:
        attempt = connection.attempt
        if attempt.outcome_ns:
            if not attempt.late:
                attempt.late = outcome.value
                attempt.late_ns = time.monotonic_ns()
            if outcome is not Outcome.ANSWERED:
                self._close(connection)
            return
        if outcome is Outcome.ANSWERED and not attempt.acked_ns:
            attempt.acked_ns = time.monotonic_ns()
        self._decide(connection, outcome)
        if outcome is Outcome.ANSWERED and self.plan.then is Then.HOLD:
            self._holding.append((time.monotonic_ns() + self.plan.hold_ns, connection))
            return
        self._close(connection)

    def _decide(self, connection: _Connection, outcome: Outcome) -> None:
        connection.attempt.outcome = outcome
        connection.attempt.outcome_ns = time.monotonic_ns()
        self._undecided -= 1

    def _close(self, connection: _Connection) -> None:
        if connection.open:
            connection.open = False
            self._epoll.unregister(connection.sock.fileno())
            del self._by_fd[connection.sock.fileno()]
            connection.sock.close()


def main() -> None:
    plan = Plan.from_json(json.loads(sys.stdin.readline()))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(json.dumps({"ready": True}), flush=True)
    if not sys.stdin.readline():
        return
    print(json.dumps(OpenLoop(plan).run().to_json()), flush=True)


if __name__ == "__main__":
    main()
