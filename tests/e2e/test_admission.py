"""Who gets the next place: caps, order, full queues. Step by step, without clocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from harness.backends import Backend
from harness.client import run
from harness.line_client import LineClient
from harness.plan import Plan
from harness.proc import Table, Tidegate, tcp_config
from harness.waiting import wait_until


@contextmanager
def gated(**listener: object) -> Iterator[tuple[Tidegate, Backend]]:
    """A proxy before a backend that answers only when told to; nobody goes stale."""
    given: Table = {"stale_after": "60s", **listener}
    with Backend("gate") as backend, Tidegate(tcp_config([backend.address], **given)) as gate:
        yield gate, backend


def served(backend: Backend) -> list[str]:
    """What reached the backend, in order."""
    return [seen.line for seen in backend.seen()]


def fill(gate: Tidegate, backend: Backend, waiting: int) -> list[LineClient]:
    """One client in session, `waiting` behind it in the accept queue, in the order of their numbers."""
    clients = [LineClient(gate.port()).say("c0")]
    wait_until(lambda: served(backend) == ["c0"], 5, "the first session")
    for number in range(1, waiting + 1):
        clients.append(LineClient(gate.port()).say(f"c{number}"))
        wait_until(lambda n=number: gate.listener()["queued"] == n, 5, f"{number} queued")  # type: ignore[misc]
    return clients


def answer(backend: Backend, client: LineClient, name: str) -> None:
    """Lets the backend answer; the client leaves, and its place is free."""
    backend.ask("open")
    assert client.hear() == name
    client.sock.close()


def serve_in_order(backend: Backend, clients: dict[str, LineClient], order: list[str]) -> None:
    """All of them are served, in that order."""
    for place, name in enumerate(order):
        wait_until(lambda p=place: len(served(backend)) == p + 1, 5, f"{name} to be served")  # type: ignore[misc]
        assert served(backend) == order[: place + 1]
        answer(backend, clients[name], name)


def named(clients: list[LineClient]) -> Iterator[tuple[str, LineClient]]:
    return ((f"c{number}", client) for number, client in enumerate(clients))


def test_newest_first_under_a_cap_of_one_and_it_recovers() -> None:
    with gated(max_connections=1) as (gate, backend):
        clients = fill(gate, backend, 7)
        assert gate.listener()["sessions"] == 1
        order = ["c0", "c7", "c6", "c5", "c4", "c3", "c2", "c1"]
        serve_in_order(backend, dict(named(clients)), order)
        with LineClient(gate.port()) as later:
            later.say("later")
            backend.ask("open")
            assert later.hear() == "later"


def test_a_place_is_free_again_when_its_client_resets() -> None:
    with gated(max_connections=1) as (gate, backend):
        clients = fill(gate, backend, 1)
        clients[0].reset()
        wait_until(lambda: served(backend) == ["c0", "c1"], 5, "the one who waited to be served")
        backend.ask("open")
        backend.ask("open")
        assert clients[1].hear() == "c1"
        clients[1].sock.close()


@pytest.mark.parametrize("leave", ["fin", "reset"])
def test_clients_that_leave_the_accept_queue_cost_no_backend_connection(leave: str) -> None:
    with gated(max_connections=1) as (gate, backend):
        first = LineClient(gate.port()).say("c0")
        wait_until(lambda: served(backend) == ["c0"], 5, "the first session")
        silent = [LineClient(gate.port()) for _ in range(8)]
        wait_until(lambda: gate.listener()["queued"] == 8, 5, "eight queued")
        for client in silent[:6]:
            if leave == "reset":
                client.reset()
            else:
                client.sock.close()
        answer(backend, first, "c0")
        for client in reversed(silent[6:]):
            answer(backend, client.say("stayed"), "stayed")
        wait_until(lambda: gate.listener()["dropped"]["client_gone"] == 6, 5, "six counted as gone")
        assert backend.stats()["accepted"] == 3


def test_twenty_clients_against_a_cap_of_fifteen() -> None:
    with Backend("slow", threads=15, service_ms=60) as backend:
        config = tcp_config([backend.address], max_connections=15, stale_after="5s")
        with Tidegate(config) as gate:
            result = run(Plan("127.0.0.1", gate.port(), rate=5000, count=20))
            assert result.outcomes() == {"answered": 20}
            assert len(backend.seen()) == 20
            assert sum(gate.listener()["dropped"].values()) == 0


def test_a_full_accept_queue_drops_the_new_one() -> None:
    with gated(max_connections=1, accept_queue=4, when_queue_full="drop_new") as (gate, backend):
        clients = fill(gate, backend, 4)
        late = run(Plan("127.0.0.1", gate.port(), rate=1000, count=3, prefix="late"))
        assert late.outcomes() == {"reset": 3}
        assert gate.listener()["dropped"]["queue_full"] == 3
        serve_in_order(backend, dict(named(clients)), ["c0", "c4", "c3", "c2", "c1"])


def test_a_full_accept_queue_drops_the_oldest_one() -> None:
    with gated(max_connections=1, accept_queue=4, when_queue_full="drop_oldest") as (gate, backend):
        clients = fill(gate, backend, 4)
        clients.append(LineClient(gate.port()).say("c5"))
        assert clients[1].end() == "reset"
        clients.append(LineClient(gate.port()).say("c6"))
        assert clients[2].end() == "reset"
        assert gate.listener()["dropped"]["queue_full"] == 2
        assert gate.listener()["queued"] == 4
        serve_in_order(backend, dict(named(clients)), ["c0", "c6", "c5", "c4", "c3"])


def test_one_that_goes_stale_in_the_accept_queue_is_swept_without_a_free_place() -> None:
    with gated(max_connections=1, stale_after="300ms") as (gate, backend):
        first = LineClient(gate.port()).say("c0")
        wait_until(lambda: served(backend) == ["c0"], 5, "the first session")
        with LineClient(gate.port()) as waits:
            waits.say("waits")
            assert waits.end() == "reset"
        listener = gate.listener()
        assert (listener["dropped"]["stale"], listener["queued"]) == (1, 0)
        backend.ask("open")
        assert first.hear() == "c0"
        assert served(backend) == ["c0"]
        first.sock.close()
