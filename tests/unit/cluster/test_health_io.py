from __future__ import annotations

import errno
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from unit.cluster.building import cluster

from tidegate.cluster.balance import ClusterState
from tidegate.cluster.health_io import Checker
from tidegate.config.model import Address, Backend, Health, ProxyProtocol
from tidegate.loop.reactor import Reactor

MS = 1_000_000


class Server:
    """Answers every connection with `answer`, or, when that is None, never; what it was sent is in `seen`."""

    def __init__(self, sock: socket.socket, answer: bytes | None) -> None:
        self.sock = sock
        self.answer = answer
        self.seen: list[bytes] = []
        self.kept: list[socket.socket] = []
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    @property
    def address(self) -> Address:
        name = self.sock.getsockname()
        return Address("", 0, name) if isinstance(name, str) else Address(name[0], name[1])

    def _serve(self) -> None:
        while True:
            try:
                conn, _ = self.sock.accept()
            except OSError as error:
                if error.errno != errno.EMFILE:  # one test takes all descriptors away
                    return
                time.sleep(0.01)
                continue
            conn.settimeout(0.2)
            try:
                self.seen.append(conn.recv(4096))
                if self.answer is None:
                    self.kept.append(conn)
                    continue
                conn.sendall(self.answer)
            except OSError:
                pass
            conn.close()

    def close(self) -> None:
        self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
        self.thread.join(5)
        for conn in self.kept:
            conn.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def make(answer: bytes | None, sock: socket.socket | None = None) -> Server:
        servers.append(Server(sock or socket.create_server(("127.0.0.1", 0)), answer))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


class Run:
    def __init__(self, *addresses: Address, path: str = "/up", **changes: object) -> None:
        self.reactor = Reactor()
        self.health = Health(path, 40 * MS, 400 * MS, 2, 2, ())
        self.config = cluster(backends=tuple(Backend(a) for a in addresses), health=self.health, **changes)
        self.state = ClusterState(self.config, Random(1), lambda: self.reactor.now)
        self.checker = Checker(self.reactor, self.state)
        self.checker.start()

    def until(self, condition: Callable[[], bool], seconds: float = 10) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, [b.last_check for b in self.state.backends]
            self.reactor.run_once(20 * MS)

    def close(self) -> None:
        self.checker.stop()
        self.reactor.run_once(0)
        self.reactor.close()


@pytest.fixture
def run() -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def make(*addresses: Address, **changes: object) -> Run:
        runs.append(Run(*addresses, **changes))
        return runs[-1]

    yield make
    for each in runs:
        each.close()


def refusing() -> Address:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return Address(*sock.getsockname())


OK = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        (OK, "ok"),
        (b"HTTP/1.1 500 No\r\n\r\n", "status"),
        (b"220 mail ESMTP\r\n", "garbage"),
        (b"", "closed"),
        (None, "timeout"),
    ],
)
def test_each_answer_has_its_result(
    serve: Callable[..., Server], run: Callable[..., Run], answer: bytes | None, result: str
) -> None:
    checked = run(serve(answer).address)
    backend = checked.state.backends[0]
    checked.until(lambda: bool(backend.last_check))
    assert backend.last_check == result
    assert backend.up is (result == "ok")


def test_up_down_and_up_again(serve: Callable[..., Server], run: Callable[..., Run]) -> None:
    good = serve(OK)
    flapping = serve(OK)
    checked = run(good.address, flapping.address)
    first, second = checked.state.backends
    checked.until(lambda: first.last_check == second.last_check == "ok")
    flapping.answer = b"HTTP/1.1 503 No\r\n\r\n"
    checked.until(lambda: not second.up)
    assert {checked.state.pick() for _ in range(9)} == {first}
    flapping.answer = OK
    checked.until(lambda: second.up)
    assert {checked.state.pick() for _ in range(9)} == {first, second}
    assert all(request.startswith(b"GET /up HTTP/1.1\r\n") for request in good.seen if request)


