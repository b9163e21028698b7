"""From a file to a Config, or to all that is wrong with it."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any, Final

from tidegate.config import checks, defaults, pending, process_tables
from tidegate.config.composite import read_table
from tidegate.config.errors import ConfigError, ConfigErrors
from tidegate.config.lines import scan
from tidegate.config.model import Config
from tidegate.config.schema import Reading, Spot

_POSITION: Final = re.compile(r" \((?:at line (\d+), column (\d+)|at end of document)\)$")
_SYNTAX_FIXES: Final = (
    ("Expected '=' after a key", "write key = value"),
    ("Invalid value", 'text needs quotes: key = "value"'),
    ("Cannot overwrite a value", "the key is there twice: keep one"),
    ("Cannot declare", "the table is there twice: keep one, or write [[name]] where several are allowed"),
    ("Unescaped '\\' in a string", "write \\\\ for a backslash, or use 'single quotes'"),
    ("Illegal character", "close the quotes on the same line"),
    ("Expected newline or end of document", "put each key on a line of its own"),
    ("Unterminated string", "close the quotes"),
    ("Unclosed array", "close it with ]"),
    ("Invalid statement", "a line is key = value, [table] or # comment"),
)


def load(path: str | Path, *, allow_pending: bool = False) -> Config:
    """Read and check a file. Raises ConfigErrors with everything that is wrong in it."""
    source = os.fspath(path)
    try:
        with open(path, "rb") as file:
            data = file.read(defaults.MAX_FILE + 1)
    except OSError as error:
        fix = (
            "name the configuration file"
            if isinstance(error, IsADirectoryError)
            else "check its path and permissions"
        )
        raise _one(source, 0, f"cannot be read: {os.strerror(error.errno or 0)}", fix) from None
    if len(data) > defaults.MAX_FILE:
        raise _one(
            source,
            0,
            f"is larger than {defaults.MAX_FILE // defaults.MIB} MiB",
            "name the configuration file",
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _one(
            source, line, f"byte 0x{data[error.start]:02x} is not UTF-8", "save the file as UTF-8"
        ) from None
    return parse(text, source, allow_pending=allow_pending)


def parse(text: str, source: str = "<string>", *, allow_pending: bool = False) -> Config:
    """Check the text of a file. Raises ConfigErrors with everything that is wrong in it.

    Relative paths in it start at the directory of `source`. With `allow_pending`, features of the contract
    that this version does not have are let through.
    """
    raw = _document(text, source)
    base = Path(os.path.abspath(source)).parent
    reading = Reading(source, base, scan(text))
    spot = Spot(reading)
    section = read_table(process_tables.PROCESS, raw, spot)
    process_tables.check(section)
    checks.check(raw, section)
    if not allow_pending:
        pending.check(raw, spot)
    if reading.errors:
        raise ConfigErrors(reading.errors)
    return process_tables.build(section, source)


def _document(text: str, source: str) -> dict[str, Any]:
    if text.startswith("\ufeff"):
        raise _one(source, 1, "the file begins with a byte order mark", "save it as UTF-8 without BOM")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        position = _POSITION.search(message)
        line = text.count("\n") + 1 if text else 1
        if position:
            message = message[: position.start()]
            if position[1]:
                line = int(position[1])
                message += f" in column {position[2]}"
            else:
                line = max(1, text.rstrip().count("\n") + 1)
                message += " at the end of the file"
        fix = next((fix for start, fix in _SYNTAX_FIXES if message.startswith(start)), "see https://toml.io")
        raise _one(source, line, f"not TOML: {message[0].lower()}{message[1:]}", fix) from None
    except RecursionError:
        raise _one(source, _deepest(text), "brackets are nested too deeply", "take some out") from None
    except ValueError as error:  # a number of thousands of digits, a date that does not exist
        raise _one(source, 0, f"not TOML: {error}", "see https://toml.io") from None


def _deepest(text: str) -> int:
    """The line with the most opening brackets: where too deep a nesting was written."""
    lines = text.split("\n")
    return 1 + max(range(len(lines)), key=lambda index: lines[index].count("[") + lines[index].count("{"))


def _one(source: str, line: int, message: str, fix: str) -> ConfigErrors:
    return ConfigErrors([ConfigError(source, line, "", message, fix)])
