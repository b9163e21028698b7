"""`tidegate errors`: the byte to blame is marked, wherever it stands and however wide the terminal is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.http.errors import Fault, RequestError
from tidegate.session.refusals import Refusals
from tidegate_tools.errors import lines, totals


def shown(data: bytes, at: int, width: int = 79, side: str = "client") -> list[str]:
    ring = Refusals()
    error = RequestError(400, Fault.HEADER, "malformed header line").blame(data, at)
    ring.note(error, listener="web", client="10.0.0.1", side=side)
    return lines(ring.last(1)[0].describe() | {"worker": 0}, width)


def test_a_refused_message_and_its_byte() -> None:
    head = b"GET / HTTP/1.1\r\nX: \xe9\0\r\n\r\n"
    first, second, excerpt, mark = shown(head, head.index(b"\0"))
    assert first.endswith(" web: header at byte 20 (0x00)")
    assert second == "    from 10.0.0.1: malformed header line"
    assert excerpt == r"    GET / HTTP/1.1\r\nX: \xe9\x00\r\n\r\n"
    assert mark == " " * excerpt.index(r"\x00") + "^^^^"
    assert shown(head, 0, side="backend")[1] == "    from the backend, for 10.0.0.1: malformed header line"


def test_without_a_byte_to_blame() -> None:
    first, _, excerpt = shown(b"GET / HTTP/1.1\r\n", -1)
    assert first.endswith(" web: header")
    assert excerpt == r"    GET / HTTP/1.1\r\n"
    assert len(shown(b"", -1)) == 2


@given(st.binary(min_size=1, max_size=300), st.data(), st.integers(1, 200))
def test_the_mark_stands_under_its_byte(data: bytes, draw: st.DataObject, width: int) -> None:
    at = draw.draw(st.integers(0, len(data) - 1))
    _, _, excerpt, mark = shown(data, at, width)
    assert len(excerpt) <= max(width, 24) >= len(mark)
    start, end = mark.index("^"), len(mark)
    assert mark[start:] == "^" * (end - start)
    assert excerpt[start:end].encode().decode("unicode_escape").encode("latin-1") == data[at : at + 1]


@pytest.mark.parametrize("width", [24, 40, 79, 200])
def test_more_is_shown_before_the_byte_than_behind_it(width: int) -> None:
    *_, excerpt, mark = shown(b"a" * 500 + b"!" + b"b" * 500, 500, width)
    assert excerpt[len(mark) - 1] == "!"
    assert excerpt.count("a") >= min(48, (width - 4) * 3 // 5)


@pytest.mark.parametrize(
    ("total", "answered", "said"),
    [
        (5, 2, "refused since the workers started: 5; shown: 0"),
        (3, 1, "refused by those that answered: 3; shown: 0; 1 of 2 workers did not answer"),
        (0, 0, "not known: 2 of 2 workers did not answer"),
    ],
)
def test_only_what_was_heard_is_counted(total: int, answered: int, said: str) -> None:
    assert totals({"total": total, "workers": 2, "answered": answered, "errors": [], "notes": []}) == said
