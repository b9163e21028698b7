"""Lines come out whole, once and in order, however the bytes arrived."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.control.framing import LineSplitter, LineTooLong

LIMIT = 40


def cut(data: bytes, at: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in at)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(
    st.lists(st.binary(max_size=LIMIT).map(lambda line: line.replace(b"\n", b"n"))),
    st.binary(max_size=LIMIT).map(lambda rest: rest.replace(b"\n", b"n")),
    st.lists(st.integers(0, 2000)),
    st.integers(1, 5),
)
def test_what_goes_in_comes_out(lines: list[bytes], rest: bytes, at: list[int], taken: int) -> None:
    splitter = LineSplitter(LIMIT)
    got = []
    for piece in cut(b"".join(line + b"\n" for line in lines) + rest, at):
        splitter.feed(piece)
        for _ in range(taken):  # a reader that does not take all that is there
            line = splitter.next()
            if line is None:
                break
            got.append(line)
    while (line := splitter.next()) is not None:
        got.append(line)
    assert got == lines
    assert len(splitter) == len(rest)
    assert not splitter.has_line()


@given(st.integers(1, 200), st.lists(st.integers(0, 400)), st.booleans())
def test_a_line_over_the_limit_is_refused_with_or_without_its_end(
    over: int, at: list[int], ended: bool
) -> None:
    splitter = LineSplitter(LIMIT)
    splitter.feed(b"ok\n")
    assert splitter.next() == b"ok"

    def feed() -> None:
        for piece in cut(b"x" * (LIMIT + over) + (b"\n" if ended else b""), at):
            splitter.feed(piece)
            assert splitter.next() is None

    with pytest.raises(LineTooLong):
        feed()


def test_the_limit_itself_is_allowed() -> None:
    splitter = LineSplitter(LIMIT)
    splitter.feed(b"x" * LIMIT)
    assert splitter.next() is None
    splitter.feed(b"\n")
    assert splitter.has_line()
    assert splitter.next() == b"x" * LIMIT


def test_a_line_too_long_is_not_hidden_by_the_next_ones_end() -> None:
    splitter = LineSplitter(LIMIT)
    splitter.feed(b"x" * (LIMIT + 1) + b"\nshort\n")
    assert splitter.has_line()
    with pytest.raises(LineTooLong):
        splitter.next()


def test_cost_grows_with_the_bytes_not_with_their_square() -> None:
    def cost(lines: int) -> float:
        splitter = LineSplitter(1 << 20)
        splitter.feed(b"{}\n" * lines)
        begun = time.process_time()
        while splitter.next() is not None:
            pass
        return time.process_time() - begun

    cost(1000)
    small, large = min(cost(10_000) for _ in range(3)), min(cost(80_000) for _ in range(3))
    assert large < 8 * small * 4, "eight times the lines, with room for a noisy machine; the square is 64"
