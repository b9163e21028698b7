"""Recordings: nothing is lost on the way to the file, it keeps its bound, and the page shows all of it."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from io import BytesIO
from pathlib import Path

import numpy
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread

from tidegate_tools import heatmap, heatmap_png
from tidegate_tools.heatmap_png import MissingExtra
from tidegate_tools.main import main
from tidegate_tools.recording import Entry, Frame, RecordingError, Writer, decode, encode, halve, merge, read

HISTOGRAM = st.dictionaries(st.integers(0, 39), st.integers(1, 10**6), max_size=6)
ENTRY = st.builds(
    Entry,
    waiting=st.integers(1, 10**4),
    gone=st.integers(0, 10**4),
    oldest_ns=st.integers(0, 10**12),
    queued=HISTOGRAM,
    accepted=st.integers(0, 10**6),
    taken=HISTOGRAM,
    dropped=st.dictionaries(st.sampled_from(["stale", "queue_full"]), st.integers(1, 10**6)),
    stale_after_ns=st.integers(0, 10**10),
)
NAMES = st.sampled_from(["127.0.0.1:80 web", "[::1]:443", "blue/0.0.0.0:22"])
FRAME = st.builds(
    Frame,
    at=st.integers(0, 2**33).map(float),
    seconds=st.integers(1, 1000).map(float),
    listeners=st.dictionaries(NAMES, ENTRY, max_size=3),
)


@settings(deadline=None)
@given(FRAME)
def test_a_frame_survives_the_file(frame: Frame) -> None:
    line = encode(frame)
    assert "\n" not in line
    assert decode(line) == frame


def test_an_idle_listener_takes_no_room() -> None:
    frame = Frame(1.0, 1.0, {"idle": Entry(stale_after_ns=5), "busy": Entry(waiting=1)})
    assert set(decode(encode(frame)).listeners) == {"busy"}


@settings(deadline=None)
@given(st.lists(FRAME, min_size=1, max_size=9))
def test_halving_keeps_sums_and_the_worst(frames: list[Frame]) -> None:
    halved = halve(frames)
    assert len(halved) == -(-len(frames) // 2)
    assert sum(frame.seconds for frame in halved) == sum(frame.seconds for frame in frames)
    for name in {name for frame in frames for name in frame.listeners}:
        before = [frame.listeners.get(name, Entry()) for frame in frames]
        after = [frame.listeners.get(name, Entry()) for frame in halved]
        assert sum(one.accepted for one in after) == sum(one.accepted for one in before)
        assert sum(sum(one.taken.values()) for one in after) == sum(sum(one.taken.values()) for one in before)
        assert max(one.oldest_ns for one in after) == max(one.oldest_ns for one in before)
        assert max(one.waiting for one in after) == max(one.waiting for one in before)


def test_the_worse_look_is_kept_whole() -> None:
    calm = Frame(1.0, 1.0, {"a": Entry(waiting=9, oldest_ns=5, queued={2: 9})})
    bad = Frame(2.0, 1.0, {"a": Entry(waiting=1, oldest_ns=900, queued={9: 1})})
    for pair in ((calm, bad), (bad, calm)):
        merged = merge(*pair).listeners["a"]
        assert (merged.waiting, merged.oldest_ns, merged.queued) == (9, 900, {9: 1})


def filled(path: Path, count: int, limit: int) -> list[int]:
    sizes = []
    with Writer(path, limit) as writer:
        for number in range(count):
            entry = Entry(waiting=1, oldest_ns=number, accepted=1, taken={20: 1}, dropped={"stale": 1})
            writer.add(Frame(float(number), 1.0, {"127.0.0.1:80 web": entry}))
            sizes.append(path.stat().st_size)
    return sizes


def test_the_file_keeps_its_bound_and_covers_all_of_the_time(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    assert max(filled(path, 3000, 20_000)) <= 20_000
    frames = list(read(path))
    assert sum(frame.seconds for frame in frames) == 3000
    assert sum(frame.listeners["127.0.0.1:80 web"].accepted for frame in frames) == 3000
    assert frames[-1].at == 2999
    assert len(frames) > 50
    assert [path.name for path in tmp_path.iterdir()] == ["a.rec"]


def test_a_cut_off_end_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    filled(path, 10, 1 << 20)
    path.write_bytes(path.read_bytes()[:-7])
    assert len(list(read(path))) == 9


@pytest.mark.parametrize(
    "content",
    [b"", b"hello\n", b'{"tidegate_recording": 99}\n', b"\xff\xfe\n", b'{"tidegate_recording": 1}\n{}\n'],
)
def test_what_is_no_recording_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.rec"
    path.write_bytes(content)
    with pytest.raises(RecordingError):
        list(read(path))
    result = CliRunner().invoke(main, ["plot", str(path), "--out", str(tmp_path / "a.html")])
    assert result.exit_code == 2
    assert str(path) in result.output


def svgs(page: str) -> list[ET.Element]:
    return [ET.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_the_page_shows_every_cell(tmp_path: Path) -> None:
    path, out = tmp_path / "a.rec", tmp_path / "a.html"
    with Writer(path, 1 << 20) as writer:
        for number in range(5):
            entry = Entry(
                waiting=2, oldest_ns=2 << 28, accepted=7, taken={20: 5, 21: 2}, dropped={"stale": 3},
                stale_after_ns=10**9,
            )  # fmt: skip
            writer.add(Frame(1000.0 + number, 1.0, {"127.0.0.1:80 <web>": entry}))
    result = CliRunner().invoke(main, ["plot", str(path), "--out", str(out), "--title", "a < b"])
    assert result.exit_code == 0, result.output
    page = out.read_text()
    (svg,) = svgs(page)
    cells = [rect for rect in svg.iter("rect") if rect.get("class") != "drop"]
    drops = [rect for rect in svg.iter("rect") if rect.get("class") == "drop"]
    assert (len(cells), len(drops)) == (10, 5)
    assert len({rect.get("fill") for rect in cells}) == 2
    assert any(line.get("class") == "stale" for line in svg.iter("line"))
    assert any(line.get("class") == "oldest" for line in svg.iter("polyline"))
    assert "accepted 35" in page
    assert "stale 15" in page
    assert "<web>" not in page
    assert "a &lt; b" in page


def colours(png: bytes) -> set[tuple[int, ...]]:
    """Of the pixels."""
    pixels = numpy.rint(imread(BytesIO(png), format="png")[:, :, :3] * 255).astype(int)
    return {tuple(map(int, one)) for one in numpy.unique(pixels.reshape(-1, 3), axis=0)}


def test_a_png_shows_cells_and_drops(tmp_path: Path) -> None:
    path, out = tmp_path / "a.rec", tmp_path / "a.png"
    seen = []
    for dropped in ({}, {"stale": 3}):
        with Writer(path, 1 << 20) as writer:
            for number in range(5):
                entry = Entry(waiting=2, oldest_ns=2 << 28, accepted=7, taken={20: 5, 21: 2}, dropped=dropped)
                writer.add(Frame(1000.0 + number, 1.0, {"127.0.0.1:80 web": entry}))
        result = CliRunner().invoke(main, ["plot", str(path), "--out", str(out)])
        assert result.exit_code == 0, result.output
        seen.append(colours(out.read_bytes()))
        path.unlink()
    without, with_drops = seen
    red = (214, 39, 40)  # matplotlib's tab:red
    assert red in with_drops
    assert red not in without
    assert {(68, 1, 84), (253, 231, 37)} <= without, "both ends of the scale"


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["plot", "x.rec", "--out", str(tmp_path / "a.gif")])
    assert result.exit_code == 2
    assert "none of .html, .htm, .png" in result.output


def test_without_matplotlib_a_png_is_refused_and_said_how_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match="needs matplotlib") as refused:
        heatmap_png.image([], "t")
    assert "tidegate[plot]" in refused.value.fix


@settings(deadline=None, max_examples=3)
@given(st.lists(FRAME, min_size=1, max_size=5))
def test_any_recording_makes_a_png(frames: list[Frame]) -> None:
    try:
        png = heatmap_png.image(frames, "t")
    except ValueError:
        assert not any(frame.listeners for frame in frames)
        return
    assert png.startswith(b"\x89PNG")


@settings(deadline=None)
@given(st.lists(FRAME, min_size=1, max_size=12))
def test_any_recording_makes_a_well_formed_page(frames: list[Frame]) -> None:
    try:
        page = heatmap.page(frames, "t")
    except ValueError:
        assert not any(frame.listeners for frame in frames)
        return
    for svg in svgs(page):
        for rect in svg.iter("rect"):
            assert 0 <= float(rect.get("x", "")) <= 1000
            assert -1 <= float(rect.get("y", "")) <= 500


def test_columns_are_bounded() -> None:
    frames = [Frame(float(i), 1.0, {"a": Entry(waiting=1, queued={20: 1}, oldest_ns=1)}) for i in range(5000)]
    thin = heatmap.thinned(frames, heatmap.MAX_COLUMNS)
    assert len(thin) <= heatmap.MAX_COLUMNS
    assert sum(frame.seconds for frame in thin) == 5000


def test_listeners_are_chosen_and_ordered() -> None:
    frame = Frame(1.0, 1.0, {"a": Entry(accepted=1), "b": Entry(accepted=9), "idle": Entry()})
    assert heatmap.busiest([frame], ()) == ["b", "a"]
    assert heatmap.busiest([frame], ("a",)) == ["a"]
    with pytest.raises(ValueError, match="nothing happened"):
        heatmap.page([frame], "t", ("nobody",))


@pytest.mark.parametrize("share", [-1.0, 0.0, 0.3, 1.0, 7.0])
def test_colours(share: float) -> None:
    assert re.fullmatch("#[0-9a-f]{6}", heatmap.colour(share))
