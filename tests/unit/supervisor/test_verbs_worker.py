"""The worker's half of the verbs: which sessions are meant, walks that give way, events that are bounded."""

from __future__ import annotations

import logging
import os
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.http.errors import Fault, RequestError
from tidegate.loop.reactor import Reactor
from tidegate.loop.slab import Slab
from tidegate.session.context import show_token
from tidegate.session.refusals import AROUND, Refusals
from tidegate.supervisor import verbs_worker
from tidegate.supervisor.verbs_worker import EventForwarder, Filter, Walk, parse_token

S = 1_000_000_000


class FakeSession:
    def __init__(self, **said: Any) -> None:
        self.token = 0
        self.started_ns = said.pop("started_ns", 0)
        self.last_progress_ns = said.pop("last_progress_ns", 0)
        self.ctx: Any = SimpleNamespace(
            listener=SimpleNamespace(name=said.pop("listener", "web")),
            cluster=SimpleNamespace(config=SimpleNamespace(name="app")),
        )
        self.said = {"client": "10.1.2.3:4567", "backend": "127.0.0.1:9000"} | said

    def describe(self) -> dict[str, Any]:
        return self.said


def meant(session: FakeSession, now: int = 100 * S, token: int = 1, **args: Any) -> bool:
    return Filter.of(args).matcher()(token, session, now)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({}, True),
        ({"tokens": [1, 2]}, True),
        ({"tokens": [2]}, False),
        ({"tokens": []}, False),
        ({"listener": "web"}, True),
        ({"listener": "api"}, False),
        ({"cluster": "app"}, True),
        ({"cluster": "ppa"}, False),
        ({"backend": "127.0.0.1:9000"}, True),
        ({"backend": "127.0.0.1:900"}, False),
        ({"client": "10.1.2.3"}, True),
        ({"client": "10.1.2.3:4567"}, True),
        ({"client": "10.1.2.3:456"}, False),
        ({"client": "10.0.0.0/8"}, True),
        ({"client": "10.1.2.4"}, False),
        ({"client": "::/0"}, False),
        ({"client": "unix"}, False),
        ({"older_ns": 90 * S}, True),
        ({"older_ns": 91 * S}, False),
        ({"idle_ns": 50 * S}, True),
        ({"idle_ns": 51 * S}, False),
        ({"listener": "web", "older_ns": 91 * S}, False),
    ],
)
def test_filters(args: dict[str, Any], expected: bool) -> None:
    assert meant(FakeSession(started_ns=10 * S, last_progress_ns=50 * S), **args) is expected


def test_clients_of_every_kind() -> None:
    six = FakeSession(client="[2001:db8::1]:80")
    assert meant(six, client="2001:db8::/32")
    assert meant(six, client="2001:db8::1")
    assert meant(six, client="[2001:db8::1]")
    assert meant(six, client="[2001:db8::1]:80")
    assert not meant(six, client="10.0.0.0/8")
    assert meant(FakeSession(client="[fe80::1%eth0]:80"), client="fe80::/10")
    unix = FakeSession(client="unix")
    assert meant(unix, client="unix")
    assert not meant(unix, client="0.0.0.0/0")


def test_a_session_that_knows_its_cluster_is_believed() -> None:
    session = FakeSession(cluster="other")
    assert meant(session, cluster="other")
    assert not meant(session, cluster="app")
    session = FakeSession()
    session.ctx.cluster = None  # routes alone decide, and none did yet
    assert not meant(session, cluster="app")


@given(st.integers(1, 2**31), st.integers(1, 2**64 - 1))
def test_tokens_are_read_as_they_are_shown(pid: int, token: int) -> None:
    assert parse_token(f"{pid}:{token:x}") == (pid, token)
    assert parse_token(show_token(token)) == (os.getpid(), token)


@given(st.text(max_size=30))
def test_no_text_breaks_the_reader_of_tokens(text: str) -> None:
    try:
        pid, token = parse_token(text)
    except ValueError:
        return
    assert pid >= 0
    assert token < 2**64


def test_a_walk_gives_way_and_still_sees_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs_worker, "SLICE_NS", 100_000)
    reactor = Reactor()
    slab: Slab[Any] = Slab(5000)
    tokens = [slab.insert(FakeSession()) for _ in range(2000)]
    seen: list[int] = []
    done: list[bool] = []

    def visit(token: int, session: Any, now: int) -> None:
        time.sleep(0.00001)
        seen.append(token)
        if token % 3 == 0:
            slab.remove(token)  # as a kill does

    Walk(reactor, iter(slab), visit, lambda: done.append(True)).go()
    turns = 0
    while not done:
        reactor.run_once(0)
        turns += 1
        assert turns < 10_000
    assert turns > 20, "it held the loop"
    assert seen == tokens
    reactor.close()


def test_forwarded_events_are_bounded_and_the_loss_is_told() -> None:
    sent: list[dict[str, Any]] = []
    forwarder = EventForwarder(lambda message: sent.append(message) or True, logging.INFO)  # type: ignore[func-returns-value]

    def emit(second: float, name: str) -> None:
        record = logging.makeLogRecord({"msg": name, "levelno": logging.INFO, "levelname": "INFO"})
        record.created = second
        forwarder.handle(record)

    for number in range(verbs_worker.EVENTS_PER_SECOND + 7):
        emit(10.0, f"e{number}")
    assert len(sent) == verbs_worker.EVENTS_PER_SECOND
    emit(11.0, "after")
    assert sent[-1]["event"]["event"] == "after"
    assert sent[-1]["event"]["lost_before"] == 7
    emit(11.1, "then")
    assert "lost_before" not in sent[-1]["event"]


def test_refusals_keep_the_last_with_what_is_around_the_offending_byte() -> None:
    ring = Refusals(3)
    data = b"GET / HTTP/1.1\r\nHost: a\r\n" + b"x" * 200 + b"\0" + b"y" * 200
    for number in range(5):
        error = RequestError(400, Fault.HEADER, "a NUL").blame(data, 225, base=1000)
        ring.note(error, listener="web", client=f"c{number}")
    assert ring.total == 5
    assert [one.client for one in ring.last(10)] == ["c4", "c3", "c2"]
    assert len(ring.last(2)) == 2
    said = ring.last(1)[0].describe()
    assert (said["position"], said["byte"], said["excerpt_starts"]) == (1225, 0, 1225 - AROUND)
    assert said["excerpt"] == "x" * AROUND + "\\x00" + "y" * AROUND
    assert (said["fault"], said["message"], said["side"]) == ("header", "a NUL", "client")
    start, end = said["mark"]
    assert said["excerpt"][start:end] == "\\x00"


@pytest.mark.parametrize("position", [-1, 0, 2, 3, 50])
def test_a_refusal_at_any_place_or_none(position: int) -> None:
    ring = Refusals()
    ring.note(RequestError(400, Fault.CUT, "m").blame(b"abc", position), listener="l", client="c")
    said = ring.last(1)[0].describe()
    known = 0 <= position < 3
    assert said["byte"] == (b"abc"[position] if known else None)
    assert said["mark"] == ([position, position + 1] if known else None)
    ring.note(RequestError(400, Fault.CUT, "m"), listener="l", client="c", side="backend")
    said = ring.last(1)[0].describe()
    assert (said["excerpt"], said["position"], said["mark"], said["side"]) == ("", -1, None, "backend")
