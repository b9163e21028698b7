"""The tables of docs/http.md that say what becomes of misbehaviour, and a proxy to try them on."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.http_wire import HttpClient, ScriptedBackend, Wire
from harness.ports import free_port
from harness.proc import Tidegate
from harness.waiting import wait_until

DOC = Path(__file__).parents[2] / "docs" / "http.md"
Script = Callable[[Wire], None]


class Table:
    """One table: its first column says who does what, its last names the ends. And which rows were tried."""

    def __init__(self, heading: str) -> None:
        section = DOC.read_text().split(f"| {heading} |")[1].split("\n\n")[0]
        self.ends: dict[str, set[str]] = {}
        self.tried: set[str] = set()
        for line in section.splitlines()[2:]:
            what, _gets, ends = (cell.strip() for cell in line.strip("|").split("|"))
            self.ends[what] = set(re.findall(r"`(\w+)`", ends))

    def row(self, text: str) -> Any:
        """Marks the test of a row; the test gets its text as `row`."""
        assert text in self.ends, f"no such row in {DOC.name}: {text}"
        self.tried.add(text)
        name = text.split(",")[0].replace(" ", "-")
        return pytest.mark.parametrize("row", [pytest.param(text, id=name)])


class Site:
    """A proxy, a scripted backend that its clusters have between them, and the access log."""

    def __init__(
        self, table: Table, gate: Tidegate, backend: ScriptedBackend, log: Path, metrics: str
    ) -> None:
        self.gate = gate
        self.table = table
        self.backend = backend
        self._log = log
        self._metrics = metrics
        self._read = 0

    def script(self, script: Script) -> None:
        """What the backend does from now on; its idle connections are gone, and the proxy knows it."""
        self.backend.script = script
        wires, self.backend.wires = self.backend.wires, []
        for wire in wires:
            with contextlib.suppress(OSError):
                wire.sock.shutdown(socket.SHUT_RDWR)
            wait_until(lambda wire=wire: wire.sock.fileno() == -1, 5, "the old connections' end")

    def client(self, listener: str = "plain") -> HttpClient:
        return HttpClient(self.gate.port(listener))

    def lines(self, count: int) -> list[dict[str, Any]]:
        """The next lines of the access log."""
        wait_until(lambda: len(self._all()) >= self._read + count, 5, "the log's lines")
        found = self._all()[self._read :]
        assert len(found) == count, found
        self._read += count
        return [json.loads(line) for line in found]

    def failures(self) -> tuple[Counter[str], Counter[str]]:
        """Requests that did not end well, by reason: as the log has them, and as the metrics do."""
        logged = Counter(json.loads(line)["end"].partition(":")[0] for line in self._all())
        del logged["done"]
        counted: Counter[str] = Counter()
        with urllib.request.urlopen(f"http://{self._metrics}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        for reason, count in re.findall(
            r'^tidegate_request_failures_total\{.*reason="(\w+)".*\} (\d+)', text, re.MULTILINE
        ):
            counted[reason] += int(count)
        return logged, +counted

    def _all(self) -> list[str]:
        return self._log.read_text().splitlines() if self._log.exists() else []

    def ended(self, row: str, end: str) -> dict[str, Any]:
        """The next request's line; it must have ended so, and the table must say so of the row."""
        (line,) = self.lines(1)
        assert line["end"].partition(":")[0] == end
        assert end in self.table.ends[row]
        return line


@contextlib.contextmanager
def running(
    table: Table,
    clusters: dict[str, dict[str, Any]],
    backend: ScriptedBackend,
    listeners: dict[str, dict[str, Any]] | None = None,
) -> Iterator[Site]:
    """A proxy with these clusters, a listener of the same name for each, and settings for some of these."""
    config: dict[str, Any] = {"workers": 1, "drain_timeout": "2s", "cluster": clusters}
    config["metrics"] = f"127.0.0.1:{free_port()}"
    gate = Tidegate(config)
    log = gate.directory / "access.log"
    config["listener"] = [
        {
            "name": name,
            "address": f"127.0.0.1:{free_port()}",
            "protocol": "http",
            "cluster": name,
            "access_log": {"path": str(log), "format": "json"},
            **(listeners or {}).get(name, {}),
        }
        for name in clusters
    ]
    with gate:
        yield Site(table, gate, backend, log, config["metrics"])
