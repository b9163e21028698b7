"""Tables and figures for people."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate_tools.table import Column, clean, count, cut, duration, reasons, size, table

COLUMNS = [Column("NAME", flex=True), Column("COUNT", right=True), Column("OTHER", flex=True)]


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (None, "-"),
        (0, "0"),
        (999, "0"),
        (1_000, "1us"),
        (999_999, "999us"),
        (1_000_000, "1ms"),
        (999_999_999, "999ms"),
        (1_000_000_000, "1.0s"),
        (9_999_999_999, "9.9s"),
        (10_000_000_000, "10s"),
        (999_999_999_999, "999s"),
        (1000 * 10**9, "16m"),
        (59_999 * 10**9, "999m"),
        (60_000 * 10**9, "16h"),
        (86400 * 10**9 * 100, "100d"),
    ],
)
def test_duration(ns: int | None, text: str) -> None:
    assert duration(ns) == text


@settings(deadline=None)
@given(st.integers(0, 99 * 365 * 86400 * 10**9))
def test_duration_takes_five_characters(ns: int) -> None:
    assert 1 <= len(duration(ns)) <= 6 - (ns < 9999 * 86400 * 10**9)


@settings(deadline=None)
@given(st.integers(0, 10**15))
def test_count_and_size_take_five_characters(number: int) -> None:
    assert len(count(number)) <= 5
    assert len(size(number)) <= 5


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(max_size=120), st.integers(0, 10**9), st.text(max_size=120)), max_size=5))
def test_table_never_passes_its_limit(rows: list[tuple[str, int, str]]) -> None:
    text = table(COLUMNS, rows, limit=50)
    assert all(len(line) <= 50 for line in text.splitlines())
    assert len(text.splitlines()) == (len(rows) + 1 if rows else 0)


def test_table_aligns() -> None:
    assert table(COLUMNS, [("a", 5, "x"), ("bb", 12345678, "y")], limit=79) == (
        "NAME     COUNT  OTHER\na            5  x\nbb    12345678  y"
    )


def test_cut_keeps_both_ends() -> None:
    assert cut("[2001:db8::1234:5678]:8080", 14) == "[2001:d~]:8080"
    assert cut("short", 14) == "short"


def test_escape_sequences_do_not_reach_the_terminal() -> None:
    assert clean("evil\x1b[2J\n\u202e") == "evil?[2J??"
    assert clean("naïve") == "naïve"


def test_reasons() -> None:
    assert reasons({"stale": 12, "queue_full": 3, "shutdown": 0}) == "stale 12, queue_full 3"
    assert reasons({"stale": 0}) == "none"
