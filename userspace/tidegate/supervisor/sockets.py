"""Listening sockets: opened by the supervisor, one per worker and address, inherited by every worker."""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
from pathlib import Path

from tidegate.config.model import Address, Listener
from tidegate.errors import OperatorError

SOMAXCONN = Path("/proc/sys/net/core/somaxconn")


class ListenError(OperatorError):
    """A listener's address cannot be had."""


def somaxconn() -> int:
    """The kernel's silent cap on every backlog."""
    try:
        return int(SOMAXCONN.read_text())
    except (OSError, ValueError):
        return 4096  # the kernel's default since 5.4


def open_listeners(listener: Listener, count: int) -> list[socket.socket]:
    """`count` sockets of one reuseport group, bound but not listening; raises ListenError and opens none.

    SO_REUSEPORT would silently share the port with any other program of the same user, so the address is
    first bound without it: somebody else's listener is an error here, as it is without reuseport.
    """
    try:
        if listener.address.port:
            _new_socket(listener.address, reuse_port=False).close()
    except OSError as error:
        raise _explain(listener.address, error) from None
    return _open(listener, listener.address, count)


def open_more(listener: Listener, member: socket.socket, count: int) -> list[socket.socket]:
    """Further sockets of the reuseport group that `member` belongs to."""
    host, port = member.getsockname()[:2]
    return _open(listener, Address(host, port), count)


def _open(listener: Listener, address: Address, count: int) -> list[socket.socket]:
    opened: list[socket.socket] = []
    try:
        for _ in range(count):
            sock = _new_socket(address, reuse_port=True)
            opened.append(sock)
            # inherited by every connection it takes in: two syscalls less for each
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if listener.tcp_keepalive:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setblocking(False)
            if not address.port:  # the kernel chose one for the first: the others join it
                address = Address(address.host, sock.getsockname()[1])
    except OSError as error:
        for sock in opened:
            sock.close()
        raise _explain(listener.address, error) from None
    return opened


def start_listening(socks: list[socket.socket], backlog: int) -> None:
    """From here on the kernel takes connections in."""
    for sock in socks:
        sock.listen(backlog)


# Classic BPF over the TCP header: drop a SYN, pass the rest (linux/filter.h: code, jt, jf, k).
_DROP_SYN = struct.pack(
    "HBBI" * 6,
    *(0x30, 0, 0, 13),  # A = flags
    *(0x54, 0, 0, 0x12),  # A &= SYN | ACK
    *(0x15, 0, 1, 0x02),  # A == SYN: next, else skip one
    *(0x06, 0, 0, 0),  # drop
    *(0x06, 0, 0, 0xFFFFFFFF),  # pass
    *(0x06, 0, 0, 0xFFFFFFFF),
)
_SO_ATTACH_FILTER = 26


def refuse_new(sock: socket.socket) -> None:
    """Let no new handshake begin; those under way finish, and what waits can be accepted to the last.

    close() alone would reset everything that still waits. Where an unprivileged process may not attach a
    filter, the backlog is cut to nothing instead: at most one more connection waits at a time.
    """
    program = ctypes.create_string_buffer(_DROP_SYN, len(_DROP_SYN))
    fprog = struct.pack("HxxxxxxQ", len(_DROP_SYN) // 8, ctypes.addressof(program))
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)
    except PermissionError:
        sock.listen(0)


def close_for_everyone(sock: socket.socket) -> None:
    """close() of an inherited listener closes nothing; shutdown() ends it in every process."""
    try:
        sock.shutdown(socket.SHUT_RD)
    except OSError:
        pass  # ended already
    sock.close()


def _new_socket(address: Address, reuse_port: bool) -> socket.socket:
    family = socket.AF_INET6 if address.is_ipv6 else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address.is_ipv6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((address.host, address.port))
    except OSError:
        sock.close()
        raise
    return sock


def _explain(address: Address, error: OSError) -> ListenError:
    fixes = {
        errno.EADDRINUSE: f"see who has it: ss -ltnp 'sport = :{address.port}'; stop it or take another port",
        errno.EACCES: "ports below 1024 need root or CAP_NET_BIND_SERVICE",
        errno.EADDRNOTAVAIL: "the address is not on this host: see `ip addr`, or listen on 0.0.0.0 or [::]",
    }
    return ListenError(
        f"cannot listen on {address}: {error.strerror}",
        fixes.get(error.errno or 0, "see the address in the file"),
    )
