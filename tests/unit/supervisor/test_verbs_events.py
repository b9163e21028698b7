"""The event hub: nothing is made while nobody watches, and each gets what he asked for."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest

from tidegate import logs
from tidegate.control.protocol import ErrorCode, VerbError
from tidegate.supervisor.verbs_events import EventHub

ROOT = logging.getLogger(logs.ROOT)


class FakeStream:
    def __init__(self, on_close: Callable[[], None]) -> None:
        self.on_close = on_close
        self.sent: list[dict[str, Any]] = []

    def send(self, event: str) -> None:
        self.sent.append(json.loads(event))

    @property
    def names(self) -> list[str]:
        return [event["event"] for event in self.sent]


class Bench:
    def __init__(self) -> None:
        self.told: list[int] = []
        self.hub = EventHub(self.told.append)

    def watch(self, level: int, *names: str) -> FakeStream:
        opened: list[FakeStream] = []

        def open_stream(on_close: Callable[[], None]) -> Any:
            opened.append(FakeStream(on_close))
            return opened[0]

        self.hub.watch(level, frozenset(names), open_stream)
        return opened[0]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(ROOT, "level", logging.DEBUG)
    return Bench()


def test_each_gets_his_level_and_names(bench: Bench) -> None:
    all_of_it, some, bad = (
        bench.watch(logging.DEBUG),
        bench.watch(logging.INFO, "b"),
        bench.watch(logging.ERROR),
    )
    log = logging.getLogger("tidegate.test")
    logs.event(log, logging.INFO, "a", x=1)
    logs.event(log, logging.ERROR, "b", client="\x1b[2J")
    logs.event(log, logging.DEBUG, "b")
    assert all_of_it.names == ["a", "b", "b"]
    assert all_of_it.sent[0]["x"] == 1
    assert some.names == ["b"]
    assert bad.names == ["b"]
    for stream in (all_of_it, some, bad):
        stream.on_close()


def test_workers_are_told_what_is_wanted_and_only_when_it_changes(bench: Bench) -> None:
    assert bench.hub not in ROOT.handlers
    info = bench.watch(logging.INFO)
    error = bench.watch(logging.ERROR)
    debug = bench.watch(logging.DEBUG)
    assert bench.hub in ROOT.handlers
    debug.on_close()
    info.on_close()
    error.on_close()
    assert bench.told == [logging.INFO, logging.DEBUG, logging.INFO, logging.ERROR, 0]
    assert bench.hub not in ROOT.handlers


def test_a_stream_that_is_not_opened_is_not_watched(bench: Bench) -> None:
    def full(on_close: Callable[[], None]) -> Any:
        raise VerbError(ErrorCode.BUSY, "full")

    with pytest.raises(VerbError):
        bench.hub.watch(logging.INFO, frozenset(), full)
    assert bench.told == []
    assert bench.hub not in ROOT.handlers


def test_events_of_workers_say_whose_they_are(bench: Bench) -> None:
    stream = bench.watch(logging.WARNING)
    bench.hub.from_worker(3, {"type": "event", "level": logging.ERROR, "event": {"event": "bad"}})
    bench.hub.from_worker(3, {"type": "event", "level": logging.INFO, "event": {"event": "fine"}})
    bench.hub.from_worker(3, {"type": "event", "level": "x", "event": []})
    assert stream.sent == [{"event": "bad", "worker_process": 3}]
    stream.on_close()


def test_a_forked_child_passes_nothing_on(bench: Bench) -> None:
    stream = bench.watch(logging.DEBUG)
    bench.hub.abandon()
    logs.event(logging.getLogger("tidegate.test"), logging.ERROR, "b")
    assert stream.sent == []
