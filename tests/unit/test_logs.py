"""Log lines: what they look like, that no value can forge one, and what the limiter says."""

from __future__ import annotations

import io
import json
import logging
import re
import shlex
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate import logs

LOG = logging.getLogger("tidegate.unit")


@pytest.fixture
def restored() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger(logs.ROOT)
    handlers, level = list(root.handlers), ours.level
    yield
    root.handlers[:] = handlers
    ours.setLevel(level)


@pytest.fixture
def text(restored: None) -> io.StringIO:
    stream = io.StringIO()
    logs.setup("info", "text", stream)
    return stream


def test_line_has_time_level_event_and_fields(text: io.StringIO) -> None:
    logs.event(LOG, logging.INFO, "ready", workers=2, control="/run/t.sock", quick=True, reason=None)
    line = text.getvalue()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z level=info event=ready workers=2 control=/run/t.sock"
        r" quick=true reason=-\n",
        line,
    )


def test_stdlib_call_with_kv_is_the_same_line(text: io.StringIO) -> None:
    LOG.info("ready", extra={"kv": {"workers": 2}})
    logs.event(LOG, logging.INFO, "ready", workers=2)
    first, second = text.getvalue().splitlines()
    assert first.split(" ", 1)[1] == second.split(" ", 1)[1] == "level=info event=ready workers=2"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a b", '"a b"'),
        ("", '""'),
        ("-", '"-"'),
        ('say "x"', r'"say \"x\""'),
        ("a\nlevel=error", r'"a\nlevel=error"'),
        ("\x1b[31m", r'"\x1b[31m"'),
        (b"GET /\r\n\x00\xff", r'"GET /\r\n\x00\xff"'),
        ("\u2028\x85", r'"\u2028\x85"'),
        ("a\\nb", r'"a\\nb"'),
        ("k=v", '"k=v"'),
        ("café", '"café"'),
        ("[::1]:80", "[::1]:80"),
        ((1, 2), "1,2"),
        ({"b", "a"}, "a,b"),
        (1.5, "1.5"),
    ],
)
def test_values(value: object, shown: str) -> None:
    assert logs.text_value(value) == shown


@settings(deadline=None)
@given(st.dictionaries(st.from_regex(r"[a-z]{3,8}", fullmatch=True), st.text() | st.binary(), max_size=4))
def test_no_value_forges_a_line_or_a_field(kv: dict[str, object]) -> None:
    record = logging.LogRecord("tidegate.x", logging.INFO, "", 0, "probe", (), None)
    record.kv = kv
    line = logs.TextFormatter().format(record)
    assert line.isprintable()
    fields = dict(token.split("=", 1) for token in shlex.split(line)[1:])
    renamed = {f"{key}_" if key in ("level", "event", "time", "logger", "exception") else key for key in kv}
    assert set(fields) == {"level", "event"} | renamed
    assert fields["event"] == "probe"


@settings(deadline=None)
@given(st.dictionaries(st.text(min_size=1), st.text() | st.binary() | st.floats() | st.lists(st.integers())))
def test_json_lines_parse_strictly(kv: dict[str, object]) -> None:
    record = logging.LogRecord("tidegate.x", logging.WARNING, "", 0, "probe", (), None)
    record.kv = kv
    line = logs.JsonFormatter().format(record)
    assert "\n" not in line and line.isascii()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    parsed = json.loads(line, parse_constant=refuse)
    assert parsed["event"] == "probe" and parsed["level"] == "warning" and parsed["logger"] == "tidegate.x"


def test_reserved_names_do_not_replace_ours(text: io.StringIO) -> None:
    logs.event(LOG, logging.INFO, "odd", level="forged", name="n", logger="l")
    assert text.getvalue().split(" ", 1)[1] == "level=info event=odd level_=forged name=n logger_=l\n"


def test_exception_stays_on_one_line(text: io.StringIO) -> None:
    try:
        raise ValueError("bad\nthing")
    except ValueError:
        LOG.exception("crashed")
    lines = text.getvalue().splitlines()
    assert len(lines) == 1
    assert "ValueError: bad\\nthing" in lines[0]


def test_long_values_are_cut_and_say_so() -> None:
    shown = logs.text_value("x" * (logs.MAX_VALUE + 7))
    assert shown.endswith('...(+7 characters)"') and len(shown) < logs.MAX_VALUE + 40


