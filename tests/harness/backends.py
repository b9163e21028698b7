"""Real backends in processes of their own.

Each is a context manager with an `address` as a tidegate configuration writes it; `stats()` asks the
process what it saw. `harness.backend_main` has the kinds and what they do.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from harness import native
from harness.processes import Child, python, python_env


@dataclass(frozen=True, slots=True)
class Seen:
    """One request that a backend was given."""

    line: str
    accepted_ns: int
    seen_ns: int


class Backend:
    """A running backend of `kind`; options go to `harness.backend_main`."""

    def __init__(self, kind: str, **options: Any) -> None:
        self._kind = kind
        self._options = options
        self._child: Child | None = None
        self._directory = tempfile.TemporaryDirectory(prefix="tg-backend-")
        self.address = ""

    def __enter__(self) -> Self:
        self._child = Child(
            [python(), "-m", "harness.backend_main", self._kind, json.dumps(self._options)],
            Path(self._directory.name) / "log",
            env=python_env(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.address = self._read()["address"]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self.child.kill()
        self._directory.cleanup()

    @property
    def child(self) -> Child:
        if self._child is None:
            raise RuntimeError("the backend was not started")
        return self._child

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def kill(self) -> None:
        """Dies as by kill -9: the kernel resets or ends its connections."""
        self.child.kill()

    def ask(self, command: str) -> dict[str, Any]:
        """One command, one answer.

        Raises:
            RuntimeError: the backend is dead; the message has its log.
        """
        assert self.child.process.stdin is not None
        self.child.process.stdin.write(command.encode() + b"\n")
        self.child.process.stdin.flush()
        return self._read()

    def stats(self) -> dict[str, Any]:
        return self.ask("stats")

    def seen(self) -> list[Seen]:
        """Requests recorded so far (kinds counting and slow)."""
        return [Seen(*record) for record in self.stats()["records"]]

    def _read(self) -> dict[str, Any]:
        assert self.child.process.stdout is not None
        line = self.child.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {self._kind} backend died: {self.child.output()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class NativeBackend:
    """The C server for loads, faster than any proxy in front of it.

    `mode` is echo, http, source or discard; see src/load_server.c.
    """

    def __init__(self, mode: str, *, body: int = 128, pace: int = 0, cpus: tuple[int, ...] = ()) -> None:
        """`body`: the length of an HTTP answer's body, bytes; `pace`: the most a source sends on each
        connection, bytes/s, 0 without a limit.
        """
        self._mode = mode
        self._argument = pace if mode == "source" else body
        self._cpus = cpus
        self._child: Child | None = None
        self._directory = tempfile.TemporaryDirectory(prefix="tg-backend-")
        self.address = ""

    def __enter__(self) -> Self:
        program = native.build("load_server")
        self._child = Child(
            [str(program), self._mode, str(self._argument)],
            Path(self._directory.name) / "log",
            stdout=subprocess.PIPE,
            cpus=self._cpus,
        )
        assert self._child.process.stdout is not None
        self.address = f"127.0.0.1:{int(self._child.process.stdout.readline())}"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        if self._child is not None:
            self._child.kill()
        self._directory.cleanup()

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])
