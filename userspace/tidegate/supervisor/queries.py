"""Asking workers: questions over their channels, answers with a deadline, never a wait.

A worker that hangs costs its part of the answer and a note. It is not asked again before it has answered, so
that its channel, through which reloads reach it too, does not fill up.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from tidegate.control.protocol import ErrorCode, VerbError
from tidegate.loop.reactor import Reactor
from tidegate.loop.timers import Timer
from tidegate.supervisor.channel import Channel

# Far below the 5 s that a client waits by default.
DEADLINE_NS: Final = 1_000_000_000
MAX_QUESTIONS: Final = 32
# An answer larger than this is none of ours.
MAX_ANSWER: Final = 64 << 20
_SEALED: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE


class Asked(Protocol):
    """What is needed of a worker."""

    index: int
    pid: int
    channel: Channel | None

    @property
    def running(self) -> bool: ...


@dataclass(slots=True)
class Answers:
    """What came within the deadline: by worker index, and why the others' parts are missing."""

    parts: dict[int, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class _Question:
    __slots__ = ("answers", "done", "timer", "waiting")

    def __init__(self, done: Callable[[Answers], None], timer: Timer) -> None:
        self.done = done
        self.timer = timer
        self.waiting: set[int] = set()  # worker indexes
        self.answers = Answers()


class Queries:
    """The supervisor's side. `on_message` and `on_death` tell it what became of its questions."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._questions: dict[int, _Question] = {}
        self._next = 1
        self._owed: dict[int, int] = {}  # worker index -> the overdue question it has not answered

    def ask(
        self,
        workers: Collection[Asked],
        what: str,
        args: dict[str, Any],
        done: Callable[[Answers], None],
        deadline_ns: int = DEADLINE_NS,
    ) -> None:
        """Call `done` once: when all have answered, died, or the deadline is over. Raises VerbError(busy)."""
        if len(self._questions) >= MAX_QUESTIONS:
            raise VerbError(ErrorCode.BUSY, f"{MAX_QUESTIONS} questions to the workers are under way")
        number, self._next = self._next, self._next + 1
        question = _Question(done, Timer(lambda now: self._on_deadline(number, deadline_ns)))
        notes = question.answers.notes
        expires = time.monotonic_ns() + deadline_ns
        message = {"type": "ask", "id": number, "what": what, "args": args, "expires_ns": expires}
        for worker in workers:
            if not worker.running or worker.channel is None:
                notes.append(f"worker {worker.index} does not run")
            elif worker.index in self._owed:
                notes.append(f"worker {worker.index} hangs: it has not answered an earlier question")
            elif worker.channel.send(message):
                question.waiting.add(worker.index)
            else:
                notes.append(f"worker {worker.index} hangs: it takes no messages")
        self._questions[number] = question
        if question.waiting:
            self._reactor.timers.arm(question.timer, expires)
        else:
            self._finish(number)

    def on_message(self, worker: int, message: dict[str, Any], fds: list[int]) -> None:
        """An answer; `fds` stay the caller's."""
        number = message.get("id")
        if not isinstance(number, int):
            return
        if self._owed.get(worker) == number:
            del self._owed[worker]
        question = self._questions.get(number)
        if question is None or worker not in question.waiting:
            return  # it came too late
        question.waiting.discard(worker)
        try:
            part = read_sealed(fds[0]) if fds else message["answer"]
            if not isinstance(part, dict):
                raise ValueError("not an object")
        except (OSError, ValueError, KeyError):
            question.answers.notes.append(f"worker {worker} gave an answer that cannot be read")
        else:
            question.answers.parts[worker] = part
        self._check(number, question)

    def on_death(self, worker: int) -> None:
        self._owed.pop(worker, None)
        for number, question in list(self._questions.items()):
            if worker in question.waiting:
                question.waiting.discard(worker)
                question.answers.notes.append(f"worker {worker} died before it answered")
                self._check(number, question)

    def _check(self, number: int, question: _Question) -> None:
        if not question.waiting:
            self._reactor.timers.cancel(question.timer)
            self._finish(number)

    def _on_deadline(self, number: int, deadline_ns: int) -> None:
        question = self._questions[number]
        for worker in sorted(question.waiting):
            self._owed.setdefault(worker, number)
            question.answers.notes.append(
                f"worker {worker} did not answer within {deadline_ns // 1_000_000} ms"
            )
        self._finish(number)

    def _finish(self, number: int) -> None:
        question = self._questions.pop(number)
        question.done(question.answers)


def to_sealed(text: str) -> int:
    """An fd that holds `text`, never to be changed again. For the worker. Raises OSError."""
    fd = os.memfd_create("tidegate-answer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        data = memoryview(text.encode())
        while data:
            data = data[os.write(fd, data) :]
        seals = _SEALED | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except OSError:
        os.close(fd)
        raise
    return fd


def read_sealed(fd: int) -> Any:
    """The JSON that `to_sealed` put there.

    The seals make sure that a worker gone bad cannot make a read block or fault: it is memory, and stays.

    Raises OSError and ValueError when it is anything else.
    """
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALED != _SEALED:
        raise ValueError("not sealed")
    size = os.fstat(fd).st_size
    if size > MAX_ANSWER:
        raise ValueError("too large")
    parts = []
    at = 0
    while at < size:
        part = os.pread(fd, size - at, at)
        if not part:
            break
        parts.append(part)
        at += len(part)
    return json.loads(b"".join(parts))
