"""The verbs where HTTP is spoken: refused requests with their byte, sessions by their request's cluster."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from harness.http_wire import ScriptedBackend, Wire, answer_ok, read_request
from harness.line_client import LineClient
from harness.proc import Tidegate, tcp_config
from harness.waiting import wait_until

GET = b"GET / HTTP/1.1\r\nHost: a\r\n"


@pytest.fixture
def gate() -> Iterator[Tidegate]:
    with (
        ScriptedBackend(answer_ok) as backend,
        Tidegate(tcp_config([backend.address], workers=2, protocol="http")) as one,
    ):
        yield one


def test_refused_requests_are_shown_with_the_offending_byte(gate: Tidegate) -> None:
    for field in (b"X: a\0b\r\n\r\n", b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", b"X : y\r\n\r\n"):
        with LineClient(gate.port()) as client:
            client.sock.sendall(GET + field)
            assert client.hear().startswith("HTTP/1.1 400 ")
    answer = gate.call("errors")
    assert (answer["total"], answer["notes"]) == (3, [])
    space, length, nul = answer["errors"]
    assert {(one["listener"], one["client"].partition(":")[0]) for one in answer["errors"]} == {
        ("front", "127.0.0.1")
    }
    assert (nul["fault"], nul["position"], nul["byte"]) == ("header", len(GET) + 4, 0)
    assert nul["excerpt"].endswith("X: a\\x00b\\r\\n\\r\\n")
    assert length["fault"] == "framing"
    assert (space["fault"], space["position"], space["byte"]) == ("header", len(GET) + 1, 0x20)
    assert [one["fault"] for one in gate.call("errors", {"limit": 1})["errors"]] == ["header"]


def test_maintenance_ends_the_requests_at_that_backend_and_no_others() -> None:
    going_on = threading.Event()

    def hold(wire: Wire) -> None:
        read_request(wire)
        going_on.wait(20)

    with ScriptedBackend(hold) as slow, ScriptedBackend(answer_ok) as other:
        config = tcp_config([slow.address], protocol="http", route=[
            {"path": {"prefix": "/other"}, "cluster": "other"},
        ])  # fmt: skip
        config["cluster"]["other"] = {"backends": [other.address]}
        with Tidegate(config) as gate, LineClient(gate.port()) as held, LineClient(gate.port()) as idle:
            held.sock.sendall(GET + b"\r\n")
            idle.sock.sendall(b"GET /other HTTP/1.1\r\nHost: a\r\n\r\n")
            assert idle.hear().startswith("HTTP/1.1 200 ")
            wait_until(lambda: gate.call("sessions", {"backend": slow.address})["matched"] == 1, 5, "it")
            assert gate.call("sessions", {"cluster": "back"})["matched"] == 1
            assert gate.call("sessions")["matched"] == 2
            place = {"cluster": "back", "backend": slow.address}
            assert gate.call("backend.maintenance", place)["killed"] == 1
            assert held.end() in ("reset", "eof")
            assert gate.call("sessions")["matched"] == 1, "the other one is between two requests"
            going_on.set()
