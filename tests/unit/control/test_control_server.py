"""The server under clients of every kind: none of them stalls it, ends it, or is left without its answer."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tidegate.control import client, peer
from tidegate.control import server as server_module
from tidegate.control.peer import EventStream
from tidegate.control.protocol import MAX_REQUEST, Arg, VerbError, choice, integer
from tidegate.control.server import Args, ControlServer, Reply, Verb
from tidegate.errors import OperatorError
from tidegate.loop.reactor import Reactor

STATUS = b'{"v":1,"id":7,"verb":"echo","args":{"number":3}}\n'


class Bench:
    """A server whose loop the test turns; `later` holds replies that were not answered yet."""

    def __init__(self, path: Path) -> None:
        self.now = 0  # added to the real clock
        self.reactor = Reactor(lambda: time.monotonic_ns() + self.now)
        self.later: list[Reply] = []
        self.streams: list[EventStream] = []
        self.closed_streams = 0
        self.ran = 0
        self.path = str(path)
        number = Arg("number", integer(0, 10), "a number")
        verbs = {
            "echo": Verb(self._echo, "The number.", (number,)),
            "big": Verb(lambda args, reply: reply.ok({"big": "x" * 1_000_000}), "Much."),
            "later": Verb(lambda args, reply: self.later.append(reply), "When the test says."),
            "change": Verb(self._echo, "A mutation.", (number,), mutates=True),
            "stream": Verb(self._stream, "Events."),
            "refused": Verb(self._refused, "No.", (Arg("how", choice("verb", "operator", "fault"), "how"),)),
        }
        self.server = ControlServer(self.reactor, self.path, verbs)

    def _echo(self, args: Args, reply: Reply) -> None:
        self.ran += 1
        reply.ok({"number": args["number"]})

    def _stream(self, args: Args, reply: Reply) -> None:
        self.streams.append(reply.stream({"streaming": True}, self._on_close))

    def _on_close(self) -> None:
        self.closed_streams += 1

    def _refused(self, args: Args, reply: Reply) -> None:
        if args["how"] == "verb":
            raise VerbError("not_found", "there is none")
        if args["how"] == "operator":
            raise OperatorError("did not work", "try harder")
        raise RuntimeError("a fault")

    def turn(self, until: Callable[[], object], limit_s: float = 10.0) -> None:
        deadline = time.monotonic() + limit_s
        while not until():
            assert time.monotonic() < deadline, "the server does not answer"
            self.reactor.run_once(5_000_000)

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.path)
        sock.setblocking(False)
        return sock

    def read(self, sock: socket.socket, lines: int = 1) -> list[dict[str, Any]]:
        """That many answers, read while the server turns; fewer when it closes before."""
        data = bytearray()
        ended = False

        def enough() -> bool:
            nonlocal ended
            with contextlib.suppress(BlockingIOError):
                while chunk := sock.recv(1 << 20):
                    data.extend(chunk)
                ended = True
            return ended or data.count(b"\n") >= lines

        self.turn(enough)
        return [json.loads(line) for line in bytes(data).splitlines()]

    def ended(self, sock: socket.socket) -> bool:
        """Whether the server closes the connection (what it said before is dropped)."""

        def eof() -> bool:
            try:
                return not sock.recv(65536)
            except BlockingIOError:
                return False
            except ConnectionResetError:
                return True

        self.turn(eof)
        return True

    def still_serves(self) -> None:
        with contextlib.closing(self.connect()) as sock:
            sock.send(STATUS)
            (answer,) = self.read(sock)
            assert answer == {"v": 1, "id": 7, "ok": True, "result": {"number": 3}}


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "control.sock")
    yield bench
    bench.server.close()
    bench.reactor.run_once(0)
    bench.reactor.close()
    assert not bench.server.peers
    assert not Path(bench.path).exists()


def code(answer: dict[str, Any]) -> str:
    assert answer["ok"] is False
    return str(answer["error"]["code"])


def test_its_socket_is_its_users_alone(bench: Bench) -> None:
    assert stat.S_IMODE(os.stat(bench.path).st_mode) == 0o600


def test_requests_are_answered_in_order_on_one_connection(bench: Bench) -> None:
    with contextlib.closing(bench.connect()) as sock:
        for number in range(50):
            sock.send(json.dumps({"v": 1, "id": number, "verb": "echo", "args": {}}).encode() + b"\n")
        assert [answer["id"] for answer in bench.read(sock, 50)] == list(range(50))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"v":2,"id":1,"verb":"echo"}', "version"),
        (b'{"v":true,"id":1,"verb":"echo"}', "version"),
        (b'{"v":1,"id":1,"verb":"ehco"}', "unknown_verb"),
        (b'{"v":1,"id":1,"verb":["echo"]}', "unknown_verb"),
        (b'{"v":1,"id":1}', "unknown_verb"),
        (b'{"v":1,"id":1,"verb":"echo","args":{"number":11}}', "bad_argument"),
        (b'{"v":1,"id":1,"verb":"echo","args":[]}', "bad_argument"),
        (b'{"v":1,"id":1,"verb":"refused","args":{"how":"verb"}}', "not_found"),
        (b'{"v":1,"id":1,"verb":"refused","args":{"how":"operator"}}', "failed"),
    ],
)
def test_a_refusal_leaves_the_connection_usable(bench: Bench, line: bytes, expected: str) -> None:
    with contextlib.closing(bench.connect()) as sock:
        sock.send(line + b"\n" + STATUS)
        first, second = bench.read(sock, 2)
        assert code(first) == expected
        assert second["ok"]


def test_a_fault_of_a_verb_is_its_own(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.closing(bench.connect()) as sock:
        sock.send(b'{"v":1,"id":1,"verb":"refused","args":{"how":"fault"}}\n' + STATUS)
        first, second = bench.read(sock, 2)
    assert code(first) == "internal_error"
    assert "a fault" not in first["error"]["message"]
    assert second["ok"]
    assert "control_verb_failed" in caplog.text


@pytest.mark.parametrize("line", [b"hello\n", b"[]\n", b"\n", b"\xff\xff\n", b"GET / HTTP/1.1\r\n"])
def test_what_is_no_request_ends_its_connection(bench: Bench, line: bytes) -> None:
    with contextlib.closing(bench.connect()) as sock:
        sock.send(line + STATUS)
        (answer,) = bench.read(sock, 2)
        assert code(answer) == "malformed"
        assert bench.ended(sock)
    bench.still_serves()


@pytest.mark.parametrize("newline", [False, True])
def test_more_than_a_mebibyte_is_refused_and_said_so(bench: Bench, newline: bool) -> None:
    with contextlib.closing(bench.connect()) as sock:
        data = b"x" * (MAX_REQUEST + 70_000) + (b"\n" if newline else b"")
        sent = 0
        answer = b""

        def push() -> bool:
            nonlocal sent, answer
            with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                if sent < len(data):
                    sent += sock.send(data[sent : sent + 65536])
            with contextlib.suppress(BlockingIOError):
                answer += sock.recv(65536)
            return b"\n" in answer

        bench.turn(push)
        assert code(json.loads(answer)) == "too_large"
    bench.still_serves()


def test_a_request_of_just_a_mebibyte_is_read(bench: Bench) -> None:
    head = b'{"v":1,"id":1,"verb":"echo","args":{},"x":"'
    line = head + b"y" * (MAX_REQUEST - len(head) - 2) + b'"}\n'
    with contextlib.closing(bench.connect()) as sock:
        sent = 0

        def push() -> bool:
            nonlocal sent
            with contextlib.suppress(BlockingIOError):
                sent += sock.send(line[sent : sent + 65536])
            return sent == len(line)

        bench.turn(push)
        (answer,) = bench.read(sock)
        assert answer["ok"]


def test_a_flood_of_requests_in_one_write_does_not_hold_the_loop(bench: Bench) -> None:
    with contextlib.closing(bench.connect()) as flood, contextlib.closing(bench.connect()) as other:
        flood.send(STATUS * 400)
        bench.turn(lambda: bench.ran > 0)
        other.send(b'{"v":1,"id":"other","verb":"later","args":{}}\n')
        bench.turn(lambda: bench.later)
        assert bench.ran < 100, "the other one waits for a few of the flood, not for all of it"
        assert len(bench.read(flood, 400)) == 400


def test_who_does_not_read_is_not_served_further(bench: Bench) -> None:
    with contextlib.closing(bench.connect()) as sock:
        sock.send(b'{"v":1,"id":1,"verb":"big","args":{}}\n' * 30)
        for _ in range(50):
            bench.reactor.run_once(1_000_000)
        (one,) = bench.server.peers
        assert one.out_bytes < 3_000_000, "answers pile up for somebody who takes none"
        assert len(bench.read(sock, 30)) == 30


def test_a_byte_per_second_has_its_limit(bench: Bench) -> None:
    with contextlib.closing(bench.connect()) as sock:
        bench.turn(lambda: bench.server.peers)
        for byte in b'{"v":1,"i':
            sock.send(bytes([byte]))
            bench.now += 1_000_000_000
            bench.reactor.run_once(1_000_000)
            bench.still_serves()
        bench.now += 2_000_000_000
        assert bench.ended(sock)


def test_a_silent_peer_is_closed_and_one_that_waits_is_not(bench: Bench) -> None:
    with contextlib.closing(bench.connect()) as silent, contextlib.closing(bench.connect()) as waits:
        waits.send(b'{"v":1,"id":1,"verb":"later","args":{}}\n')
        bench.turn(lambda: bench.later)
        for _ in range(5):
            bench.now += peer.IDLE_NS // 2
            bench.reactor.run_once(5_000_000)
        assert bench.ended(silent)
        bench.later.pop().ok({})
        (answer,) = bench.read(waits)
        assert answer["ok"]


def test_a_half_closed_peer_gets_its_answers(bench: Bench) -> None:
    with contextlib.closing(bench.connect()) as sock:
        sock.send(STATUS + b'{"v":1,"id":8,"verb":"later","args":{}}\n' + STATUS)
        sock.shutdown(socket.SHUT_WR)
        bench.turn(lambda: bench.later)
        before = bench.reactor.iterations
        deadline = time.monotonic() + 0.2
        while time.monotonic() < deadline:
            bench.reactor.run_once(50_000_000)
        assert bench.reactor.iterations - before < 20, "the loop spins over a half-closed peer"
        bench.later.pop().ok({"late": True})
        assert [answer["id"] for answer in bench.read(sock, 3)] == [7, 8, 7]
        assert bench.ended(sock)


def test_who_leaves_before_the_answer_costs_nothing(bench: Bench) -> None:
    sock = bench.connect()
    sock.send(b'{"v":1,"id":1,"verb":"later","args":{}}\n')
    bench.turn(lambda: bench.later)
    sock.close()
    bench.turn(lambda: not bench.server.peers)
    bench.later.pop().ok({})
    bench.still_serves()


def test_fire_and_forget_is_done(bench: Bench) -> None:
    sock = bench.connect()
    sock.send(STATUS)
    sock.close()
    bench.turn(lambda: bench.ran == 1)
    bench.turn(lambda: not bench.server.peers)


def test_a_reply_answers_once(bench: Bench) -> None:
    with contextlib.closing(bench.connect()) as sock:
        sock.send(b'{"v":1,"id":1,"verb":"later","args":{}}\n' + STATUS)
        bench.turn(lambda: bench.later)
        reply = bench.later.pop()
        reply.ok({"first": True})
        reply.error("failed", "second")
        answers = bench.read(sock, 2)
        assert [answer["id"] for answer in answers] == [1, 7]
        assert answers[0]["result"] == {"first": True}


def test_a_hundred_clients_at_once(bench: Bench) -> None:
    socks = [bench.connect() for _ in range(100)]
    for number, sock in enumerate(socks):
        sock.send(json.dumps({"v": 1, "id": number, "verb": "echo", "args": {"number": 1}}).encode() + b"\n")
    for number, sock in enumerate(socks):
        (answer,) = bench.read(sock)
        assert (answer["id"], answer["ok"]) == (number, True)
        sock.close()


def test_room_is_made_from_the_idle_never_from_who_waits(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "MAX_PEERS", 3)
    waiting = [bench.connect() for _ in range(2)]
    for sock in waiting:
        sock.send(b'{"v":1,"id":1,"verb":"later","args":{}}\n')
    bench.turn(lambda: len(bench.later) == 2)
    idle = bench.connect()
    bench.turn(lambda: len(bench.server.peers) == 3)
    newcomer = bench.connect()
    assert bench.ended(idle)
    newcomer.send(b'{"v":1,"id":1,"verb":"later","args":{}}\n')
    bench.turn(lambda: len(bench.later) == 3)
    refused = bench.connect()
    (answer,) = bench.read(refused)
    assert code(answer) == "busy"
    for reply in bench.later:
        reply.ok({})
    for sock in [*waiting, newcomer]:
        assert bench.read(sock)[0]["ok"]
        sock.close()
    idle.close()
    refused.close()


def test_only_those_allowed_may_ask(bench: Bench) -> None:
    sock = bench.connect()
    sock.send(STATUS)
    assert bench.read(sock)[0]["ok"]
    bench.server.allow([12345])
    assert stat.S_IMODE(os.stat(bench.path).st_mode) == 0o666, "credentials decide now"
    assert bench.server.allowed == {0, os.geteuid(), 12345}
    bench.server.allowed = {12345}
    refused = bench.connect()
    (answer,) = bench.read(refused)
    assert code(answer) == "forbidden"
    assert bench.ended(refused)
    refused.close()
    bench.server.allow([])
    assert stat.S_IMODE(os.stat(bench.path).st_mode) == 0o600
    sock.close()


def test_each_mutation_leaves_a_line_and_asking_none(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("DEBUG")
    with contextlib.closing(bench.connect()) as sock:
        sock.send(STATUS)
        bench.read(sock)
        assert not [record for record in caplog.records if record.getMessage() == "control"]
        sock.send(b'{"v":1,"id":1,"verb":"change","args":{"number":4}}\n')
        sock.send(b'{"v":1,"id":1,"verb":"change","args":{"number":44}}\n')
        bench.read(sock, 2)
    kvs = [record.kv for record in caplog.records if record.getMessage() == "control"]  # type: ignore[attr-defined]
    assert [(kv["verb"], kv["args"], kv["result"]) for kv in kvs] == [
        ("change", '{"number": 4}', "ok"),
        ("change", '{"number": 44}', "bad_argument"),
    ]
    assert {(kv["uid"], kv["pid"]) for kv in kvs} == {(os.geteuid(), os.getpid())}


# streams


def test_a_stream_goes_on_and_ends_with_its_reader(bench: Bench) -> None:
    sock = bench.connect()
    sock.send(b'{"v":1,"id":"s","verb":"stream","args":{}}\n')
    assert bench.read(sock)[0]["result"] == {"streaming": True}
    (stream,) = bench.streams
    stream.send('{"a":1}')
    assert bench.read(sock) == [{"v": 1, "id": "s", "event": {"a": 1}}]
    bench.now += 10 * peer.IDLE_NS
    bench.reactor.run_once(5_000_000)
    stream.send('{"a":2}')
    assert bench.read(sock) == [{"v": 1, "id": "s", "event": {"a": 2}}]
    sock.close()
    bench.turn(lambda: bench.closed_streams == 1)
    stream.send('{"a":3}')
    bench.still_serves()


def test_a_stream_nobody_reads_loses_events_and_says_how_many(bench: Bench) -> None:
    with contextlib.closing(bench.connect()) as sock:
        sock.send(b'{"v":1,"id":1,"verb":"stream","args":{}}\n')
        bench.read(sock)
        (stream,) = bench.streams
        event = json.dumps({"text": "x" * 10_000})
        for _ in range(1000):
            stream.send(event)
        assert stream.lost > 500
        (one,) = bench.server.peers
        assert one.out_bytes < peer.STREAM_HIGH + 20_000
        kept = 1000 - stream.lost
        lost = stream.lost
        assert len(bench.read(sock, kept)) == kept
        stream.send('{"text":"after"}')
        assert [
            {key: line[key] for key in line if key not in ("v", "id")} for line in bench.read(sock, 2)
        ] == [
            {"lost": lost},
            {"event": {"text": "after"}},
        ]


def test_a_stream_that_is_ended_delivers_what_was_sent_and_closes(bench: Bench) -> None:
    with contextlib.closing(bench.connect()) as sock:
        sock.send(b'{"v":1,"id":1,"verb":"stream","args":{}}\n' * 2)
        bench.read(sock)
        (stream,) = bench.streams
        event = json.dumps({"text": "x" * 10_000})
        for _ in range(50):
            stream.send(event)
        stream.end()
        stream.end()
        assert bench.closed_streams == 1
        lines = bench.read(sock, 51)  # one more than there are: until it closes
        assert len(lines) == 50
        assert all("event" in line for line in lines), "the request behind it is not looked at"
    assert not bench.server.peers


def test_there_are_so_many_streams_and_no_more(bench: Bench) -> None:
    socks = [bench.connect() for _ in range(peer.MAX_STREAMS + 1)]
    answers = []
    for sock in socks:
        sock.send(b'{"v":1,"id":1,"verb":"stream","args":{}}\n')
        answers += bench.read(sock)
    assert [answer["ok"] for answer in answers] == [True] * peer.MAX_STREAMS + [False]
    assert code(answers[-1]) == "busy"
    for sock in socks:
        sock.close()
    bench.turn(lambda: bench.closed_streams == peer.MAX_STREAMS)


# whatever comes


fragments = st.sampled_from(
    [
        STATUS,
        b'{"v":1,"id":1,"verb":"change","args":{"number":1}}\n',
        b'{"v":1,"id":1,"verb":"nope"}\n',
        b'{"v":9}\n',
        b"\n",
        b"{",
        b'"',
        b"x" * 5000,
        b"[" * 3000 + b"\n",
        b"\x00\xff\n",
        b'{"v":1,"id":1,"verb":"big","args":{}}\n',
    ]
) | st.binary(max_size=50)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.lists(st.tuples(fragments, st.sampled_from(["", "turn", "read", "half", "close"])), max_size=12))
def test_whatever_a_peer_does_the_next_one_is_served(bench: Bench, steps: list[tuple[bytes, str]]) -> None:
    sock = bench.connect()
    with contextlib.suppress(OSError):
        for data, then in steps:
            with contextlib.suppress(BlockingIOError):
                sock.send(data)
            if then == "turn":
                bench.reactor.run_once(1_000_000)
            elif then == "read":
                sock.recv(65536)
            elif then == "half":
                sock.shutdown(socket.SHUT_WR)
            elif then == "close":
                break
    bench.still_serves()
    sock.close()
    bench.turn(lambda: not bench.server.peers)


# the client


def test_the_client_gets_results_refusals_and_streams(bench: Bench) -> None:
    found: list[Any] = []

    def ask() -> None:
        found.append(client.call(bench.path, "echo", {"number": 5}))
        with pytest.raises(client.ControlError) as refused:
            client.call(bench.path, "echo", {"number": 50})
        found.append(refused.value.code)
        events = client.stream(bench.path, "stream")
        found.extend(next(events) for _ in range(2))
        events.close()
        big = client.call(bench.path, "big")
        found.append(len(big["big"]))

    thread = threading.Thread(target=ask)
    thread.start()
    bench.turn(lambda: bench.streams)
    bench.streams[0].send('{"n":1}')
    bench.streams[0].send('{"n":2}')
    bench.turn(lambda: not thread.is_alive())
    assert found == [{"number": 5}, "bad_argument", {"event": {"n": 1}}, {"event": {"n": 2}}, 1_000_000]
