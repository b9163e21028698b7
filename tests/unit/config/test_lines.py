"""The line scanner against tomllib: whatever tomllib finds, it finds, at the line where it was written."""

from __future__ import annotations

import json
import string
import tomllib
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.config.lines import scan

BARE = st.text(string.ascii_letters + string.digits + "_-", min_size=1, max_size=4)
KEY = BARE | st.text(max_size=4, alphabet=st.characters(codec="utf-8", exclude_characters="\r"))
STRING = st.text(max_size=8, alphabet=st.characters(codec="utf-8", exclude_characters="\r"))
SCALARS = st.sampled_from(
    ["1", "0x1F", "1_000", "3.14", "inf", "-nan", "true", "1979-05-27", "07:32:00.5", "1979-05-27 07:32:00"]
) | st.sampled_from(
    [
        "1979-05-27T07:32:00-07:00",
        "1979-05-27 07:32:00Z",
        '"]"',
        "'}'",
        "'#'",
        '"\\""',
        "'\\'",
        '""',
        "''",
        '"[1"',
    ]
)
MULTILINE = st.sampled_from(
    ['"""\na\n[b]\nc = 1\n"""', "'''\n[[x]]\n# no\n'''", '"""a\\\n   b"""', '"""x"""""', "'''x'''''"]
) | st.sampled_from(['"""\\"""\n"""', "'''\"\"\"\n'''", '"""\'\'\'\n"""', '""""""', "''''''"])
NOISE = st.sampled_from(["", "\n", "\n\n", "# x = [\n", "  \t\n", '# """\n'])


