"""Reading whole tables, and the kinds of values that are tables.

Nothing here stops at the first error: a key that failed is marked, and checks across keys leave it alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tidegate.config import hints
from tidegate.config.errors import BadValueError, show_value
from tidegate.config.schema import FAILED, REQUIRED, Kind, Section, Spot, Table


@dataclass(frozen=True, slots=True)
class Sub(Kind):
    """A table inside a table: `check` looks across its keys, `build` makes the object when all is good.

    `check` also runs when some keys could not be read, so that one error does not hide another.
    """

    table: Table
    build: Callable[[Section], Any]
    example: str = ""
    check: Callable[[Section], None] = lambda _section: None
    off: bool = False  # "off" is another way not to write it
    off_value: object = None

    @property
    def label(self) -> str:
        return 'table or `"off"`' if self.off else "table"

    @property
    def tables(self) -> list[Table]:
        return [self.table]

    def read(self, value: object, spot: Spot) -> Any:
        if self.off and value == "off":
            return self.off_value
        if not isinstance(value, dict):
            raise BadValueError(
                "a table is needed here", write=self.example or f"{{ {self.table.names[0]} = ... }}"
            )
        section = read_table(self.table, value, spot)
        self.check(section)
        return self.build(section) if section.ok else FAILED

    def show(self, value: Any) -> str:
        if value == self.off_value:
            return '"off"' if self.off else "not set"
        return "the defaults of its keys"


@dataclass(frozen=True, slots=True)
class Many(Kind):
    """An array of tables, [[...]]."""

    sub: Sub

    @property
    def label(self) -> str:
        return f"tables `{self.sub.table.title}`"

    @property
    def tables(self) -> list[Table]:
        return [self.sub.table]

    def read(self, value: object, spot: Spot) -> Any:
        title = self.sub.table.title
        if isinstance(value, dict):
            raise BadValueError(
                "there may be several of them, so it takes double brackets", fix=f"write {title}"
            )
        if not isinstance(value, list):
            raise BadValueError(
                "a table is needed here", fix=f"write {title} on a line of its own, its keys below"
            )
        return read_all([(spot.at(index), self.sub, item) for index, item in enumerate(value)])

    def show(self, value: Any) -> str:
        return "none"


@dataclass(frozen=True, slots=True)
class Named(Kind):
    """Tables with names of the operator's own, [cluster.NAME]. `build` finds the name in the spot's path."""

    sub: Sub
    name_error: Callable[[str], str]

    @property
    def label(self) -> str:
        return f"tables `{self.sub.table.title}`"

    @property
    def tables(self) -> list[Table]:
        return [self.sub.table]

    def read(self, value: object, spot: Spot) -> Any:
        title = self.sub.table.title
        if not isinstance(value, dict):
            raise BadValueError("each one has a name", fix=f"write {title}, NAME being yours to choose")
        if value and not any(isinstance(item, dict) for item in value.values()):
            raise BadValueError("the name is missing", fix=f"write {title}, NAME being yours to choose")
        for name in value:
            if wrong := self.name_error(name):
                spot.at(name).error(f"the name {show_value(name)} {wrong}", "write letters, digits and . _ -")
        return read_all([(spot.at(name), self.sub, item) for name, item in value.items()])

    def show(self, value: Any) -> str:
        return "none"


def read_all(items: list[tuple[Spot, Kind, object]]) -> Any:
    """A tuple of all that could be read, or FAILED when one could not: its error is reported then."""
    values = [read_value(kind, item, spot) for spot, kind, item in items]
    return FAILED if any(value is FAILED for value in values) else tuple(values)


def read_value(kind: Kind, value: object, spot: Spot) -> Any:
    """Read one value; what is wrong with it is reported at its place and answered with FAILED."""
    try:
        return kind.read(value, spot)
    except BadValueError as bad:
        fix = bad.fix or (f"write {spot.name} = {bad.write}" if bad.write else "")
        if isinstance(spot.path[-1], int) and bad.write:
            fix = f"write {bad.write}"
        shown = f"{spot.name} = {show_value(value)}" if not isinstance(value, dict) else spot.name
        spot.error(f"{shown}: {bad.message}", fix)
        return FAILED


def read_table(table: Table, raw: dict[str, object], spot: Spot) -> Section:
    """Read the keys of one table, reporting unknown and missing ones."""
    here = spot.inside(table)
    section = Section(table, here)
    for name in raw:
        if table.key(name) is None:
            section.failed.add(name)
            here.at(name).error(*hints.unknown(name, table, here))
    for key in table.keys:
        if key.name in raw:
            section.written.add(key.name)
            section.values[key.name] = read_value(key.kind, raw[key.name], here.at(key.name))
        elif key.default is REQUIRED:
            section.values[key.name] = FAILED
            here.error(
                f"{key.name} is missing {table.place}", f"write {key.name} = {key.kind.show(REQUIRED)}"
            )
        else:
            section.values[key.name] = key.default
        if section.values[key.name] is FAILED:
            section.failed.add(key.name)
    return section
