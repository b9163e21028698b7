"""Configuration errors: where, what, and what to write instead; all of a file's at once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from tidegate.errors import EXIT_USAGE, OperatorError

Path = tuple[str | int, ...]
"""Where a value stands in the document: keys, and indices of array elements."""

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class ConfigError:
    """One thing to mend. `line` counts from 1; 0 means that the file as a whole is meant."""

    file: str
    line: int
    key_path: str
    message: str
    fix: str = ""

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: {self.message}\n  {self.fix}" if self.fix else f"{where}: {self.message}"


class ConfigErrors(OperatorError):
    """Every error of one file, in the order of its lines. Prints as a count and then one by one."""

    exit_code = EXIT_USAGE

    def __init__(self, errors: Iterable[ConfigError]) -> None:
        self.errors = sorted(dict.fromkeys(errors), key=lambda error: error.line)
        if not self.errors:
            raise ValueError("no errors to report")
        count = "1 error" if len(self.errors) == 1 else f"{len(self.errors)} errors"
        super().__init__("\n".join([f"{count} in {self.errors[0].file}", *map(str, self.errors)]))


class BadValueError(ValueError):
    """A value that cannot be taken. The reader of the key adds where it stands and what it is called.

    `message` ends the sentence that begins with the key and its value; `write` is the TOML of a value to
    write instead, `fix` a whole sentence for when one value is not the answer.
    """

    def __init__(self, message: str, *, write: str = "", fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.write = write
        self.fix = fix


def show_path(path: Path) -> str:
    """`listener[0].stale_after`, keys quoted where TOML would quote them."""
    out = ""
    for part in path:
        if isinstance(part, int):
            out += f"[{part}]"
        else:
            key = part if _BARE_KEY.fullmatch(part) else quoted(part)
            out += f".{key}" if out else key
    return out


def show_value(value: object, limit: int = 60) -> str:
    """A value as TOML would have it, cut to `limit` characters."""
    text = _toml(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def quoted(text: str) -> str:
    """A text as a TOML string, with nothing in it that does not print."""
    return f'"{"".join(_quoted_character(character) for character in text)}"'


def _quoted_character(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    if character.isprintable():
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, dict):
        inside = ", ".join(f"{show_path((str(key),))} = {_toml(item)}" for key, item in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    return str(value)
