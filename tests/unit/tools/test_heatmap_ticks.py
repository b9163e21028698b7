"""Ticks of the PNG: round times, plain numbers, and titles as they were typed."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate_tools import heatmap_png, heatmap_ticks
from tidegate_tools.recording import Entry, Frame


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (4, 4.04, ["4"]),
        (4, 10, ["4", "5", "6", "7", "8", "9", "10"]),
        (6, 9, ["6", "7", "8", "9"]),
        (0.1, 20, ["0.1", "0.2", "0.5", "1", "2", "5", "10", "20"]),
        (1, 1e6, ["1", "10", "100", "1000", "10000", "100000", "1000000"]),
        (4.5, 4.545, ["4.5"]),
    ],
)
def test_rates_are_plain_numbers(low: float, high: float, texts: list[str]) -> None:
    places, found = heatmap_ticks.rates(low, high)
    assert found == texts
    assert [float(one) for one in found] == pytest.approx(places)


@given(st.floats(1e-3, 1e7), st.floats(1.01, 1e6))
def test_there_is_always_a_rate(low: float, factor: float) -> None:
    places, texts = heatmap_ticks.rates(low, low * factor)
    assert 1 <= len(places) == len(texts) <= 12
    assert all("e" not in text for text in texts)


def test_times_are_whole_seconds() -> None:
    places, texts = heatmap_ticks.times(1_700_000_000.3, 20)
    assert places == pytest.approx([4.7, 9.7, 14.7, 19.7])
    assert texts == [
        time.strftime("%H:%M:%S", time.localtime(1_700_000_005 + 5 * number)) for number in range(4)
    ]


@given(st.floats(1e9, 2e9), st.floats(0.1, 1e8))
def test_texts_of_times_are_where_they_say(start: float, seconds: float) -> None:
    places, texts = heatmap_ticks.times(start, seconds)
    assert len(places) == len(texts) <= 9
    assert all(-1e-3 <= place <= seconds + 1e-3 for place in places)
    assert len(set(texts)) == len(texts) or seconds > 86_400
    if seconds >= 1:
        assert places


def test_a_title_is_no_mathematics() -> None:
    frames = [Frame(1000.0, 1.0, {"$a_b$": Entry(waiting=1, oldest_ns=1000, queued={9: 1})})]
    assert heatmap_png.image(frames, r"$\nosuchcommand$"), "it would be an error as mathematics"
