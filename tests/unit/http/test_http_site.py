"""A listener's HTTP side, compiled from its configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tidegate.config.loader import parse
from tidegate.config.model import Listener
from tidegate.http.accesslog import Record
from tidegate.http.answers import AnswerFileError
from tidegate.http.site import Site

BASE = '[[listener]]\naddress = "127.0.0.1:8080"\nprotocol = "http"\ncluster = "app"\n'
CLUSTER = '[cluster.app]\nbackends = ["127.0.0.1:9000"]\n'


def listener(more: str = "") -> Listener:
    return parse(BASE + more + CLUSTER, allow_pending=True).listeners[0]


def site(more: str = "", previous: Site | None = None) -> Site:
    return Site(listener(more), {}, lambda: 1795471980.0, previous)


def test_from_bytes_to_bytes() -> None:
    made = site('via = "edge"\n')
    parser = made.request_parser()
    request = parser.receive_head(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert request is not None
    action = made.routes.find(request)
    assert action.cluster == "app"
    head = made.request_form.head(request, made.peer("192.0.2.7", ("192.0.2.1", 80)), action.rewrite, 5)
    assert b"\r\nVia: 1.1 edge\r\n" in head
    backend = made.response_parser()
    backend.start(request)
    response = backend.receive_head(b"HTTP/1.1 204 No Content\r\n\r\n")
    assert response is not None and backend.free
    assert made.response_form.head(response, backend, request, False).startswith(
        b"HTTP/1.1 204 No Content\r\n"
    )


def test_trusted_networks() -> None:
    made = site('trusted = ["10.0.0.0/8", "2001:db8::/32"]\n')
    for address, trusted in [
        ("10.1.2.3", True),
        ("::ffff:10.1.2.3", True),
        ("2001:db8::1", True),
        ("192.0.2.1", False),
        ("fe80::1%lo", False),
        ("", False),
    ]:
        assert made.trusts(address) is trusted
        assert made.peer(address, ("192.0.2.1", 80)).trusted is trusted
    assert not site().trusts("10.1.2.3")


def test_limits_outlive_a_reload_that_leaves_them_alone() -> None:
    more = "limits = { requests_per_second = 1, burst = 1, connections_per_client = 1 }\n"
    first = site(more)
    assert first.rate is not None and first.connections is not None
    second = site(more + 'via = "other"\n', first)
    assert second.rate is first.rate and second.connections is first.connections
    third = site(more.replace("burst = 1", "burst = 2"), second)
    assert third.rate is not first.rate
    assert site().rate is None and site().connections is None


def test_answers_and_log() -> None:
    made = site('access_log = { path = "stdout", format = "json" }\n')
    assert made.log_line is not None
    assert json.loads(made.log_line(Record()))["status"] == 0
    assert site().log_line is None
    assert made.answers.answer(503).startswith(b"HTTP/1.1 503 Service Unavailable\r\n")


def test_a_missing_answer_file_is_an_operator_error(tmp_path: Path) -> None:
    page = tmp_path / "503.html"
    page.write_text("x")
    configured = listener(f'answers = {{ 503 = "{page}" }}\n')
    page.unlink()
    with pytest.raises(AnswerFileError):
        Site(configured, {}, lambda: 0.0)
