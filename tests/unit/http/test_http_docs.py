"""docs/http.md says what the code does: its numbers, and llhttp's laxness, tried."""

from __future__ import annotations

from pathlib import Path

import httptools
import pytest

from tidegate.http import limits
from tidegate.http.answers import CLOSING

DOC = (Path(__file__).parents[3] / "docs" / "http.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name",
    [
        "MAX_REQUEST_HEAD",
        "MAX_FIELD_LINES",
        "MAX_TARGET",
        "MAX_RESPONSE_HEAD",
        "MAX_RESPONSE_FIELD_LINES",
        "MAX_INTERIM",
        "MAX_CHUNK_LINE",
        "MAX_CHUNK_EXTENSIONS",
        "MAX_TRAILER",
        "MAX_TRAILER_LINES",
        "MAX_REQUEST_ID",
        "MAX_PROXY_V1",
        "MAX_PROXY_V2",
        "MAX_ANSWER_FILE",
        "MAX_CLIENTS",
    ],
)
def test_limits_are_as_documented(name: str) -> None:
    table = DOC.split("## Limits")[1].split("## ")[0]
    assert f" {getattr(limits, name):,}" in table


def test_closing_statuses_are_as_documented() -> None:
    assert f"({' '.join(map(str, sorted(CLOSING)))}) close the connection" in " ".join(DOC.split())


class Ear:
    def on_headers_complete(self) -> None:
        pass


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET   / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/0.9\r\n\r\n",
        b"GET / HTTP/2.0\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a b@\xff\r\n\r\n",
        b"GET /#x HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + b"0" * 500 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0;" + b"a" * 5000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 10_000 + b"\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nHost: b\r\n\r\n",
    ],
)
def test_llhttp_is_as_lax_as_documented(data: bytes) -> None:
    """When this fails, llhttp has become stricter: the document may say less."""
    httptools.HttpRequestParser(Ear()).feed_data(data)


def test_llhttp_is_lax_about_responses() -> None:
    httptools.HttpResponseParser(Ear()).feed_data(
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    )


@pytest.mark.parametrize(
    "data",
    [
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\t\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0 ; a\r\n\r\n",
    ],
)
def test_llhttp_is_as_strict_as_documented(data: bytes) -> None:
    with pytest.raises(httptools.HttpParserError):
        httptools.HttpRequestParser(Ear()).feed_data(data)
