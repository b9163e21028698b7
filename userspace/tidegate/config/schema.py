"""What a configuration may hold, as tables of keys.

A Table lists the Keys that may stand in one kind of TOML table; each Key has a Kind, which reads a value,
and a default. The same tables make the reference documentation, the hints for misspelt and misplaced keys,
and what a reload can change.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path as FilePath
from typing import Any, Final

from tidegate.config.errors import ConfigError, Path, show_path, show_value
from tidegate.config.lines import Lines
from tidegate.config.model import Protocol

HTTP: Final = frozenset({Protocol.HTTP, Protocol.HTTPS})
HTTPS: Final = frozenset({Protocol.HTTPS})
ALL: Final = frozenset(Protocol)


class Marker(StrEnum):
    """What stands in the place of a value."""

    REQUIRED = "required"
    FAILED = "failed"


REQUIRED: Final = Marker.REQUIRED
FAILED: Final = Marker.FAILED


class Reload(StrEnum):
    """What a change of the key takes on reload."""

    LIVE = "live"  # from the next connection, session or timer tick on
    SOCKET = "socket"  # a new listening socket
    RESTART = "restart"  # the process as a whole


@dataclass(slots=True)
class Reading:
    """One file being read: where errors are collected."""

    source: str
    base: FilePath  # relative paths in the file start here
    lines: Lines
    errors: list[ConfigError] = field(default_factory=list)

    def error(self, path: Path, message: str, fix: str = "") -> None:
        self.errors.append(ConfigError(self.source, self.lines.at(path), show_path(path), message, fix))


@dataclass(frozen=True, slots=True)
class Spot:
    """A place in the document, and the tables around it, outermost first."""

    reading: Reading
    path: Path = ()
    tables: tuple[Table, ...] = ()

    def at(self, *more: str | int) -> Spot:
        return Spot(self.reading, self.path + more, self.tables)

    def inside(self, table: Table) -> Spot:
        return Spot(self.reading, self.path, (*self.tables, table))

    def error(self, message: str, fix: str = "") -> None:
        self.reading.error(self.path, message, fix)

    @property
    def name(self) -> str:
        """The key as the operator knows it: `backends[1]` of cluster.app.backends[1]."""
        for start in range(len(self.path) - 1, -1, -1):
            if isinstance(self.path[start], str):
                return show_path(self.path[start:])
        return show_path(self.path)


class Kind:
    """How the value of a key is read, shown and described."""

    @property
    def label(self) -> str:
        """What the reference calls it, in Markdown."""
        raise NotImplementedError

    def read(self, value: object, spot: Spot) -> Any:
        """The checked value. Raises BadValueError, or reports errors further inside and answers FAILED."""
        raise NotImplementedError

    def show(self, value: Any) -> str:
        """A value of this kind as the operator would write it."""
        return show_value(value)

    @property
    def tables(self) -> list[Table]:
        """The tables that a value of this kind is made of."""
        return []


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a table."""

    name: str
    kind: Kind
    default: object
    doc: str
    field: str = ""  # the attribute of the model, when it is not the name
    only: frozenset[Protocol] = ALL  # listeners of these protocols
    reload: Reload = Reload.LIVE
    shown: str = ""  # the default in words, where it is not one value

    @property
    def attribute(self) -> str:
        return self.field or self.name

    @property
    def default_text(self) -> str:
        """The default as the reference shows it."""
        if self.shown:
            return self.shown
        if self.default is REQUIRED:
            return "required"
        shown = self.kind.show(self.default)
        return shown if shown in {"none", "not set", "the defaults of its keys"} else f"`{shown}`"


@dataclass(frozen=True, slots=True)
class Table:
    """The keys of one kind of TOML table."""

    title: str  # as the operator writes it: "[[listener]]"; "" is the top of the file
    doc: str
    keys: tuple[Key, ...]

    def key(self, name: str) -> Key | None:
        return next((key for key in self.keys if key.name == name), None)

    @property
    def names(self) -> list[str]:
        return [key.name for key in self.keys]

    @property
    def place(self) -> str:
        """Where its keys stand, after "is a key" or "unknown key"."""
        return f"in {self.title}" if self.title else "at the top of the file"


@dataclass(slots=True)
class Section:
    """One table as read: a value for every key, which of them were written, which could not be read."""

    table: Table
    spot: Spot
    values: dict[str, Any] = field(default_factory=dict)
    written: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)

    @property
    def ok(self) -> bool:
        return not self.failed

    def has(self, name: str) -> bool:
        """Written, and well."""
        return name in self.written and name not in self.failed

    def get(self, name: str) -> Any:
        """The value, the default included; None for what could not be read."""
        value = self.values[name]
        return None if value is FAILED else value

    def default(self, name: str) -> object:
        key = self.table.key(name)
        return key.default if key else None

    def attributes(self) -> dict[str, Any]:
        return {key.attribute: self.values[key.name] for key in self.table.keys}

    def error(self, name: str, message: str, fix: str = "") -> None:
        """Report at that key, or at the table's head when it was not written; once per key."""
        if name in self.failed:
            return
        (self.spot.at(name) if name in self.written else self.spot).error(message, fix)
        self.failed.add(name)


def all_tables(root: Table) -> list[Table]:
    """The table and every one inside it, in the order in which they are documented, each once."""
    found = [root]
    for key in root.keys:
        for sub in key.kind.tables:
            found += [table for table in all_tables(sub) if table not in found]
    return found
