"""Where each key of a TOML document was written: tomllib gives values but no positions.

The scanner follows the structure (headers, dotted and quoted keys, arrays, inline tables, every kind of
string) and skips the values. It is made for text that tomllib accepted; on anything else it stops and keeps
what it has.
"""

from __future__ import annotations

import re
import tomllib
from typing import Final

from tidegate.config.errors import Path

_BLANK: Final = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SPACE: Final = re.compile(r"[ \t]*")
_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")
_BASIC: Final = re.compile(r'"[^"\\\n]*(?:\\.[^"\\\n]*)*"')
_LITERAL: Final = re.compile(r"'[^'\n]*'")
_MULTI_BASIC: Final = re.compile(r'"""[^"\\]*(?:(?:\\.|"{1,2}(?!"))[^"\\]*)*"{3,5}', re.DOTALL)
_MULTI_LITERAL: Final = re.compile(r"'{3}[^']*(?:'{1,2}(?!')[^']*)*'{3,5}")
_SCALAR: Final = re.compile(r"\d{4}-\d\d-\d\d \d\d:[^\s,\]}#]*|[^\s,\]}#]+")
_VALUES: Final = (_MULTI_BASIC, _MULTI_LITERAL, _BASIC, _LITERAL, _SCALAR)


class Lines:
    """Line numbers, counted from 1, by path."""

    __slots__ = ("_by_path",)

    def __init__(self, by_path: dict[Path, int]) -> None:
        self._by_path = by_path

    def find(self, path: Path) -> int | None:
        """The line where exactly this path was written, None when it was not."""
        return self._by_path.get(path)

    def at(self, path: Path) -> int:
        """The line of the path, or of the nearest thing around it; 0 for the file as a whole."""
        while path:
            line = self._by_path.get(path)
            if line is not None:
                return line
            path = path[:-1]
        return 0


def scan(text: str) -> Lines:
    """Find every key, table and array element of a TOML document. Never raises."""
    scanner = _Scanner(text)
    try:
        scanner.document()
    except (_LostError, RecursionError):
        pass
    return Lines(scanner.found)


class _LostError(Exception):
    """Not TOML, as far as the scanner can see."""


class _Scanner:
    """One pass over the text. `found` is the result; `pos` is where it is, `line` the line of `counted`."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.pos = 0
        self.line = 1
        self.counted = 0
        self.found: dict[Path, int] = {}
        self.headed: set[Path] = set()
        self.arrays: dict[Path, int] = {}

    def document(self) -> None:
        table: Path = ()
        self.skip(_BLANK)
        while self.pos < len(self.text):
            if self.text[self.pos] == "[":
                table = self.header()
            else:
                self.pair(table)
            self.skip(_BLANK)

    def header(self) -> Path:
        line = self.here()
        is_array = self.text.startswith("[[", self.pos)
        self.pos += 2 if is_array else 1
        keys = self.key()
        self.expect("]]" if is_array else "]")
        path: Path = ()
        for key in keys[:-1]:
            path = (*path, key)
            self.found.setdefault(path, line)
            if path in self.arrays:
                path = (*path, self.arrays[path] - 1)
        path = (*path, keys[-1])
        if is_array:
            self.found.setdefault(path, line)
            index = self.arrays.get(path, 0)
            self.arrays[path] = index + 1
            path = (*path, index)
        if path not in self.headed:  # its own header says more than one that mentioned it in passing
            self.headed.add(path)
            self.found[path] = line
        return path

    def pair(self, table: Path) -> None:
        line = self.here()
        path = table
        for key in self.key():
            path = (*path, key)
            self.found.setdefault(path, line)
        self.expect("=")
        self.skip(_SPACE)
        self.value(path)

    def key(self) -> list[str]:
        keys = []
        while True:
            self.skip(_SPACE)
            keys.append(self.key_part())
            self.skip(_SPACE)
            if not self.text.startswith(".", self.pos):
                return keys
            self.pos += 1

    def key_part(self) -> str:
        if match := _BARE.match(self.text, self.pos):
            self.pos = match.end()
            return match[0]
        match = _BASIC.match(self.text, self.pos) or _LITERAL.match(self.text, self.pos)
        if match is None:
            raise _LostError
        self.pos = match.end()
        try:
            return str(tomllib.loads(f"k = {match[0]}")["k"])
        except tomllib.TOMLDecodeError:
            raise _LostError from None

    def value(self, path: Path) -> None:
        if self.text.startswith("[", self.pos):
            self.array(path)
        elif self.text.startswith("{", self.pos):
            self.inline_table(path)
        else:
            for kind in _VALUES:
                if match := kind.match(self.text, self.pos):
                    self.pos = match.end()
                    return
            raise _LostError

    def array(self, path: Path) -> None:
        self.pos += 1
        index = 0
        while not self.closed("]"):
            element = (*path, index)
            self.found[element] = self.here()
            self.value(element)
            index += 1
            self.comma()

    def inline_table(self, path: Path) -> None:
        self.pos += 1
        while not self.closed("}"):
            self.pair(path)
            self.comma()

    def closed(self, bracket: str) -> bool:
        self.skip(_BLANK)
        if self.text.startswith(bracket, self.pos):
            self.pos += 1
            return True
        return False

    def comma(self) -> None:
        self.skip(_BLANK)
        if self.text.startswith(",", self.pos):
            self.pos += 1

    def expect(self, token: str) -> None:
        self.skip(_SPACE)
        if not self.text.startswith(token, self.pos):
            raise _LostError
        self.pos += len(token)

    def skip(self, blank: re.Pattern[str]) -> None:
        match = blank.match(self.text, self.pos)
        assert match is not None  # both patterns match the empty string
        self.pos = match.end()

    def here(self) -> int:
        self.line += self.text.count("\n", self.counted, self.pos)
        self.counted = self.pos
        return self.line
