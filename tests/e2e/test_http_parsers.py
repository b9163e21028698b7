"""Generated and mutated requests through a running proxy to servers of others, each with its own parser.

What is asserted of every connection: each server saw exactly the requests that the proxy forwarded, with the
same method, target and body, and the client got each server's answer to each, in order; of what the proxy
refused or what was cut off, no server saw a whole request. A request smuggled past the proxy is one more.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from corpus.generate import connections
from corpus.replay import Played, Seen, play, understood, whole_part
from harness import apps
from harness.app_servers import Between, Reporter, gunicorn, uvicorn
from harness.http_wire import Arrived, HttpClient, Message, read_response
from harness.peers import HAProxy, Nginx
from harness.ports import free_port
from harness.proc import Tidegate
from harness.processes import python_env
from harness.waiting import wait_until
from hypothesis import given, settings

SMALL: list[Callable[[], Reporter]] = [gunicorn, lambda: uvicorn("h11"), lambda: Between(Nginx)]
MORE: list[Callable[[], Reporter]] = [*SMALL, lambda: uvicorn("httptools"), lambda: Between(HAProxy)]

# Long enough for the kernel to wake the proxy before the next piece: what it reads is then cut there, mostly.
PAUSE_S = 0.0005


@dataclass(slots=True)
class Counts:
    """What was tried so far, so that a run can show that it tried something."""

    refused: int = 0
    cut_off: int = 0
    split: int = 0
    # of each server: what it saw, and what it refused with reason
    seen: Counter[str] = field(default_factory=Counter)
    unheard_of: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Site:
    """One proxy with a listener for each server, named as it is."""

    gate: Tidegate
    servers: list[Reporter]
    log: Path
    counts: Counts = field(default_factory=Counts)

    def logged(self) -> Counter[str]:
        """By listener, how many requests the proxy's own access log says it forwarded whole."""
        found: Counter[str] = Counter()
        for line in self.log.read_text().splitlines():
            entry = json.loads(line)
            if entry["backend"] and entry["end"] == "done":
                found[entry["listener"]] += 1
        return found


@contextlib.contextmanager
def site(makers: list[Callable[[], Reporter]], fault: Path | None = None) -> Iterator[Site]:
    """`fault`: a directory whose sitecustomize.py breaks the proxy."""
    env = None
    if fault is not None:
        env = {"PYTHONPATH": os.pathsep.join([str(fault), python_env()["PYTHONPATH"]])}
    with ExitStack() as stack:
        servers = [stack.enter_context(make()) for make in makers]
        config: dict[str, Any] = {"workers": 1, "drain_timeout": "2s", "listener": [], "cluster": {}}
        gate = Tidegate(config, env=env, may_raise=fault is not None)
        log = gate.directory / "access.log"
        for server in servers:
            config["listener"].append(
                {
                    "name": server.name,
                    "address": f"127.0.0.1:{free_port()}",
                    "protocol": "http",
                    "cluster": server.name,
                    "abort_on_close": False,  # clients end by a FIN: what they asked before it is served
                    "stale_after": "60s",  # and on a slow machine too
                    "request_timeout": "60s",
                    "access_log": {"path": str(log), "format": "json"},
                }
            )
            config["cluster"][server.name] = {
                "backends": [server.address],
                "retries": 0,
                "back_timeout": "5s",
            }
        yield Site(stack.enter_context(gate), servers, log)


def talk(port: int, pieces: list[bytes]) -> bytes:
    """All that the proxy answers to a client that sends the pieces and then its FIN."""
    with HttpClient(port) as client:
        with contextlib.suppress(OSError):  # refused before all was sent
            for at, piece in enumerate(pieces):
                if at:
                    time.sleep(PAUSE_S)
                client.send(piece)
            client.sock.shutdown(socket.SHUT_WR)
        return client.rest()


def check(one: Site, pieces: list[bytes]) -> None:
    """One client's bytes, to each server in turn."""
    expected = play(pieces)
    wanted = understood(whole_part(expected))
    refusals = [expected.error.status] if expected.error is not None else []
    for server in one.servers:
        answers = responses(talk(one.gate.port(server.name), pieces), expected)
        seen = server.seen()
        told = []
        assert len(answers) == len(wanted) + len(refusals), server.name
        for request, answer in zip(wanted, answers, strict=False):
            if mark := answer.get("x-seen"):
                record = apps.decode(mark)
                told.append(record)
                assert record["method"] == request.method, server.name
                assert record["target"] == request.target, server.name
                assert record["body"].encode("latin-1") == request.body, server.name
            else:
                assert answer.status >= 400 and unheard_of(request), f"{server.name}: {answer.status}"
                one.counts.unheard_of[server.name] += 1
        # what is left is the proxy's own: its refusal, if there was one
        assert [answer.status for answer in answers[len(wanted) :]] == refusals, server.name
        assert seen == told, f"{server.name} saw other requests than it answered"
        one.counts.seen[server.name] += len(seen)
    one.counts.refused += expected.error is not None
    one.counts.cut_off += expected.pending
    one.counts.split += len(pieces) > 1


