"""The open-loop client against servers whose behaviour is known."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from harness.backends import Backend
from harness.client import Client, run
from harness.open_loop import OpenLoop
from harness.plan import Attempt, GiveUp, Outcome, Plan, Result, Send, Then, quantile
from harness.ports import free_port
from harness.processes import stopped

MS = 1_000_000


@contextmanager
def toy(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server that hands every connection to `serve` in one thread."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:

        def loop() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                with client:
                    serve(client)

        thread = threading.Thread(target=loop)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            assert not thread.is_alive()


def reset(client: socket.socket) -> None:
    client.recv(100)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def answer_something_else(client: socket.socket) -> None:
    client.recv(100)
    client.sendall(b"something else\n")


def end(client: socket.socket) -> None:
    client.recv(100)


@pytest.mark.parametrize(
    ("serve", "outcome"),
    [(reset, Outcome.RESET), (answer_something_else, Outcome.WRONG), (end, Outcome.EOF)],
)
def test_each_bad_end_has_its_outcome(serve: Callable[[socket.socket], None], outcome: Outcome) -> None:
    with toy(serve) as port:
        result = OpenLoop(Plan("127.0.0.1", port, rate=500, count=20, patience_ns=5_000 * MS)).run()
    assert result.outcomes() == {outcome.value: 20}


def test_nobody_listens_is_refused() -> None:
    result = OpenLoop(Plan("127.0.0.1", free_port(), rate=500, count=5)).run()
    assert result.outcomes() == {"refused": 5}
    assert all(attempt.outcome_ns >= attempt.before_connect_ns for attempt in result.attempts)


@pytest.mark.parametrize("send", [Send.LINE, Send.LINE_FIN, Send.HTTP, Send.HTTP_CLOSE])
def test_answers_are_counted_and_clocks_are_in_order(send: Send) -> None:
    with Backend("counting") as backend:
        result = run(Plan("127.0.0.1", backend.port, rate=400, count=60, send=send, patience_ns=10_000 * MS))
        seen = {request.line: request for request in backend.seen()}
    assert result.outcomes() == {"answered": 60}
    assert sorted(seen) == sorted(attempt.id for attempt in result.attempts)
    for attempt in result.attempts:
        assert attempt.before_connect_ns <= attempt.connected_ns <= attempt.acked_ns
        assert attempt.before_connect_ns <= seen[attempt.id].seen_ns <= attempt.outcome_ns
        assert attempt.lag_ns >= 0


def test_server_that_speaks_first() -> None:
    with Backend("echo", banner="hello\n") as backend:
        result = run(Plan("127.0.0.1", backend.port, rate=100, count=5, send=Send.NOTHING))
    assert result.outcomes() == {"answered": 5}


def test_ipv6() -> None:
    with Backend("echo", host="::1") as backend:
        assert run(Plan("::1", backend.port, rate=100, count=5)).outcomes() == {"answered": 5}


def test_patience_ends_and_fin_or_reset_reach_the_server() -> None:
    for give_up, how in ((GiveUp.FIN, "eof"), (GiveUp.RESET, "reset")):
        ends: list[str] = []

        def serve(client: socket.socket, ends: list[str] = ends) -> None:
            try:
                while client.recv(100):
                    continue
                ends.append("eof")
            except ConnectionResetError:
                ends.append("reset")

        with toy(serve) as port:
            plan = Plan("127.0.0.1", port, rate=1000, count=3, patience_ns=30 * MS, give_up=give_up)
            result = OpenLoop(plan).run()
        assert result.outcomes() == {"timeout": 3}
        assert all(attempt.latency_ns >= 30 * MS for attempt in result.attempts)
        assert ends == [how] * 3


def test_silent_clients_keep_the_socket_and_note_what_came_late() -> None:
    order: list[str] = []

    def serve(client: socket.socket) -> None:
        line = client.recv(100)
        time.sleep(0.08)
        client.setblocking(False)
        try:
            order.append("fin" if client.recv(100) == b"" else "data")
        except BlockingIOError:
            order.append("open")
        client.setblocking(True)
        client.sendall(line)
        if len(order) == 2:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with toy(serve) as port:
        plan = Plan("127.0.0.1", port, rate=1000, count=2, patience_ns=20 * MS, give_up=GiveUp.SILENT)
        result = OpenLoop(plan).run()
    assert order == ["open", "open"]
    assert result.outcomes() == {"timeout": 2}
    first, second = result.attempts
    assert first.late == "answered"
    assert second.late in ("answered", "reset")  # the RST may overtake the reading of the answer
    assert all(attempt.late_ns > attempt.outcome_ns for attempt in result.attempts)


def test_leaves_by_plan_without_a_byte() -> None:
    with Backend("counting") as backend:
        plan = Plan(
            "127.0.0.1",
            backend.port,
            rate=500,
            count=10,
            send=Send.NOTHING,
            leave_after_ns=5 * MS,
            give_up=GiveUp.RESET,
        )
        result = run(plan)
        assert result.outcomes() == {"left": 10}
        assert backend.seen() == []


def test_hold_keeps_an_answered_connection_and_notes_that_it_was_cut() -> None:
    with Backend("echo") as backend:
        plan = Plan("127.0.0.1", backend.port, rate=500, count=4, then=Then.HOLD, hold_ns=200 * MS)
        begun = time.monotonic_ns()
        assert [attempt.late for attempt in run(plan).attempts] == [""] * 4
        assert time.monotonic_ns() - begun >= 200 * MS

    def cut(client: socket.socket) -> None:
        client.sendall(client.recv(100))

    with toy(cut) as port:
        plan = Plan("127.0.0.1", port, rate=500, count=4, then=Then.HOLD, hold_ns=5_000 * MS)
        result = OpenLoop(plan).run()
    assert result.outcomes() == {"answered": 4}
    assert [attempt.late for attempt in result.attempts] == ["eof"] * 4


def test_the_schedule_does_not_wait_for_a_server_that_stands_still() -> None:
    with Backend("counting") as backend:
        plan = Plan("127.0.0.1", backend.port, rate=200, count=100, patience_ns=10_000 * MS)
        with Client(plan) as client, stopped(backend.child.pid) as span:
            client.go()
            time.sleep(0.6)
            # the second `with` ended first: the backend runs again
            result = None
        with Client(plan) as client:
            with stopped(backend.child.pid) as span:
                client.go()
                time.sleep(0.8)
            result = client.result()
    assert result.outcomes() == {"answered": 100}
    begun_in_the_stop = [a for a in result.attempts if a.before_connect_ns < span.until_ns]
    assert len(begun_in_the_stop) == 100
    assert all(a.outcome_ns > span.until_ns for a in result.attempts)


def test_result_survives_its_own_json() -> None:
    attempt = Attempt("a", 1, 2, 3, 4, 5, Outcome.RESET, "eof", 6)
    assert Result.from_json(Result([attempt]).to_json()).attempts == [attempt]
    plan = Plan("h", 1, 2.0, 3, give_up=GiveUp.SILENT, send=Send.HTTP, then=Then.HOLD)
    assert Plan.from_json(plan.to_json()) == plan


def test_quantile() -> None:
    assert quantile([], 0.5) == 0
    assert quantile([3, 1, 2], 0.5) == 2
    assert quantile(list(range(100)), 0.99) == 99
