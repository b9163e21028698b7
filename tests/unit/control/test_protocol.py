"""Requests and arguments: what is read, what is refused, and with which code of the closed list."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.control import protocol
from tidegate.control.protocol import Arg, ErrorCode, MalformedError, VerbError, parse_request, read_args

ROOT = Path(__file__).parents[3]
ARGS = (
    Arg("name", protocol.text, "a name", required=True),
    Arg("older", protocol.duration, "an age"),
    Arg("limit", protocol.integer(1, 10), "a number"),
    Arg("all", protocol.flag, "a flag"),
    Arg("kind", protocol.choice("a", "b"), "a word"),
    Arg("some", protocol.several(protocol.integer(0, 9), 3), "numbers"),
    Arg("state", protocol.table, "an object"),
)


@given(st.binary(max_size=300))
def test_any_line_is_a_request_or_malformed(line: bytes) -> None:
    try:
        request = parse_request(line)
    except MalformedError:
        return
    assert request.id is None or isinstance(request.id, (int, str))
    json.dumps(request.id, allow_nan=False)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(
    st.fixed_dictionaries({}, optional={"v": json_values, "id": json_values, "verb": json_values})
    | json_values
)
def test_any_json_is_a_request_or_malformed(value: Any) -> None:
    try:
        request = parse_request(json.dumps(value).encode())
    except MalformedError:
        return
    assert isinstance(value, dict)
    assert request.id == value.get("id")


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"status",
        b"[]",
        b"null",
        b'{"v":1',
        b'{"v":NaN}',
        b'{"id":Infinity}',
        b'{"id":1.5}',
        b'{"id":true}',
        b'{"id":[]}',
        b"\xff\xfe{}",
        '{"v":1}'.encode("utf-16"),
        b"[" * 100_000,
        b'{"v":' * 50_000,
        b'{"id":' + b"9" * 100_000 + b"}",
        b"\x00",
    ],
)
def test_malformed(line: bytes) -> None:
    with pytest.raises(MalformedError):
        parse_request(line)


def test_every_known_argument_is_there() -> None:
    got = read_args(ARGS, {"name": "x", "older": "1.5s", "some": 3})
    assert got == {"name": "x", "older": 1_500_000_000, "limit": None, "all": None, "kind": None,
                   "some": [3], "state": None}  # fmt: skip


@pytest.mark.parametrize(
    ("given_args", "says"),
    [
        ([], "args is an object"),
        ({}, "name is missing"),
        ({"name": None}, "name is missing"),
        ({"name": 3}, "name is a text"),
        ({"name": ""}, "name is a text"),
        ({"name": "a\0b"}, "name is a text"),
        ({"name": "x", "nmae": 1}, "unknown argument 'nmae' (known: all, kind, limit"),
        ({"name": "x", "older": 5}, "older is a duration with its unit"),
        ({"name": "x", "older": "5"}, "older a duration needs a unit"),
        ({"name": "x", "limit": 0}, "limit is a whole number from 1 to 10"),
        ({"name": "x", "limit": True}, "limit is a whole number"),
        ({"name": "x", "limit": 2.0}, "limit is a whole number"),
        ({"name": "x", "all": 1}, "all is true or false"),
        ({"name": "x", "kind": "c"}, "kind is one of a, b"),
        ({"name": "x", "kind": ["a"]}, "kind is one of a, b"),
        ({"name": "x", "some": []}, "some has 1 to 3 items"),
        ({"name": "x", "some": [1, 2, 3, 4]}, "some has 1 to 3 items"),
        ({"name": "x", "some": [1, "2"]}, "some is a whole number"),
        ({"name": "x", "state": "{}"}, "state is an object"),
    ],
)
def test_bad_arguments(given_args: Any, says: str) -> None:
    with pytest.raises(VerbError) as refused:
        read_args(ARGS, given_args)
    assert refused.value.code is ErrorCode.BAD_ARGUMENT
    assert says in refused.value.message


@given(st.dictionaries(st.sampled_from([arg.name for arg in ARGS]) | st.text(), json_values))
def test_no_argument_breaks_the_reader(args: dict[str, Any]) -> None:
    code, got = None, {}
    try:
        got = read_args(ARGS, args)
    except VerbError as refused:
        code = refused.code
    assert code is ErrorCode.BAD_ARGUMENT or set(got) == {arg.name for arg in ARGS}


def test_codes_are_a_closed_list() -> None:
    assert VerbError("busy", "").code is ErrorCode.BUSY
    with pytest.raises(ValueError, match="not in the list"):
        VerbError("bsuy", "")


def test_every_code_used_anywhere_is_in_the_list() -> None:
    used: set[str] = set()
    for path in (ROOT / "userspace" / "tidegate").rglob("*.py"):
        used |= set(
            re.findall(r'(?:reply\.error|VerbError|_refuse)\((?:reply, )?"([a-z_]+)"', path.read_text())
        )
    assert used
    assert used <= {code.value for code in ErrorCode}


def test_the_page_lists_every_code_with_its_meaning() -> None:
    page = (ROOT / "docs" / "control.md").read_text()
    listed = dict(re.findall(r"^\| `([a-z_]+)` \| (.+?) \|$", page, re.MULTILINE))
    for code in ErrorCode:
        assert listed.get(code.value) == code.doc