def unheard_of(request: Seen) -> bool:
    """Whether a server may refuse what is asked for: a method that it does not know, `*`, an upgrade to
    what it takes for WebSocket without a key, a path above the root.
    """
    depth = 0
    for part in unquote(request.target.partition("?")[0]).split("/")[1:]:
        depth += -1 if part == ".." else part not in ("", ".")
        if depth < 0:
            return True
    known = request.method in {"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"}
    return not known or request.target == "*" or bool(request.values("upgrade"))


def responses(received: bytes, expected: Played) -> list[Message]:
    """The final responses in it; AssertionError where it ends within one."""
    wire = Arrived(received)
    methods = [method.decode() for method, _, _ in expected.requests]
    found = []
    while wire.left:
        if expected.pending and len(found) == expected.whole:
            # it may have been told to go on with a body that never came
            assert wire.rest().startswith(b"HTTP/1.1 100 ")
            break
        method = methods[len(found)] if len(found) < len(methods) else "GET"
        found.append(read_response(wire, method))
    return found


# Ways to break the proxy, each a source run at the start of its processes.
FAULTS = {
    "a body of a GET is sent and not announced": """
import tidegate.http.headers as headers
framing = headers._framing
headers._framing = lambda request: b"" if request.method == b"GET" else framing(request)
""",
    "a connection with half a request on it is used again": """
from tidegate.http.response import ResponseParser
from tidegate.session.http_exchange import BackSide
def drop_back(self):
    self._back_out = b""
    conn, self._conn = self._conn, None
    backend, self._backend = self._backend, None
    if conn is not None:
        conn.user = None
        conn.watch(1)
        conn.parser = ResponseParser(self._cluster._memo)
        self._cluster.pool.checkin(backend, conn, self.ctx.reactor.now)
        self._cluster.state.released(backend)
BackSide._drop_back = drop_back
""",
    "bytes behind a chunk's declared size belong to it": """
from tidegate.http.chunked import ChunkDecoder
size_line = ChunkDecoder._size_line
def longer(self, data, pos):
    after = size_line(self, data, pos)
    at = data.find(b"\\r\\n0", after)
    if after > 0 and self._left and at > after:
        self._left = at - after
    return after
ChunkDecoder._size_line = longer
""",
}


def run(one: Site, examples: int, *, fixed: bool) -> None:
    """Tries that many connections, the same each time if `fixed`; compares the counts, and asks once more."""

    @settings(max_examples=examples, deadline=None, derandomize=fixed, database=None)
    @given(pieces=connections())
    def tried(pieces: list[bytes]) -> None:
        check(one, pieces)

    tried()
    counts = one.counts
    assert min(counts.refused, counts.split) > examples / 4 and counts.cut_off > examples / 20, counts
    for server in one.servers:
        name = server.name
        assert counts.seen[name] > examples, counts
        told = counts.seen[name] + counts.unheard_of[name]
        wait_until(lambda name=name, told=told: one.logged()[name] == told, 5, f"{told} lines about {name}")
        with HttpClient(one.gate.port(name)) as client:
            assert client.get("/after").get("x-seen")
    status = one.gate.status()
    assert status["workers"][0]["restarts"] == 0
    assert all(listener["ended"]["internal_error"] == 0 for listener in status["listeners"])


def test_three_parsers_see_what_the_proxy_forwarded() -> None:
    with site(SMALL) as one:
        run(one, 500, fixed=True)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_proxy_that_lets_requests_be_smuggled_is_found_out(fault: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAULTS[fault])
    tmp_path.chmod(0o755)
    caught: list[BaseException] = []

    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(pieces=connections())
    def tried(pieces: list[bytes]) -> None:
        if not caught:
            try:
                check(one, pieces)
            except (AssertionError, EOFError, OSError) as error:
                caught.append(error)

    with site(SMALL[-1:], fault=tmp_path) as one:
        with HttpClient(one.gate.port(one.servers[0].name)) as client:
            assert client.get("/works").get("x-seen")  # it is not simply broken
        assert one.servers[0].seen()
        tried()
    print(repr(caught)[:400])
    assert caught


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_five_parsers_see_what_the_proxy_forwarded() -> None:
    """As above, with other requests every time: TIDEGATE_EXAMPLES says how many."""
    with site(MORE) as one:
        run(one, int(os.environ.get("TIDEGATE_EXAMPLES", "20000")), fixed=False)
