"""What supervisor and workers agree on: which sockets and slots belong to which listener and worker."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

from tidegate.config.model import Listener

# fds a worker needs besides connections: epoll, channel, maps, logs, resolver, spare
RESERVED_FDS = 64


@dataclass(slots=True)
class ListenerGroup:
    """One configured listener: a reuseport group with one socket, and one slot, per worker.

    A listener handed to us by systemd is one socket that all workers share (`shared`). After an upgrade to
    fewer workers there are more sockets than workers: the surplus stays open, marked dead, and whoever is
    there empties it.
    """

    listener: Listener
    index: int  # stable while the listener lives; names its steering program
    socks: list[socket.socket] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    shared: bool = False

    @property
    def name(self) -> str:
        return self.listener.name

    def sock(self, worker: int) -> socket.socket:
        return self.socks[0] if self.shared else self.socks[worker]

    def close(self) -> None:
        for sock in self.socks:
            sock.close()


def session_capacity(nofile: int) -> int:
    """The most sessions a worker can hold at two fds each."""
    return max(1, (max(4, nofile - RESERVED_FDS) - 1) // 2)


def max_connections(listeners: Sequence[Listener], nofile: int) -> dict[str, int]:
    """Sessions per worker that each listener may have, by name, from the limit of open files.

    A session takes two fds, a queued connection one. "auto" listeners share what the queues (at most a
    quarter of it) leave; a number that does not fit is cut to what does. At least 1 each.
    """
    usable = max(4, nofile - RESERVED_FDS)
    queues = min(sum(listener.accept_queue for listener in listeners), usable // 4)
    share = max(1, (usable - queues) // 2 // max(1, len(listeners)))
    most = session_capacity(nofile)
    return {
        listener.name: share if listener.max_connections is None else min(listener.max_connections, most)
        for listener in listeners
    }
