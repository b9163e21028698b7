"""tidegate among its peers: the same interface as `harness.peers`."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from harness.proc import Table, Tidegate, tcp_config
from harness.processes import ROOT


class Gate:
    """tidegate before one backend, TCP unless `listener` says otherwise."""

    def __init__(
        self,
        backend: str,
        *,
        workers: int = 1,
        name: str = "tidegate",
        top: Table | None = None,
        cluster: Table | None = None,
        cpus: Sequence[int] = (),
        source: Path | None = None,
        **listener: Any,
    ) -> None:
        self.name = name
        config = tcp_config([backend], workers=workers, top=top, cluster=cluster, **listener)
        # another build of the package, first on the path
        paths = [source, ROOT / "tools", ROOT / "tests"]
        env = {"PYTHONPATH": os.pathsep.join(map(str, paths))} if source else None
        self.gate = Tidegate(config, cpus=cpus, env=env)
        self.host = "127.0.0.1"
        self._pids: list[int] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(self.gate)
        self._pids = self.gate.worker_pids()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self._stack.__exit__(kind, error, trace)

    def reload(self) -> None:
        """SIGHUP: the same workers read the configuration again."""
        self.gate.child.signal(signal.SIGHUP)

    @property
    def port(self) -> int:
        return self.gate.port()

    @property
    def address(self) -> str:
        return self.gate.address()

    @property
    def pids(self) -> list[int]:
        """The workers."""
        return self._pids
