"""The open-loop client in a process of its own, so that what the test does meanwhile cannot delay it."""

from __future__ import annotations

import json
import select
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from harness.plan import Plan, Result
from harness.processes import Child, python, python_env


class Client:
    """`with Client(plan) as client: client.go(); ...; result = client.result()`."""

    def __init__(self, plan: Plan, *, cpus: tuple[int, ...] = ()) -> None:
        self.plan = plan
        self._cpus = cpus
        self._directory = tempfile.TemporaryDirectory(prefix="tg-client-")
        self._child: Child | None = None

    def __enter__(self) -> Self:
        self._child = Child(
            [python(), "-m", "harness.open_loop"],
            Path(self._directory.name) / "log",
            env=python_env(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cpus=self._cpus,
        )
        self._say(json.dumps(self.plan.to_json()))
        self._read()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        if self._child is not None:
            self._child.kill()
        self._directory.cleanup()

    def go(self) -> Self:
        """Starts the schedule now."""
        self._say("go")
        return self

    def result(self, timeout_s: float = 60.0) -> Result:
        """Waits for the end of the plan.

        Raises:
            AssertionError: it did not come in time; clients without patience wait for ever.
        """
        assert self._child is not None and self._child.process.stdout is not None
        ready, _, _ = select.select([self._child.process.stdout], [], [], timeout_s)
        assert ready, f"the clients were still waiting after {timeout_s:g} s"
        return Result.from_json(json.loads(self._read()))

    def _say(self, line: str) -> None:
        assert self._child is not None and self._child.process.stdin is not None
        self._child.process.stdin.write(line.encode() + b"\n")
        self._child.process.stdin.flush()

    def _read(self) -> str:
        assert self._child is not None and self._child.process.stdout is not None
        line = self._child.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the client died: {self._child.output()}")
        return line.decode()


def run(plan: Plan) -> Result:
    """A plan from start to end."""
    with Client(plan) as client:
        return client.go().result()