def test_level_off_makes_no_record(text: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    class Loud:
        def __str__(self) -> str:
            raise AssertionError("formatted although the level is off")

    monkeypatch.setattr(logging.Logger, "makeRecord", lambda *_a, **_k: pytest.fail("made a record"))
    logs.event(LOG, logging.DEBUG, "hidden", value=Loud())
    assert logs.RateLimited(LOG).event(logging.DEBUG, "hidden", value=Loud()) is False
    assert text.getvalue() == ""


def test_broken_str_keeps_the_line(text: io.StringIO) -> None:
    class Broken:
        def __str__(self) -> str:
            raise RuntimeError

    logs.event(LOG, logging.INFO, "odd", value=Broken(), after=1)
    assert text.getvalue().endswith('value="<Broken>" after=1\n')


def test_setup_replaces_and_other_libraries_speak_from_warning(restored: None) -> None:
    first, second = io.StringIO(), io.StringIO()
    logs.setup("debug", "text", first)
    logs.setup("warning", "json", second)
    LOG.info("quiet")
    LOG.warning("loud")
    logging.getLogger("otherlib").warning("odd %s", "thing")
    assert first.getvalue() == ""
    assert [json.loads(line)["event"] for line in second.getvalue().splitlines()] == ["loud", "odd thing"]


@pytest.mark.parametrize(("level", "form"), [("loud", "text"), ("info", "xml")])
def test_setup_refuses_unknown_names(restored: None, level: str, form: str) -> None:
    with pytest.raises(ValueError, match="one of"):
        logs.setup(level, form)


def test_a_log_that_cannot_be_written_is_counted_and_told_later(restored: None) -> None:
    class Choked(io.StringIO):
        broken = True

        def write(self, text: str) -> int:
            if self.broken:
                raise BlockingIOError
            return super().write(text)

    stream = Choked()
    logs.setup("info", "text", stream)
    LOG.info("one")
    LOG.info("two")
    stream.broken = False
    LOG.info("three")
    LOG.info("four")
    events = [line.split(" ", 2)[2] for line in stream.getvalue().splitlines()]
    assert events == ["event=log_lost lines=2", "event=three", "event=four"]


class Clock:
    def __init__(self) -> None:
        self.ns = 0

    def __call__(self) -> int:
        return self.ns


def fields(stream: io.StringIO) -> list[str]:
    return [line.split(" ", 2)[2] for line in stream.getvalue().splitlines()]


def test_limiter_counts_what_it_held_back(text: io.StringIO) -> None:
    clock = Clock()
    limited = logs.RateLimited(LOG, per_second=1, clock_ns=clock)
    assert limited.event(logging.WARNING, "stale", n=1) is True
    assert [limited.event(logging.WARNING, "stale", n=2) for _ in range(5)] == [False] * 5
    assert limited.event(logging.WARNING, "other", n=3) is True
    clock.ns = 1_000_000_000
    assert limited.event(logging.WARNING, "stale", n=4) is True
    assert fields(text) == ["event=stale n=1", "event=other n=3", "event=stale n=4 suppressed=5"]


def test_limiter_flush_tells_the_rest_once(text: io.StringIO) -> None:
    limited = logs.RateLimited(LOG, per_second=2, clock_ns=Clock())
    for n in range(5):
        limited.event(logging.WARNING, "stale", n=n)
    assert limited.flush() == 3
    assert limited.flush() == 0
    assert fields(text) == ["event=stale n=0", "event=stale n=1", "event=suppressed of=stale count=3"]


@settings(deadline=None)
@given(st.lists(st.integers(min_value=0, max_value=3_000_000_000), min_size=1, max_size=200))
def test_limiter_loses_no_count(gaps: list[int]) -> None:
    clock, shown = Clock(), 0
    stream = io.StringIO()
    logger = logging.Logger("tidegate.limited", logging.INFO)
    handler = logs.LineHandler(stream)
    handler.setFormatter(logs.TextFormatter())
    logger.addHandler(handler)
    limited = logs.RateLimited(logger, per_second=1, clock_ns=clock)
    for gap in gaps:
        clock.ns += gap
        shown += limited.event(logging.INFO, "e")
    limited.flush()
    counted = sum(int(n) for n in re.findall(r"(?:suppressed|count)=(\d+)", stream.getvalue()))
    assert shown + counted == len(gaps)
    assert shown <= 2 + clock.ns // 1_000_000_000
