"""The verbs where HTTP is spoken: refused requests with their byte, sessions by their request's cluster."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator

import pytest
from harness.http_wire import ScriptedBackend, Wire, answer_ok, read_request
from harness.line_client import LineClient
from harness.ports import free_port
from harness.proc import Tidegate, run_tidegate, tcp_config
from harness.waiting import wait_until

GET = b"GET / HTTP/1.1\r\nHost: a\r\n"
CHUNKED = b"POST /good HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


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
    second = GET + b"Content-Length: 1\r\nContent-Length: "
    assert (length["fault"], length["position"], length["byte"]) == ("framing", len(second), ord("2"))
    assert (space["fault"], space["position"], space["byte"]) == ("header", len(GET) + 1, 0x20)
    assert [one["fault"] for one in gate.call("errors", {"limit": 1})["errors"]] == ["header"]


def test_every_kind_of_refused_message_is_shown_with_its_byte_marked() -> None:
    def broken(wire: Wire) -> None:
        read_request(wire)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1x\r\n\r\n")

    with ScriptedBackend(broken) as backend, ScriptedBackend(answer_ok) as good:
        config = tcp_config([backend.address], protocol="http", route=[
            {"path": {"prefix": "/private"}, "deny": 403}, {"path": {"prefix": "/good"}, "cluster": "good"},
        ])  # fmt: skip
        config["cluster"]["good"] = {"backends": [good.address]}
        config["listener"] += [
            {"name": name, "address": f"127.0.0.1:{free_port()}", "protocol": protocol, "cluster": "back",
             "proxy_protocol": "any", "trusted": ["127.0.0.0/8"]}
            for name, protocol in (("proxied", "http"), ("tcp", "tcp"))
        ]  # fmt: skip
        with Tidegate(config) as gate:
            for listener, message in (
                ("front", CHUNKED + b"5\r\nhello\r\nz\r\n"),
                ("front", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"),
                ("front", b"GET /good/%2e%2e/private HTTP/1.1\r\nHost: a\r\n\r\n"),
                ("proxied", b"PROXY TCP4 1.2.3.4 1.2.3.x 1 2\r\nGET / HTTP/1.1\r\n\r\n"),
                ("tcp", b"HELO\r\n"),
            ):  # fmt: skip
                before = gate.call("errors")["total"]
                with LineClient(gate.port(listener)) as client:
                    client.sock.sendall(message)
                    wait_until(lambda: gate.call("errors")["total"] > before, 5, f"{message!r} refused")  # noqa: B023
            shown = run_tidegate("errors", "--control", gate.control)
            assert shown.returncode == 0, shown.stderr
            blocks = re.findall(
                r"^[\d:]{8} (\w+): (\w+) at byte (\d+) \((0x\w\w)\)\n    from (the backend)?.*: .*\n"
                r"    (.*)\n    ( *)(\^+)$",
                shown.stdout,
                re.MULTILINE,
            )
            marked = [
                (listener, side, fault, int(position), int(byte, 16), excerpt[len(indent) :][: len(caret)])
                for listener, fault, position, byte, side, excerpt, indent, caret in blocks
            ]
            assert marked == [
                ("tcp", "", "proxy_header", 0, ord("H"), "H"),
                ("proxied", "", "proxy_header", 25, ord("x"), "x"),
                ("front", "", "ambiguous_path", 10, ord("%"), "%"),
                ("front", "the backend", "framing", 34, ord("x"), "x"),
                ("front", "", "body", 10, ord("z"), "z"),
            ]
            assert [line for line in shown.stdout.splitlines() if len(line) >= 80] == []


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
