"""Own answers: shape, files, when they close."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidegate.config.model import FixedAnswer
from tidegate.http.answers import CLOSING, AnswerFileError, Answers
from tidegate.http.limits import MAX_ANSWER_FILE
from tidegate.http.request import RequestParser, RequestRules
from tidegate.http.response import Response, ResponseMemo, ResponseParser
from tidegate.http.stamps import DateField

DATE = DateField(lambda: 1795471980.0)


def parts(answer: bytes) -> tuple[bytes, dict[bytes, bytes], bytes]:
    head, mark, body = answer.partition(b"\r\n\r\n")
    assert mark
    lines = head.split(b"\r\n")
    fields = dict(line.split(b": ", 1) for line in lines[1:])
    assert len(fields) == len(lines) - 1, "a field twice"
    return lines[0], fields, body


def well_formed(answer: bytes, *, head_only: bool = False) -> Response:
    """An answer must pass our own response parser."""
    method = b"HEAD" if head_only else b"GET"
    asked = RequestParser(RequestRules(b"http")).receive_head(method + b" / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert asked is not None
    parser = ResponseParser(ResponseMemo())
    parser.start(asked)
    response = parser.receive_head(answer)
    assert response is not None
    if parser.left:
        parser.receive_body(b"")
    assert parser.end() == b"" and not parser.rest
    return response


ALL = (400, 403, 404, 405, 408, 413, 414, 417, 421, 429, 431, 501, 502, 503, 504, 505)


@pytest.mark.parametrize("status", ALL)
def test_every_status(status: int) -> None:
    answers = Answers(DATE)
    answer = answers.answer(status)
    line, fields, body = parts(answer)
    assert line.startswith(b"HTTP/1.1 %d " % status) and len(line) > 13
    assert body == line[9:] + b"\n"
    assert fields[b"Content-Length"] == b"%d" % len(body)
    assert fields[b"Date"] == b"Mon, 23 Nov 2026 22:13:00 GMT"
    assert fields[b"Cache-Control"] == b"no-store"
    assert (fields.get(b"Connection") == b"close") is (status in CLOSING)
    assert (b"Allow" in fields) is (status == 405)
    assert well_formed(answer).status == status
    head = answers.answer(status, head_only=True)
    assert head == answer[: -len(body)]
    well_formed(head, head_only=True)


def test_closing_and_http_1_0() -> None:
    answers = Answers(DATE)
    assert parts(answers.answer(404, close=True))[1][b"Connection"] == b"close"
    assert b"Connection" not in parts(answers.answer(404))[1]
    assert parts(answers.answer(404, http10=True))[1][b"Connection"] == b"keep-alive"
    assert parts(answers.answer(400, http10=True))[1][b"Connection"] == b"close"


def test_retry_after_and_extra_lines() -> None:
    fields = parts(Answers(DATE).answer(503, retry_after_s=3, extra=b"\r\nX-A: b"))[1]
    assert (fields[b"Retry-After"], fields[b"X-A"]) == (b"3", b"b")
    assert b"Retry-After" not in parts(Answers(DATE).answer(503))[1]


def test_bodies_from_files(tmp_path: Path) -> None:
    html, odd = tmp_path / "503.html", tmp_path / "502"
    html.write_bytes("<h1>später</h1>".encode())
    odd.write_bytes(b"")
    answers = Answers(DATE, [(503, html), (502, odd)])
    html.unlink()
    _, fields, body = parts(answers.answer(503))
    assert body == "<h1>später</h1>".encode()
    assert fields[b"Content-Type"] == b"text/html; charset=utf-8"
    _, fields, body = parts(answers.answer(502))
    assert (fields[b"Content-Length"], body) == (b"0", b"")
    assert parts(answers.answer(504))[2] == b"504 Gateway Timeout\n"


def test_a_redirect_may_have_a_body_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "moved.html").write_text("<a href=/new>moved</a>")
    answers = Answers(DATE, [(302, tmp_path / "moved.html")])
    line, fields, body = parts(answers.redirect(302, b"/new"))
    assert line == b"HTTP/1.1 302 Found" and body == b"<a href=/new>moved</a>"
    assert (fields[b"Location"], fields[b"Content-Type"]) == (b"/new", b"text/html; charset=utf-8")
    assert well_formed(answers.redirect(302, b"/new")).status == 302
    assert parts(answers.redirect(302, b"/new", head_only=True))[1:] == (fields, b"")
    assert parts(answers.redirect(301, b"/new"))[2] == b""


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(AnswerFileError):
        Answers(DATE, [(503, tmp_path / "none")])
    large = tmp_path / "large.txt"
    large.write_bytes(b"x" * (MAX_ANSWER_FILE + 1))
    with pytest.raises(AnswerFileError):
        Answers(DATE, [(503, large)])
    large.write_bytes(b"x" * MAX_ANSWER_FILE)
    Answers(DATE, [(503, large)])


def test_redirects() -> None:
    answer = Answers(DATE).redirect(308, b"https://a.example/x?y")
    line, fields, body = parts(answer)
    assert line == b"HTTP/1.1 308 Permanent Redirect"
    assert fields[b"Location"] == b"https://a.example/x?y"
    assert (fields[b"Content-Length"], body) == (b"0", b"")
    well_formed(answer)


def test_fixed_answers() -> None:
    answers = Answers(DATE)
    _, fields, body = parts(answers.fixed(FixedAnswer(200, "grüß")))
    assert body == "grüß".encode() and fields[b"Content-Length"] == b"6"
    assert fields[b"Content-Type"] == b"text/plain; charset=utf-8"
    assert parts(answers.fixed(FixedAnswer(200, "ok"), head_only=True))[2] == b""
    for status in (204, 304):
        answer = answers.fixed(FixedAnswer(status, "not sent"))
        assert b"Content-Length" not in parts(answer)[1] and parts(answer)[2] == b""
        well_formed(answer)
    assert parts(answers.fixed(FixedAnswer(299)))[0] == b"HTTP/1.1 299 "


def test_dates_are_formatted_once_a_second() -> None:
    now = [1795471980.2]
    date = DateField(lambda: now[0])
    first = date.line()
    now[0] += 0.7
    assert date.line() is first
    now[0] += 0.2
    assert date.line() == b"\r\nDate: Mon, 23 Nov 2026 22:13:01 GMT"
