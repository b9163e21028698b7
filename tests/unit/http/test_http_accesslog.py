"""Access log lines: one line each whatever the peer sent, and JSON that is JSON."""

from __future__ import annotations

import json
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.http.accesslog import Record, formatter, json_line, text_line, timestamp


def record(**values: object) -> Record:
    made = Record()
    made.time_ns = 1_795_471_980_123_456_789
    made.client = "192.0.2.7:4711"
    made.listener = "web"
    made.method = b"GET"
    made.host = b"a.example"
    made.path = b"/x?y"
    made.status = 200
    made.bytes_in, made.bytes_out = 120, 4096
    made.queue_age_ns, made.total_ns = 1_500, 2_000_999
    made.connect_ns, made.first_byte_ns = -1, 900_000
    made.backend = "127.0.0.1:9000"
    made.retries, made.reused = 1, True
    made.end_reason = "done"
    made.request_id = b"abc"
    for name, value in values.items():
        setattr(made, name, value)
    return made


def test_text() -> None:
    assert text_line(record()) == (
        '2026-11-23T22:13:00.123Z 192.0.2.7:4711 web "GET /x?y" a.example 200 120/4096 queue_age_us=1 '
        "total_us=2000 connect_us=- first_byte_us=900 backend=127.0.0.1:9000 "
        "retries=1 reused=1 end=done id=abc\n"
    )


def test_json() -> None:
    assert json.loads(json_line(record())) == {
        "time": "2026-11-23T22:13:00.123Z",
        "client": "192.0.2.7:4711",
        "listener": "web",
        "method": "GET",
        "host": "a.example",
        "path": "/x?y",
        "status": 200,
        "bytes_in": 120,
        "bytes_out": 4096,
        "queue_age_us": 1,
        "total_us": 2000,
        "connect_us": None,
        "first_byte_us": 900,
        "backend": "127.0.0.1:9000",
        "retries": 1,
        "reused": True,
        "end": "done",
        "request_id": "abc",
    }


def test_an_empty_record() -> None:
    assert text_line(Record()).startswith('1970-01-01T00:00:00.000Z - - "- -" - - 0/0 queue_age_us=- ')
    assert json.loads(json_line(Record()))["status"] == 0


@given(st.binary(max_size=30), st.text(max_size=20), st.sampled_from(["text", "json"]))
@settings(deadline=None)
def test_whatever_was_sent_it_is_one_line_of_printable_ascii(raw: bytes, name: str, form: str) -> None:
    line = formatter(form)(
        record(path=raw, method=raw, host=raw, request_id=raw, listener=name, backend=name)
    )
    assert line.endswith("\n") and line.count("\n") == 1
    assert re.fullmatch(r"[ -~]*", line[:-1])
    if form == "json":
        read = json.loads(line)
        assert read["path"].encode("latin-1") == raw and read["listener"] == name
    else:
        # The quoted part can be told from the rest, and the fields behind it counted.
        assert re.fullmatch(r'[^" ]+ [^" ]+ [^" ]+ "[^"]*" [^"]*', line[:-1])
        assert len(line[:-1].rpartition('"')[2].split(" ")) == 13


def test_timestamps() -> None:
    assert timestamp(0) == "1970-01-01T00:00:00.000Z"
    assert timestamp(1_999_999_999) == "1970-01-01T00:00:01.999Z"