def basic(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def spell(key: str, how: int) -> str:
    """A key bare, basic or literal, as it can be."""
    if how == 0 and key and all(c in string.ascii_letters + string.digits + "_-" for c in key):
        return key
    if how == 1 and key.isprintable() and "'" not in key:
        return f"'{key}'"
    return basic(key)


@dataclass
class Writer:
    """Writes TOML and notes the line of every path as it goes."""

    draw: st.DrawFn
    text: str = ""
    lines: dict[tuple[str | int, ...], int] = field(default_factory=dict)

    @property
    def line(self) -> int:
        return self.text.count("\n") + 1

    def pick(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def key(self, keys: list[str]) -> str:
        dot = self.draw(st.sampled_from([".", " . ", ". "]))
        return dot.join(spell(key, self.pick(0, 2)) for key in keys)

    def noise(self) -> str:
        return self.draw(NOISE)

    def pairs(self, path: tuple[str | int, ...], inline: bool, depth: int) -> None:
        """Lines of key = value (or the inside of an inline table), no key twice."""
        names = self.draw(st.lists(KEY, max_size=3, unique=True))
        for number, name in enumerate(names):
            keys = [name, *self.draw(st.lists(KEY, max_size=2))]
            if not inline:
                self.text += self.noise()
            elif number:
                self.text += ", "
            here = path
            for key in keys:
                here = (*here, key)
                self.lines[here] = self.line
            self.text += f"{self.key(keys)} = "
            self.value(here, inline, depth)
            if not inline:
                self.text += self.draw(st.sampled_from(["\n", " # c\n", "\t# ]]\n"]))

    def value(self, path: tuple[str | int, ...], inline: bool, depth: int) -> None:
        kind = self.pick(0, 9 if depth else 6)
        if kind <= 3:
            self.text += self.draw(SCALARS)
        elif kind == 4:
            self.text += basic(self.draw(STRING))
        elif kind <= 6:
            self.text += self.draw(MULTILINE)
        elif kind == 7:
            self.text += "{ "
            self.pairs(path, True, depth - 1)
            self.text += " }"
        else:
            self.array(path, inline, depth)

    def array(self, path: tuple[str | int, ...], inline: bool, depth: int) -> None:
        self.text += "["
        for index in range(self.pick(0, 3)):
            self.text += self.noise() if not inline else self.draw(st.sampled_from(["", " ", "\n", "# ]\n"]))
            self.lines[(*path, index)] = self.line
            self.value((*path, index), inline, depth - 1)
            self.text += self.noise() + ("," if self.pick(0, 1) else " ,")
        self.text += self.noise() + "]"

    def document(self) -> None:
        self.pairs((), False, 2)
        top = {path[0] for path in self.lines}
        names = [name for name in self.draw(st.lists(KEY, max_size=4, unique=True)) if name not in top]
        for name in names:
            if self.pick(0, 1):
                self.table(name)
            else:
                self.tables(name)

    def head(self, keys: list[str], array: bool) -> int:
        self.text += self.noise()
        line = self.line
        self.text += f"[[{self.key(keys)}]]\n" if array else f"[{self.key(keys)}] # t\n"
        return line

    def table(self, name: str) -> None:
        keys = [name, *self.draw(st.lists(KEY, max_size=2))]
        line = self.head(keys, False)
        for end in range(1, len(keys) + 1):
            self.lines[tuple(keys[:end])] = line
        self.pairs(tuple(keys), False, 2)
        if len(keys) > 1 and self.pick(0, 1):  # its own header, after one that implied it
            taken = {path[1] for path in self.lines if path[0] == name and len(path) > 1}
            self.lines[(name,)] = self.head([name], False)
            fresh = [key for key in self.draw(st.lists(BARE, max_size=2, unique=True)) if key not in taken]
            for key in fresh:
                self.lines[(name, key)] = self.line
                self.text += f"{key} = 1\n"

    def tables(self, name: str) -> None:
        for index in range(self.pick(1, 3)):
            line = self.head([name], True)
            self.lines.setdefault((name,), line)
            self.lines[(name, index)] = line
            before = set(self.lines)
            self.pairs((name, index), False, 2)
            own = {path[2] for path in set(self.lines) - before if len(path) > 2}
            for inner in [key for key in self.draw(st.lists(KEY, max_size=2, unique=True)) if key not in own]:
                array = bool(self.pick(0, 1))
                line = self.head([name, inner], array)
                self.lines[(name, index, inner)] = line
                path: tuple[str | int, ...] = (name, index, inner)
                if array:
                    path = (*path, 0)
                    self.lines[path] = line
                self.pairs(path, False, 1)


@st.composite
def documents(draw: st.DrawFn) -> tuple[str, dict[tuple[str | int, ...], int]]:
    writer = Writer(draw)
    writer.document()
    return writer.text, writer.lines


def paths(value: object, path: tuple[str | int, ...] = ()) -> set[tuple[str | int, ...]]:
    found = {path} if path else set()
    if isinstance(value, dict):
        for key, item in value.items():
            found |= paths(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            found |= paths(item, (*path, index))
    return found


@settings(max_examples=400, deadline=None)
@given(documents(), st.booleans())
def test_every_path_is_found_where_it_was_written(
    document: tuple[str, dict[tuple[str | int, ...], int]], crlf: bool
) -> None:
    text, expected = document
    if crlf:
        text = text.replace("\n", "\r\n")
    parsed = tomllib.loads(text)
    found = scan(text)
    assert paths(parsed) == set(expected), "the generator and tomllib disagree"
    assert {path: found.find(path) for path in expected} == expected


@settings(deadline=None)
@given(st.text(alphabet="[]{}=.,\"'\\#\n ab1", max_size=60))
def test_never_raises_and_agrees_when_tomllib_accepts(text: str) -> None:
    found = scan(text)
    try:
        parsed = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, ValueError):
        return
    last = text.count("\n") + 1
    for path in paths(parsed):
        line = found.find(path)
        assert line is not None and 1 <= line <= last


def test_the_layout_of_a_real_file() -> None:
    lines = scan(
        "# head\n"
        "workers = 2\n"
        "log = { level = 'info',\tformat = \"text\" }\n"
        "[[listener]]\n"
        'name = """\n'
        'web"""\n'
        "limits.burst = 1\n"
        "  [[listener.route]]\n"
        "  path.prefix = '/a'\n"
        "[[listener]]\n"
        "[[listener.route]]\n"
        "[[listener.route]]\n"
        "deny = 403\n"
        "[cluster.'a.b']\n"
        "backends = [\n"
        "  'x', # one\n"
        "  { address = 'y' },\n"
        "]\n"
    )
    assert lines.find(("log", "format")) == 3
    assert lines.find(("listener", 0, "name")) == 5
    assert lines.find(("listener", 0, "limits", "burst")) == 7
    assert lines.find(("listener", 0, "route", 0, "path", "prefix")) == 9
    assert lines.find(("listener", 1)) == 10
    assert lines.find(("listener", 1, "route", 1)) == 12
    assert lines.find(("listener", 1, "route", 1, "deny")) == 13
    assert lines.find(("cluster", "a.b", "backends", 1, "address")) == 17
    assert lines.find(("cluster", "nowhere")) is None
    assert lines.at(("cluster", "a.b", "balance")) == 14
    assert lines.at(("nowhere",)) == 0


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "a = " + "[" * 100_000, "a." * 100_000, 'a = """' + "\\" * 99_999, "a = {" * 9999]
)
def test_hostile_text_ends_quickly(text: str) -> None:
    scan(text)