def test_connect_checks_over_each_family(
    serve: Callable[..., Server], run: Callable[..., Run], tmp_path: Path
) -> None:
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(tmp_path / "app.sock"))
    unix.listen(8)
    some = [
        serve(None),
        serve(None, socket.create_server(("::1", 0), family=socket.AF_INET6)),
        serve(None, unix),
    ]
    missing = Address("", 0, str(tmp_path / "none.sock"))
    too_long = Address("", 0, "/" + "x" * 200)
    checked = run(*(server.address for server in some), refusing(), missing, too_long, path="")
    checked.until(lambda: all(backend.last_check for backend in checked.state.backends))
    results = ["ok", "ok", "ok", "refused", "refused", "refused"]
    assert [b.last_check for b in checked.state.backends] == results
    assert [b.up for b in checked.state.backends] == [True] * 3 + [False] * 3


def test_a_proxy_header_precedes_the_check(serve: Callable[..., Server], run: Callable[..., Run]) -> None:
    server = serve(OK)
    checked = run(server.address, send_proxy=ProxyProtocol.V1)
    checked.until(lambda: bool(checked.state.backends[0].last_check))
    assert server.seen[0].startswith(b"PROXY UNKNOWN\r\nGET /up ")


def test_reload_starts_and_stops_checks(serve: Callable[..., Server], run: Callable[..., Run]) -> None:
    server = serve(OK)
    other = refusing()
    checked = run(server.address)
    backend = checked.state.backends[0]
    checked.until(lambda: backend.last_check == "ok")
    checked.state.reconfigure(
        cluster(backends=(Backend(server.address), Backend(other)), health=checked.health)
    )
    checked.until(lambda: not checked.state.backends[1].up)
    checked.state.reconfigure(cluster(backends=(Backend(other),), health=checked.health))
    seen = len(server.seen)
    idle = time.monotonic() + 0.3
    while time.monotonic() < idle:
        checked.reactor.run_once(20 * MS)
    assert len(server.seen) - seen <= 1  # one may have been on its way
    checked.state.reconfigure(cluster(backends=(Backend(other),), health=None))
    assert checked.state.backends[0].up
    assert checked.reactor.timers.next_due(time.monotonic_ns()) is None


def test_our_own_stall_is_not_the_backends_fault(
    serve: Callable[..., Server], run: Callable[..., Run]
) -> None:
    server = serve(None)
    checked = run(server.address)
    backend = checked.state.backends[0]
    checked.until(lambda: bool(server.seen))
    time.sleep(0.9)  # more than half a timeout late
    checked.until(lambda: bool(backend.last_check))
    assert backend.last_check == "none"
    assert backend.up
    checked.until(lambda: backend.last_check == "timeout")


def fill(hogs: list[int]) -> None:
    while True:
        hogs.append(os.dup(0))


def test_want_of_descriptors_says_nothing_about_a_backend(
    serve: Callable[..., Server], run: Callable[..., Run]
) -> None:
    checked = run(serve(OK).address)
    backend = checked.state.backends[0]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    top = max(map(int, os.listdir("/proc/self/fd"))) + 40
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(top, hard), hard))
    hogs: list[int] = []
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            fill(hogs)
        checked.until(lambda: bool(backend.last_check))
        assert backend.last_check == "none"
        assert backend.up
    finally:
        for fd in hogs:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    checked.until(lambda: backend.last_check == "ok")


def test_checks_leave_no_descriptors_behind(serve: Callable[..., Server], run: Callable[..., Run]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    server = serve(b"HTTP/1.1 200 OK\r\n\r\n")
    checked = run(server.address, refusing())
    checked.until(lambda: len(server.seen) >= 15)
    # its listener, the epoll fd, one check on each side at most
    assert len(os.listdir("/proc/self/fd")) - before <= 5
