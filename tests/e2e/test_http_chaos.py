"""Clients and backends that misbehave in every way at once: what is left afterwards must be nothing.

Places at the cluster, connections, sessions, descriptors: each must come back whatever way a request ends in.
What one of these ways forgets shows here.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from harness.http_wire import HttpClient, ScriptedBackend, Wire, read_head
from harness.proc import Tidegate, tcp_config
from harness.waiting import SCALE, wait_until

OK = b"HTTP/1.1 200 OK\r\n"
PLACES = 6

ANSWERS: dict[str, Callable[[Wire], None]] = {
    "ok": lambda wire: wire.send(OK + b"Content-Length: 2\r\n\r\nok"),
    "chunked": lambda wire: wire.send(OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX: y\r\n\r\n"),
    "large": lambda wire: wire.send(OK + b"Content-Length: 3000000\r\n\r\n" + bytes(3_000_000)),
    "interim": lambda wire: wire.send(
        b"HTTP/1.1 103 Early Hints\r\n\r\n" + OK + b"Content-Length: 2\r\n\r\nok"
    ),
    "surplus": lambda wire: wire.send(OK + b"Content-Length: 2\r\n\r\nokSURPLUS"),
    "garbage": lambda wire: wire.send(b"\x00garbage\r\n\r\n"),
    "by-close": lambda wire: (wire.send(OK + b"\r\nok"), wire.close())[0],
    "cut": lambda wire: (wire.send(OK + b"Content-Length: 9\r\n\r\nok"), wire.close())[0],
    "cut-chunk": lambda wire: (wire.send(OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nok"), wire.close())[0],
    "half-head": lambda wire: (wire.send(OK), wire.close())[0],
    "nothing": lambda wire: wire.close(),
    "reset": lambda wire: (wire.send(OK + b"Content-Length: 9\r\n\r\nok"), wire.reset())[0],
    "silent": lambda wire: time.sleep(0.4),
    "slow": lambda wire: (time.sleep(0.05), wire.send(OK + b"Content-Length: 0\r\n\r\n"))[0],
    "upgrade": lambda wire: wire.send(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nhello"
    ),
}


def backend(wire: Wire) -> None:
    """Answers as the target says, `/early` before the body has come."""
    wire.recording = False
    while True:
        head = read_head(wire)
        name = head.target.strip("/")
        if name == "early":
            wire.send(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
            wire.rest()
            return
        if head.get("content-length"):
            wire.exactly(int(head.get("content-length") or 0))
        elif head.get("transfer-encoding"):
            wire.chunked()
        ANSWERS[name](wire)
        if name == "upgrade":
            wire.rest()
            return


def behave(port: int, dice: random.Random) -> None:
    """One client's life."""
    with contextlib.suppress(OSError, EOFError, ValueError), HttpClient(port, timeout_s=5) as client:
        client.recording = False
        for _ in range(dice.randint(1, 4)):
            name = dice.choice([*ANSWERS, "early"])
            more = b"Connection: upgrade\r\nUpgrade: x\r\n" if name == "upgrade" else b""
            head = b" /%b HTTP/1.1\r\nHost: a\r\n%b" % (name.encode(), more)
            upload = b"x" * dice.choice([0, 1, 5000, 300_000])
            way = dice.randrange(10)
            if way < 4:
                client.ask(b"GET" + head + b"\r\n")
            elif way == 4:
                client.ask(b"POST" + head + b"Content-Length: %d\r\n\r\n%b" % (len(upload), upload))
            elif way == 5:
                chunk = b"%x\r\n%b\r\n" % (len(upload), upload) if upload else b""
                client.ask(b"PUT" + head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk + b"0\r\n\r\n")
            elif way == 6:  # pipelined, and only the first is waited for
                client.ask((b"GET" + head + b"\r\n") * 3)
            elif way == 7:  # an upload that stops
                client.send(b"POST" + head + b"Content-Length: 400000\r\n\r\n" + upload)
                return
            elif way == 8:
                client.ask(b"GET" + head + dice.choice([b"Bad Name: x", b"Content-Length: x"]) + b"\r\n\r\n")
            else:  # leaves without waiting, one way or the other
                client.send(b"GET" + head + b"\r\n")
                if dice.random() < 0.5:
                    time.sleep(dice.random() * 0.02)
                    client.reset()
                return


@pytest.mark.parametrize(
    "seconds",
    [5, pytest.param(300, marks=[pytest.mark.soak, pytest.mark.timeout(900)])],
    ids=["short", "long"],
)
def test_nothing_is_left_of_any_way_to_end(seconds: int) -> None:
    cluster = {
        "max_in_flight": PLACES,
        "back_timeout": "300ms",
        "retries": 1,
        "pool": {"idle_timeout": "300ms"},
        "balance": "least_connections",
    }
    listener = {"front_timeout": "500ms", "request_timeout": "500ms", "stale_after": "300ms"}
    with ExitStack() as stack:
        backends = [stack.enter_context(ScriptedBackend(backend)) for _ in range(2)]
        config = tcp_config([one.address for one in backends], protocol="http", cluster=cluster, **listener)
        gate = stack.enter_context(Tidegate(config))
        (worker,) = gate.worker_pids()
        behave(gate.port(), random.Random(0))
        wait_until(lambda: not gate.listener()["sessions"], 10, "the first client's end")
        time.sleep(0.5)
        files = len(os.listdir(f"/proc/{worker}/fd"))
        until = time.monotonic() + seconds * SCALE
        lives = [0] * 8

        def live(number: int) -> None:
            dice = random.Random(number)
            while time.monotonic() < until:
                behave(gate.port(), dice)
                lives[number] += 1

        threads = [threading.Thread(target=live, args=(number,)) for number in range(len(lives))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(lives) > 20 * seconds
        wait_until(lambda: not gate.listener()["sessions"], 20, "the last sessions' end")
        wait_until(lambda: len(os.listdir(f"/proc/{worker}/fd")) == files, 10, "the descriptors to come back")
        assert gate.worker_pids() == [worker]
        seen = gate.listener()
        assert seen["ended"]["internal_error"] == 0
        # every place is free: as many as there are can be had at once, and each backend is known to be idle
        clients = [stack.enter_context(HttpClient(gate.port())) for _ in range(PLACES)]
        for client in clients:
            client.send(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n")
        assert [client.response().status for client in clients] == [200] * PLACES

        def at_backends() -> int:
            return sum(
                int(one["connections"]) for two in gate.status()["clusters"] for one in two["backends"]
            )

        wait_until(lambda: at_backends() == 0, 5, "the backends to be known as idle")
