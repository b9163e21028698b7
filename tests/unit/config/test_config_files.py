"""Files that cannot be read, are no TOML, or are anything at all."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate import config
from tidegate.config import ConfigError, ConfigErrors, process_tables
from tidegate.config.errors import quoted, show_value
from tidegate.config.schema import all_tables


def only(caught: pytest.ExceptionInfo[ConfigErrors]) -> ConfigError:
    (error,) = caught.value.errors
    return error


def refused(data: bytes, tmp_path: Path) -> ConfigError:
    path = tmp_path / "web.toml"
    path.write_bytes(data)
    with pytest.raises(ConfigErrors) as caught:
        config.load(path)
    return only(caught)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigErrors) as caught:
        config.load(tmp_path / "none.toml")
    assert str(only(caught)).startswith(f"{tmp_path}/none.toml: cannot be read: No such file or directory\n")


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigErrors) as caught:
        config.load(tmp_path)
    assert "Is a directory" in only(caught).message


@pytest.mark.parametrize(
    ("data", "line", "fragment"),
    [
        (b"workers = 1\nuser = '\xff'\n", 2, "0xff is not UTF-8"),
        (b"\xef\xbb\xbfworkers = 1\n", 1, "byte order mark"),
        (b"workers = 1\nworkers\n", 2, "expected '=' after a key"),
        (b"workers = 1\n[listener\n", 2, "']'"),
        (b"workers = [1,\n2,\n\n\n", 2, "not TOML"),
        (b'user = """abc\n\n', 1, "not TOML"),
        (b"a = " + b"9" * 5000 + b"\n", 0, "not TOML"),
        (b"\n\na = " + b"[" * 5000 + b"\n", 3, "nested too deeply"),
        (b"x" * (4 * 1024 * 1024 + 1), 0, "larger than 4 MiB"),
    ],
)
def test_no_toml(data: bytes, line: int, fragment: str, tmp_path: Path) -> None:
    error = refused(data, tmp_path)
    assert error.line == line
    assert fragment in error.message
    assert error.fix


def test_empty_file() -> None:
    with pytest.raises(ConfigErrors) as caught:
        config.parse("", "web.toml")
    assert str(only(caught)).startswith("web.toml: there is no [[listener]]")


def test_control_characters_of_the_file_do_not_reach_the_terminal() -> None:
    with pytest.raises(ConfigErrors) as caught:
        config.parse('"\\u001b[31m" = 1\nuser = "\\u001b[2J"\ncontrol = "/\\u001b/\\u0007"\n', "web.toml")
    assert all(line.isprintable() for line in str(caught.value).split("\n"))


@settings(deadline=None)
@given(st.text())
def test_quoted_is_toml(text: str) -> None:
    assert tomllib.loads(f"x = {quoted(text)}")["x"] == text


KNOWN = sorted(
    {key.name for table in all_tables(process_tables.PROCESS) for key in table.keys} | {"app", "503"}
)
WORDS = st.sampled_from(
    ["tcp", "http", "https", "auto", "off", "127.0.0.1:80", "[::1]:1", "app", "1s", "4KiB", "/x", ""]
)
SCALAR = st.booleans() | st.integers(-2, 2**40) | st.floats(allow_nan=False, allow_infinity=False) | WORDS
SCALAR |= st.text(max_size=6)
VALUE = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KNOWN), inner, max_size=5),
    max_leaves=25,
)


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(st.sampled_from(KNOWN), VALUE, max_size=6))
def test_whatever_it_holds_is_read_or_refused_with_lines(document: dict[str, object]) -> None:
    text = "".join(f"{quoted(key)} = {show_value(value, 10**9)}\n" for key, value in document.items())
    found: list[ConfigError] = []
    try:
        config.parse(text, "web.toml", allow_pending=True)
    except ConfigErrors as errors:
        found = errors.errors
    assert all(error.message and 0 <= error.line <= len(document) for error in found)
    assert all(line.isprintable() for error in found for line in str(error).split("\n"))
