"""The event stream: log records of supervisor and workers, as JSON, to whoever watches."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from tidegate import logs
from tidegate.control.peer import EventStream
from tidegate.events import EventKind

_NAMES = frozenset(kind.value for kind in EventKind)


@dataclass(eq=False, slots=True)
class _Watcher:
    level: int
    names: frozenset[str]  # empty: all
    stream: EventStream | None = None


def event_name(value: object) -> str:
    """An argument that names an event. Raises ValueError for one that is not in the list."""
    if isinstance(value, str) and value in _NAMES:
        return value
    near = get_close_matches(str(value), _NAMES, 1)
    unknown = f"has an unknown event {str(value)[:60]!r}"
    raise ValueError(f"{unknown}; did you mean {near[0]}?" if near else unknown)


class EventHub(logging.Handler):
    """Passes records on to the streams; nothing is made while nobody watches."""

    def __init__(self, tell_workers: Callable[[int], None]) -> None:
        """`tell_workers(level)`: send us events from this level up; 0: none."""
        super().__init__()
        self.setFormatter(logs.JsonFormatter())
        self._tell_workers = tell_workers
        self._watchers: set[_Watcher] = set()

    @property
    def wanted(self) -> int:
        """The lowest level anybody watches; 0 for nobody."""
        return min((watcher.level for watcher in self._watchers), default=0)

    def watch(
        self, level: int, names: frozenset[str], open_stream: Callable[[Callable[[], None]], EventStream]
    ) -> None:
        """`open_stream(on_close)` answers the request; what it raises is the caller's."""
        watcher = _Watcher(level, names)
        watcher.stream = open_stream(lambda: self._forget(watcher))
        self._change(lambda: self._watchers.add(watcher))

    def emit(self, record: logging.LogRecord) -> None:
        self._pass_on(record.levelno, record.getMessage(), lambda: self.format(record))

    def from_worker(self, worker: int, message: dict[str, Any]) -> None:
        event = message.get("event")
        level = message.get("level")
        if isinstance(event, dict) and isinstance(level, int):
            text = json.dumps(event | {"worker_process": worker})
            self._pass_on(level, str(event.get("event")), lambda: text)

    def end(self) -> None:
        """Every stream: who watched is to watch the successor."""
        for watcher in list(self._watchers):
            assert watcher.stream is not None
            watcher.stream.end()

    def abandon(self) -> None:
        """In a forked child: what it logs is not ours to pass on."""
        logging.getLogger(logs.ROOT).removeHandler(self)
        self._watchers.clear()

    def _pass_on(self, level: int, name: str, text: Callable[[], str]) -> None:
        for watcher in list(self._watchers):
            if level >= watcher.level and (not watcher.names or name in watcher.names):
                assert watcher.stream is not None
                watcher.stream.send(text())

    def _forget(self, watcher: _Watcher) -> None:
        self._change(lambda: self._watchers.discard(watcher))

    def _change(self, change: Callable[[], None]) -> None:
        before = self.wanted
        change()
        after = self.wanted
        if after == before:
            return
        root = logging.getLogger(logs.ROOT)
        if not before:
            root.addHandler(self)
        elif not after:
            root.removeHandler(self)
        self._tell_workers(after)
