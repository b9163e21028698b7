"""The resolver helper: a process that calls getaddrinfo, so that the loop never does.

It speaks lines of JSON over a stream socket, both ways:
    {"id": 1, "host": "app.internal"}  ->  {"id": 1, "addresses": ["10.0.0.7"]}  or  {"id": 1, "error": "..."}
and ends when the other end closes.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import setproctitle

# Look-ups at once: a name whose server is silent must not hold up the others.
THREADS = 8


def lookup(host: str) -> list[str]:
    """All addresses of a name; raises OSError (gaierror) or UnicodeError when it has none."""
    try:
        # Families without an address on this host only cost failed connects.
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    except socket.gaierror:
        # A host with nothing but a loopback interface has no configured family at all.
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return sorted({str(sockaddr[0]) for _, _, _, _, sockaddr in found})


def answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"id": request["id"], "addresses": lookup(request["host"])}
    except (OSError, UnicodeError) as error:
        return {"id": request["id"], "error": str(error)}


def serve(channel: socket.socket) -> None:
    """Answer until the other end closes."""
    waiting: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    sending = threading.Lock()

    def work() -> None:
        while True:
            reply = json.dumps(answer(waiting.get())).encode() + b"\n"
            with sending:
                channel.sendall(reply)

    for _ in range(THREADS):
        threading.Thread(target=work, daemon=True).start()
    with channel.makefile("rb") as lines:
        for line in lines:
            waiting.put(json.loads(line))


def run(channel: socket.socket, serve: Callable[[socket.socket], None]) -> NoReturn:
    """The whole life of the helper, in a process just forked.

    Forked and not executed: a worker that gave up its privileges may not be able to read the interpreter any
    more. So it first gives back what it inherited, above all listeners and sessions, which must not live on
    here.
    """
    try:
        # A terminal's Ctrl-C reaches the whole process group; this one ends with its worker, not before.
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        os.dup2(channel.fileno(), 0)
        os.closerange(3, 1 << 20)
        channel.detach()
        setproctitle.setproctitle("tidegate: resolver")
        serve(socket.socket(fileno=0))
    except BaseException:  # nothing may unwind into the worker's own stack
        os._exit(1)
    # Not a return: look-ups under way are not waited for.
    os._exit(0)
