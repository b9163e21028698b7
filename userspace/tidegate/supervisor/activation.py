"""Socket activation, sd_listen_fds(3): listeners that systemd opened and handed over."""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping, Sequence

from tidegate.config.model import Listener
from tidegate.errors import OperatorError

FIRST_FD = 3


def given_sockets(
    listeners: Sequence[Listener], environment: MutableMapping[str, str] = os.environ
) -> dict[str, socket.socket]:
    """Listener name -> its socket; by FileDescriptorName= first, by address otherwise.

    The variables are taken out, so that no child mistakes them for its own. Raises OperatorError for a
    socket that fits no listener: it would accept connections that nobody serves.
    """
    pid = environment.pop("LISTEN_PID", "")
    count = environment.pop("LISTEN_FDS", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdigit():
        return {}
    found: dict[str, socket.socket] = {}
    for position in range(int(count)):
        fd = FIRST_FD + position
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        name = names[position] if position < len(names) else ""
        listener = _match(sock, name, listeners)
        if listener is None:
            address = _address(sock)
            sock.close()
            raise OperatorError(
                f"systemd handed over a socket on {address} that no listener is configured for",
                f"add a [[listener]] with that address, or named {name!r}, or remove it from the socket unit",
            )
        found[listener.name] = sock
    return found


def _match(sock: socket.socket, name: str, listeners: Sequence[Listener]) -> Listener | None:
    for listener in listeners:
        if listener.name == name:
            return listener
    address = _address(sock)
    for listener in listeners:
        if str(listener.address) == address:
            return listener
    return None


def _address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if sock.family == socket.AF_INET6 else f"{host}:{port}"
