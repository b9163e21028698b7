"""Whole requests through the session code, for a profiler: client and backend are outside this process.

    PYTHONPATH=userspace:tests python tests/bench/http_path.py [--close] [--requests N] [--profile]

Under valgrind it counts instructions, which a busy machine does not change: what N more requests add, divided
by N, is what one costs in user space.

    valgrind --tool=none|callgrind python tests/bench/http_path.py --requests 2000

No supervisor, no kernel half: ages are read from TCP_INFO, or, with --stamp, made up for the price of a plain
socket option, as the kernel half's cost is not this process's.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import select
import socket
import struct
import subprocess
import sys
import time

from harness.backends import NativeBackend

from tidegate.accept.listener import Acceptor, SpareFd
from tidegate.cluster.balance import ClusterState
from tidegate.config.loader import parse
from tidegate.config.model import Protocol
from tidegate.kernel.queue_age import QueueAge, read_tcp_info
from tidegate.loop.reactor import EPOLLHUP, EPOLLIN, Reactor
from tidegate.loop.slab import Slab
from tidegate.metrics.names import LISTENER
from tidegate.session import tcp_guard
from tidegate.session.context import BUFFER_SIZE, Context
from tidegate.session.http import HttpSession
from tidegate.supervisor.traffic import Traffic

HEAD = b"GET / HTTP/1.1\r\nHost: 127.0.0.1:8080\r\n"
CONNECTIONS = 16
_SIZE = 32
_unpack = struct.Struct("=QQQII").unpack


def drive(port: int, requests: int, close: bool) -> None:
    """The client: closed loop, CONNECTIONS at a time."""
    request = HEAD + (b"Connection: close\r\n" if close else b"") + b"\r\n"
    epoll = select.epoll()
    socks: dict[int, socket.socket] = {}
    begun = done = 0

    def begin() -> None:
        sock = socket.create_connection(("127.0.0.1", port))
        sock.sendall(request)
        socks[sock.fileno()] = sock
        epoll.register(sock.fileno(), EPOLLIN)

    for _ in range(min(CONNECTIONS, requests)):
        begin()
        begun += 1
    while done < requests:
        for fd, _ in epoll.poll():
            sock = socks[fd]
            data = sock.recv(65536)
            if not data.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"unexpected answer: {data[:80]!r}")
            done += 1
            if close:
                del socks[fd]
                sock.close()
            if begun < requests:
                begun += 1
                if close:
                    begin()
                else:
                    sock.sendall(request)


def stamped(sock: socket.socket) -> QueueAge:
    """As the kernel's stamp is read: a socket option of that size, unpacked; the numbers are made up."""
    _unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SIZE))
    return QueueAge(time.monotonic_ns(), 0, 0, 0, 0)


def acceptor(
    reactor: Reactor, listening: socket.socket, backend: str, protocol: str, stamp: bool
) -> Acceptor:
    host, port = listening.getsockname()
    config = parse(
        f'[[listener]]\naddress = "{host}:{port}"\nprotocol = "{protocol}"\ncluster = "app"\n'
        f'[cluster.app]\nbackends = ["{backend}"]\n',
        allow_pending=True,
    )
    listener = config.listeners[0]
    clusters = {cluster.name: ClusterState(cluster) for cluster in config.clusters}
    traffic = Traffic(reactor)
    traffic.apply(config, clusters)
    buffer = bytearray(BUFFER_SIZE)
    ctx = Context(
        reactor=reactor,
        slab=Slab(1024),
        buffer=buffer,
        view=memoryview(buffer),
        listener=listener,
        cluster=clusters["app"],
        words=memoryview(bytearray(LISTENER.words * 8)).cast("Q"),
        on_end=lambda session, reason: None,
    )
    make = tcp_guard.make if listener.protocol is Protocol.TCP else HttpSession
    words = memoryview(bytearray(64)).cast("Q")
    one = Acceptor(
        ctx, listening, stamped if stamp else read_tcp_info, make, 1024, SpareFd(),
        lambda active: words.__setitem__(0, active),
    )  # fmt: skip
    traffic.equip(ctx, listener, ctx.cluster)
    ctx.on_end = one.session_ended
    return one


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    options.add_argument("--requests", type=int, default=20_000)
    options.add_argument("--close", action="store_true", help="a connection for every request")
    options.add_argument("--protocol", default="http", choices=("http", "tcp"))
    options.add_argument("--stamp", action="store_true")
    options.add_argument("--profile", action="store_true", help="calls and time per function")
    options.add_argument("--drive", type=int, default=0, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.drive:
        drive(given.drive, given.requests, given.close)
        return
    reactor = Reactor()
    listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
    listening.setblocking(False)
    with NativeBackend("http") as backend:
        acceptor(reactor, listening, backend.address, given.protocol, given.stamp).start()
        argv = [sys.executable, __file__, "--drive", str(listening.getsockname()[1])]
        argv += ["--requests", str(given.requests), *(["--close"] if given.close else [])]
        client = subprocess.Popen(argv, stdout=subprocess.PIPE)
        assert client.stdout is not None
        # It says nothing, so this is its end; a pidfd would do, but valgrind knows none.
        reactor.add(client.stdout.fileno(), EPOLLIN | EPOLLHUP, lambda mask: reactor.stop())
        profile = cProfile.Profile()
        before = time.process_time_ns(), os.times()
        if given.profile:
            profile.runcall(reactor.run)
        else:
            reactor.run()
        used, times = time.process_time_ns() - before[0], os.times()
        if client.wait():
            raise SystemExit("the client failed")
    user, system = (1e6 * (times[at] - before[1][at]) / given.requests for at in (0, 1))
    turns = reactor.iterations / given.requests
    print(f"{used / given.requests / 1000:.2f} us of CPU per request ({user:.1f} user, {system:.1f} system)"
          f", {turns:.2f} turns of the loop")  # fmt: skip
    if given.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(45)


if __name__ == "__main__":
    main()
