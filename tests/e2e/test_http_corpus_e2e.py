"""The request corpora through a running proxy: what is refused is never seen by the backend as a request."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest
from corpus.replay import NO_SHARED, Case, own_cases, play, shared_cases, understood
from harness.http_wire import HttpClient, ScriptedBackend
from harness.proc import Tidegate, tcp_config

OWN = own_cases()
SHARED = shared_cases()


class Proxy:
    def __init__(self, gate: Tidegate, backend: ScriptedBackend) -> None:
        self.gate = gate
        self.backend = backend
        self._before: dict[int, int] = {}

    def new_bytes(self) -> list[bytes]:
        """What each backend connection received since the last call."""
        found = []
        for wire in list(self.backend.wires):
            known = self._before.get(id(wire), 0)
            if len(wire.received) > known:
                found.append(wire.received[known:])
                self._before[id(wire)] = len(wire.received)
        return found


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with ScriptedBackend() as backend:
        # clients end by a FIN, and no timeout is ever to be seen: no case ends in the middle of a message
        config = tcp_config([backend.address], protocol="http", abort_on_close=False, stale_after="60s")
        with Tidegate(config) as gate:
            yield Proxy(gate, backend)


def statuses(received: bytes) -> list[int]:
    """Of the responses in it; their bodies hold no status line."""
    return [
        int(part[:3]) for part in received.replace(b"HTTP/1.1 ", b"\0").split(b"\0")[1:] if part[:3].isdigit()
    ]


def replay(proxy: Proxy, case: Case) -> tuple[list[int], list[bytes]]:
    proxy.new_bytes()
    with HttpClient(proxy.gate.port()) as client:
        with contextlib.suppress(OSError):  # refused before it was all sent
            client.send(case.data)
            client.sock.shutdown(socket.SHUT_WR)
        received = client.rest()
    return statuses(received), proxy.new_bytes()


def check(proxy: Proxy, case: Case) -> None:
    expected = play([case.data])
    assert not expected.pending
    answers, sent = replay(proxy, case)
    whole = [request for part in sent for request in understood(part)]
    assert len(whole) == expected.whole, (case.why, whole, answers)
    if case.verdict == "reject":
        assert answers, "closed without an answer"
        if expected.error is not None:
            assert answers[-1] == expected.error.status
        assert answers[-1] >= 400
        # a body of more than one read may begin well: then its connection is closed in the middle
        if not expected.whole and expected.sent == b"" and len(case.data) < 8192:
            assert not sent, "bytes of a refused request were sent"
    elif case.verdict == "accept":
        assert len(whole) >= 1
        assert answers.count(200) == len(whole)
        if case.target:
            assert whole[0].target == case.target
        if case.body is not None:
            assert whole[0].body == case.body.encode("latin-1")
        for request, (method, _target, host) in zip(whole, expected.requests, strict=False):
            assert request.method == method.decode()
            assert host.decode().lower() in request.values("host")[0].lower()


@pytest.mark.parametrize("case", OWN, ids=[case.name for case in OWN])
def test_own_corpus_through_the_proxy(proxy: Proxy, case: Case) -> None:
    check(proxy, case)


@pytest.mark.skipif(not SHARED, reason=NO_SHARED)
@pytest.mark.parametrize("case", SHARED, ids=[case.name for case in SHARED])
def test_shared_corpus_through_the_proxy(proxy: Proxy, case: Case) -> None:
    check(proxy, case)


def test_it_still_serves(proxy: Proxy) -> None:
    with HttpClient(proxy.gate.port()) as client:
        assert client.get("/after").body == b"GET /after"
    assert proxy.gate.status()["workers"][0]["restarts"] == 0
