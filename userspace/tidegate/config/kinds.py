"""Kinds of single values: words, numbers, durations, sizes, addresses, networks, files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Final

from tidegate.config import defaults, units
from tidegate.config.composite import read_all
from tidegate.config.errors import BadValueError, quoted, show_value
from tidegate.config.schema import REQUIRED, Kind, Spot, Table

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


def name_error(name: str) -> str:
    """What is wrong with the name of a cluster, a cgroup, ...; "" when nothing is."""
    if _NAME.fullmatch(name):
        return ""
    if not name:
        return "is empty"
    return (
        "is longer than 64 characters"
        if len(name) > 64
        else "has characters other than letters, digits, . _ -"
    )


def text_of(value: object, what: str = "a string", example: str = "") -> str:
    """The value as text, refusing other types and control characters that no key has a use for."""
    if not isinstance(value, str):
        raise BadValueError(f"{what} is needed, in quotes", write=example)
    if "\0" in value:
        raise BadValueError("has a NUL character")
    return value


@dataclass(frozen=True, slots=True)
class Text(Kind):
    """A string; `check` says what is wrong with it, "" for nothing; `words` are read as other values."""

    what: str = "string"
    example: str = '"..."'
    check: Callable[[str], str] = lambda _text: ""
    words: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        return " or ".join([self.what, *(f'`"{word}"`' for word, _ in self.words)])

    def read(self, value: object, spot: Spot) -> Any:
        text = text_of(value, example=self.example)
        for word, meaning in self.words:
            if text == word:
                return meaning
        if wrong := self.check(text):
            raise BadValueError(wrong, write=self.example)
        return text

    def show(self, value: Any) -> str:
        if value is REQUIRED:
            return self.example
        return next((f'"{word}"' for word, meaning in self.words if meaning == value), Kind.show(self, value))


@dataclass(frozen=True, slots=True)
class Flag(Kind):
    """true or false."""

    @property
    def label(self) -> str:
        return "`true` or `false`"

    def read(self, value: object, spot: Spot) -> Any:
        if isinstance(value, bool):
            return value
        guess = "true" if str(value).lower() in {"true", "yes", "on", "1"} else "false"
        raise BadValueError("true or false is needed, without quotes", write=guess)


@dataclass(frozen=True, slots=True)
class Number(Kind):
    """A whole number within bounds, or one of `words` that stand for other values."""

    low: int
    high: int
    words: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        return " or ".join([f"number, {self.low} to {self.high}", *(f'`"{word}"`' for word, _ in self.words)])

    def read(self, value: object, spot: Spot) -> Any:
        for word, meaning in self.words:
            if value == word:
                return meaning
        if isinstance(value, bool) or not isinstance(value, int):
            words = "".join(f' or "{word}"' for word, _ in self.words)
            if isinstance(value, str) and value.isascii() and value.isdigit():
                raise BadValueError("a number has no quotes", write=str(self._nearest(int(value[:18]))))
            raise BadValueError(
                f"a whole number from {self.low} to {self.high}{words} is needed",
                write=f'"{self.words[0][0]}"' if self.words else str(max(self.low, 1)),
            )
        if not self.low <= value <= self.high:
            raise BadValueError(f"is not between {self.low} and {self.high}", write=str(self._nearest(value)))
        return value

    def show(self, value: Any) -> str:
        if value is REQUIRED:
            return str(self.low)
        return next((f'"{word}"' for word, meaning in self.words if meaning == value), str(value))

    def _nearest(self, value: int) -> int:
        return min(max(value, self.low), self.high)


@dataclass(frozen=True, slots=True)
class Choice(Kind):
    """One of a few words."""

    words: tuple[str, ...]
    enum: type[StrEnum] | None = None

    @classmethod
    def of(cls, enum: type[StrEnum], *without: StrEnum) -> Choice:
        return cls(tuple(word.value for word in enum if word not in without), enum)

    @property
    def label(self) -> str:
        return ", ".join(f'`"{word}"`' for word in self.words)

    def read(self, value: object, spot: Spot) -> Any:
        words = ", ".join(f'"{word}"' for word in self.words)
        if not isinstance(value, str):
            bare = str(value).lower()
            guess = {"true": "on", "false": "off"}.get(bare, bare)
            raise BadValueError(
                f"one of {words} is needed, in quotes",
                write=f'"{guess if guess in self.words else self.words[0]}"',
            )
        if value in self.words:
            return self.enum(value) if self.enum else value
        near = get_close_matches(value.lower().replace("-", "_"), self.words, 1, 0.5)
        raise BadValueError(f"is not one of {words}", write=f'"{near[0] if near else self.words[0]}"')

    def show(self, value: Any) -> str:
        return f'"{self.words[0] if value is REQUIRED else value}"'


@dataclass(frozen=True, slots=True)
class Duration(Kind):
    """Nanoseconds, written with a unit. With `off`, "off" is None; with `zero`, 0 is meant."""

    off: bool = False
    zero: bool = False

    @property
    def label(self) -> str:
        return 'duration or `"off"`' if self.off else "duration"

    def read(self, value: object, spot: Spot) -> Any:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if value == 0 and self.zero:
                return 0
            raise BadValueError(
                "a duration needs a unit",
                fix=f'write {spot.name} = "{value}s" for seconds, "{value}ms" for milliseconds',
            )
        text = text_of(value, "a duration", '"10s"')
        if text == "off":
            if self.off:
                return None
            raise BadValueError('cannot be "off"', fix="write a long duration instead")
        ns = units.parse_duration(text)
        if ns == 0 and self.zero:
            return 0
        if ns < defaults.MIN_DURATION_NS:
            shortest = units.format_duration(defaults.MIN_DURATION_NS)
            off = ' or "off"' if self.off else ""
            raise BadValueError(
                f"is shorter than {shortest}, the timer's tick", fix=f'write "{shortest}" or longer{off}'
            )
        if ns > defaults.MAX_DURATION_NS:
            raise BadValueError(
                "is longer than a year", write=f'"{units.format_duration(defaults.MAX_DURATION_NS)}"'
            )
        return ns

    def show(self, value: Any) -> str:
        if value is REQUIRED:
            return '"10s"'
        return '"off"' if value is None else f'"{units.format_duration(value)}"'


@dataclass(frozen=True, slots=True)
class Size(Kind):
    """Bytes, written with a unit."""

    low: int = 1
    high: int = defaults.MAX_SIZE

    @property
    def label(self) -> str:
        return "size"

    def read(self, value: object, spot: Spot) -> Any:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value != 0:
            raise BadValueError(
                "a size needs a unit",
                fix=f'write {spot.name} = "{value}KiB" for 1024-byte kilobytes, "{value}B" for bytes',
            )
        size = 0 if value == 0 else units.parse_size(text_of(value, "a size", '"256KiB"'))
        if size < self.low:
            raise BadValueError("is too small", write=f'"{units.format_size(self.low)}"')
        if size > self.high:
            raise BadValueError("is too large", write=f'"{units.format_size(self.high)}"')
        return size

    def show(self, value: Any) -> str:
        return '"256KiB"' if value is REQUIRED else f'"{units.format_size(value)}"'


@dataclass(frozen=True, slots=True)
class SocketAddress(Kind):
    """An IP address and a port; a backend may also be a host name and a port, or unix:/path."""

    backend: bool = False
    off: bool = False

    @property
    def label(self) -> str:
        if self.backend:
            return "address, host name and port, or unix:/path"
        return 'address or `"off"`' if self.off else "address"

    def read(self, value: object, spot: Spot) -> Any:
        text = text_of(value, "an address", '"127.0.0.1:8080"')
        if text == "off" and self.off:
            return None
        return units.parse_address(text, hosts=self.backend, unix=self.backend)

    def show(self, value: Any) -> str:
        if value is REQUIRED:
            return '"127.0.0.1:9000"' if self.backend else '"127.0.0.1:8080"'
        return '"off"' if value is None else f'"{value}"'


@dataclass(frozen=True, slots=True)
class Network(Kind):
    """An IP network, "10.0.0.0/8"; a bare address is a network of one."""

    @property
    def label(self) -> str:
        return "network"

    def read(self, value: object, spot: Spot) -> Any:
        text = text_of(value, "a network", '"10.0.0.0/8"')
        try:
            return ip_network(text)
        except ValueError:
            pass
        try:
            wide = ip_network(text, strict=False)
        except ValueError:
            raise BadValueError("is not an IP network", write='"10.0.0.0/8"') from None
        raise BadValueError("has bits set below its prefix length", write=f'"{wide}"')


@dataclass(frozen=True, slots=True)
class Several(Kind):
    """An array of one kind."""

    item: Kind
    what: str
    example: str

    @property
    def label(self) -> str:
        return f"array of {self.what}"

    @property
    def tables(self) -> list[Table]:
        return self.item.tables

    def read(self, value: object, spot: Spot) -> Any:
        if not isinstance(value, list):
            raise BadValueError("an array is needed", write=self.example)
        return read_all([(spot.at(index), self.item, item) for index, item in enumerate(value)])

    def show(self, value: Any) -> str:
        if value is REQUIRED:
            return self.example
        return f"[{', '.join(self.item.show(item) for item in value)}]"


@dataclass(frozen=True, slots=True)
class File(Kind):
    """A file that must be there and readable now; its absolute path. `most` bounds its size in bytes."""

    most: int = defaults.MAX_FILE

    @property
    def label(self) -> str:
        return "path of a file"

    def read(self, value: object, spot: Spot) -> Any:
        path = absolute(text_of(value, "a path", '"/etc/tidegate/..."'), spot)
        shown = show_value(str(path), 200)
        fix = f"check the path; a relative one starts at {spot.reading.base}"
        try:
            if not os.path.isfile(path):
                what = "is not a regular file" if os.path.exists(path) else f"there is no file {shown}"
                raise BadValueError(what, fix=fix)
            with path.open("rb") as file:
                file.read(1)
            size = path.stat().st_size
        except OSError as error:
            raise BadValueError(f"cannot read {shown}: {os.strerror(error.errno or 0)}", fix=fix) from None
        if size > self.most:
            raise BadValueError(f"is larger than {units.format_size(self.most)}", fix="use a smaller file")
        return path

    def show(self, value: Any) -> str:
        return '"/etc/tidegate/..."' if value is REQUIRED else Kind.show(self, str(value))


@dataclass(frozen=True, slots=True)
class WritablePath(Kind):
    """A file to be written, so its directory must be there; one of `words` is taken as it is."""

    words: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return " or ".join(["path", *(f'`"{word}"`' for word in self.words)])

    def read(self, value: object, spot: Spot) -> Any:
        text = text_of(value, "a path", '"/var/log/tidegate/access.log"')
        if text in self.words:
            return text
        path = absolute(text, spot)
        if os.path.isdir(path):
            raise BadValueError("is a directory", write=quoted(f"{path}/access.log"))
        if not os.path.isdir(path.parent):
            raise BadValueError(
                f"there is no directory {show_value(str(path.parent), 200)}",
                fix="make it, or write a path in one that is there",
            )
        return str(path)

    def show(self, value: Any) -> str:
        return '"/var/log/tidegate/access.log"' if value is REQUIRED else Kind.show(self, value)


@dataclass(frozen=True, slots=True)
class SocketPath(Kind):
    """Where a Unix socket will be; its directory may yet have to be made."""

    @property
    def label(self) -> str:
        return "path"

    def read(self, value: object, spot: Spot) -> Any:
        text = text_of(value, "a path", f'"{defaults.CONTROL}"')
        path = absolute(text.removeprefix("unix:"), spot)
        if os.path.isdir(path):
            raise BadValueError("is a directory", write=quoted(f"{path}/control.sock"))
        if len(os.fsencode(path)) > units.UNIX_PATH_MAX:
            raise BadValueError(
                f"the path of a Unix socket has at most {units.UNIX_PATH_MAX} bytes",
                write=f'"{defaults.CONTROL}"',
            )
        return str(path)


def absolute(text: str, spot: Spot) -> Path:
    """A path of the file, relative ones from the file's own directory."""
    if not text:
        raise BadValueError("is empty", fix="write a path")
    return Path(os.path.normpath(spot.reading.base / text))
