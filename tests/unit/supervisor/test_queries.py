"""Asking workers: every question is answered once, by its deadline, whatever the workers do."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tidegate.control.protocol import ErrorCode, VerbError
from tidegate.loop.reactor import Reactor
from tidegate.supervisor import queries
from tidegate.supervisor.channel import Channel
from tidegate.supervisor.queries import Answers, Queries, read_sealed, to_sealed

DEADLINE_NS = 20_000_000


@dataclass
class FakeWorker:
    index: int
    pid: int = 1
    channel: Channel | None = None
    theirs: Channel = field(init=False)

    def __post_init__(self) -> None:
        self.channel, self.theirs = Channel.pair()

    @property
    def running(self) -> bool:
        return self.pid != 0

    def asked(self) -> dict[str, Any] | None:
        received = self.theirs.receive()
        return None if received is None else received[0]


class Bench:
    def __init__(self) -> None:
        self.reactor = Reactor()
        self.queries = Queries(self.reactor)
        self.workers = [FakeWorker(0), FakeWorker(1)]
        self.got: list[Answers] = []

    def ask(self, what: str = "sessions") -> None:
        self.queries.ask(self.workers, what, {"limit": 1}, self.got.append, DEADLINE_NS)

    def answer(self, worker: int, number: int, answer: Any = None, fd: int = -1) -> None:
        fds = [fd] if fd >= 0 else []
        self.queries.on_message(worker, {"type": "answer", "id": number, "answer": answer}, fds)

    def wait(self) -> None:
        deadline = time.monotonic() + 5
        while not self.got and time.monotonic() < deadline:
            self.reactor.run_once(5_000_000)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    for worker in bench.workers:
        if worker.channel is not None:
            worker.channel.close()
        worker.theirs.close()
    bench.reactor.close()


def test_all_answer(bench: Bench) -> None:
    before = time.monotonic_ns()
    bench.ask()
    for worker in bench.workers:
        question = worker.asked()
        assert question is not None
        assert (question["type"], question["what"], question["args"]) == ("ask", "sessions", {"limit": 1})
        assert before + DEADLINE_NS <= question["expires_ns"] <= time.monotonic_ns() + DEADLINE_NS
    bench.answer(0, 1, {"a": 0})
    assert not bench.got
    fd = to_sealed('{"a": 1}')
    bench.answer(1, 1, fd=fd)
    os.close(fd)
    (answers,) = bench.got
    assert answers.parts == {0: {"a": 0}, 1: {"a": 1}}
    assert answers.notes == []
    assert len(bench.reactor.timers) == 0


def test_the_deadline_answers_for_who_is_silent_and_he_is_asked_no_more(bench: Bench) -> None:
    bench.ask()
    bench.answer(1, 1, {"a": 1})
    bench.wait()
    assert bench.got[0].parts == {1: {"a": 1}}
    assert bench.got[0].notes == ["worker 0 did not answer within 20 ms"]
    assert bench.workers[0].asked() is not None

    bench.ask()
    assert bench.workers[0].asked() is None, "its channel is not filled up"
    bench.answer(1, 2, {"a": 2})
    assert bench.got[1].notes == ["worker 0 hangs: it has not answered an earlier question"]

    bench.answer(0, 1, {"late": True})
    assert len(bench.got) == 2, "a late answer is nobody's"
    bench.ask()
    assert bench.workers[0].asked() is not None, "but shows that it is back"
    bench.answer(0, 3, {})
    bench.answer(1, 3, {})
    assert bench.got[2].notes == []


def test_death_and_absence_are_noted(bench: Bench) -> None:
    bench.ask()
    bench.answer(1, 1, {})
    bench.queries.on_death(0)
    assert bench.got[0].notes == ["worker 0 died before it answered"]
    bench.workers[0].pid = 0
    bench.ask()
    bench.answer(1, 2, {})
    assert bench.got[1].notes == ["worker 0 does not run"]
    bench.workers[1].pid = 0
    bench.ask()
    assert bench.got[2].notes == ["worker 0 does not run", "worker 1 does not run"]


def test_a_replacement_owes_nothing(bench: Bench) -> None:
    bench.ask()
    bench.answer(1, 1, {})
    bench.wait()
    bench.queries.on_death(0)
    bench.ask()
    bench.answer(0, 2, {})
    bench.answer(1, 2, {})
    assert bench.got[1].notes == []


def test_a_channel_that_is_full_is_noted(bench: Bench) -> None:
    channel = bench.workers[0].channel
    assert channel is not None
    while channel.send({"padding": "x" * 4000}):
        pass
    bench.ask()
    bench.answer(1, 1, {})
    assert bench.got[0].notes == ["worker 0 hangs: it takes no messages"]


@pytest.mark.parametrize("answer", [None, 3, [], "x"])
def test_a_strange_answer_is_noted_and_ends_the_wait(bench: Bench, answer: object) -> None:
    bench.ask()
    bench.answer(0, 1, answer)
    bench.answer(1, 1, {})
    assert bench.got[0].parts == {1: {}}
    assert bench.got[0].notes == ["worker 0 gave an answer that cannot be read"]


def test_an_answer_counts_once_and_only_from_who_was_asked(bench: Bench) -> None:
    bench.ask()
    bench.answer(0, 1, {"a": 0})
    bench.answer(0, 1, {"a": 9})
    bench.answer(7, 1, {"a": 7})
    bench.answer(0, 99, {})
    bench.queries.on_message(0, {"type": "answer"}, [])
    bench.queries.on_message(0, {"type": "answer", "id": [1]}, [])
    assert not bench.got
    bench.answer(1, 1, {"a": 1})
    assert bench.got[0].parts == {0: {"a": 0}, 1: {"a": 1}}


def test_so_many_questions_and_no_more(bench: Bench) -> None:
    for _ in range(queries.MAX_QUESTIONS):
        bench.ask()
    with pytest.raises(VerbError) as refused:
        bench.ask()
    assert refused.value.code is ErrorCode.BUSY


def test_only_sealed_memory_is_read() -> None:
    fd = to_sealed(json.dumps({"x": ["y"] * 1000}))
    assert read_sealed(fd) == {"x": ["y"] * 1000}
    with pytest.raises(PermissionError):
        os.write(fd, b"more")
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 1)
    os.close(fd)
    pipe, other = os.pipe()
    with pytest.raises(OSError, match="Invalid argument"):
        read_sealed(pipe)  # a worker gone bad could make the supervisor wait for ever
    os.close(pipe)
    os.close(other)
    plain = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.write(plain, b"{}")
    with pytest.raises(ValueError, match="not sealed"):
        read_sealed(plain)
    os.close(plain)


def test_what_is_too_large_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    fd = to_sealed(json.dumps({"x": "y" * 1000}))
    monkeypatch.setattr(queries, "MAX_ANSWER", 500)
    with pytest.raises(ValueError, match="too large"):
        read_sealed(fd)
    os.close(fd)
