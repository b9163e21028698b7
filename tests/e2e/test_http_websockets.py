"""WebSocket through the proxy, by the websockets library on either side, and the stream that it becomes."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest
from harness.app_servers import uvicorn
from harness.http_wire import HttpClient, ScriptedBackend, Wire, read_head
from harness.proc import Tidegate, tcp_config
from harness.waiting import wait_until
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.sync.server import Server, ServerConnection, serve

MIB = 1 << 20


def echo(peer: ServerConnection) -> None:
    """Sends back what comes. "bye" makes it close first, "push N" makes it send N messages unasked."""
    for message in peer:
        if message == "bye":
            peer.close(4001, "as told")
        elif isinstance(message, str) and message.startswith("push "):
            for at in range(int(message.removeprefix("push "))):
                peer.send(f"pushed {at}")
        else:
            peer.send(message)


@contextlib.contextmanager
def websocket_server(ended: list[tuple[int | None, str | None]]) -> Iterator[str]:
    """The library's server; how each connection was closed goes to `ended`."""

    def handler(peer: ServerConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            echo(peer)
        ended.append((peer.close_code, peer.close_reason))

    server: Server
    with serve(handler, "127.0.0.1", 0, max_size=4 * MIB) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join(10)


def websocket(gate: Tidegate, path: str = "/ws") -> AbstractContextManager[ClientConnection]:
    return connect(f"ws://{gate.address()}{path}", max_size=4 * MIB, proxy=None)


@contextlib.contextmanager
def proxy(address: str) -> Iterator[Tidegate]:
    with Tidegate(tcp_config([address], protocol="http", front_timeout="30s")) as gate:
        yield gate


def exchange(client: ClientConnection) -> None:
    """Text, binary, empty and large messages there and back, several on the way at a time, and pings."""
    for message in (
        "text",
        "t\u00e9xt \u20ac",
        b"\x00\xff",
        b"",
        "",
        os.urandom(MIB),
        "x" * MIB,
        os.urandom(3 * MIB),
    ):
        client.send(message)
        assert client.recv(20) == message
    many = [os.urandom(50_000) for _ in range(40)]
    sender = threading.Thread(target=lambda: [client.send(message) for message in many])
    sender.start()
    assert [client.recv(20) for _ in many] == many
    sender.join(10)
    assert client.ping().wait(10)


def test_the_websockets_library_on_both_sides() -> None:
    ended: list[tuple[int | None, str | None]] = []
    with websocket_server(ended) as server, proxy(server) as gate:
        with websocket(gate) as client:
            exchange(client)
            client.send("push 100")
            assert [client.recv(20) for _ in range(100)] == [f"pushed {at}" for at in range(100)]
            client.close(4000, "enough")
        wait_until(lambda: ended == [(4000, "enough")], 5, "the client's close at the server")
        with websocket(gate) as client:
            client.send("bye")
            with pytest.raises(ConnectionClosed) as caught:
                client.recv(10)
            assert caught.value.rcvd is not None
            assert (caught.value.rcvd.code, caught.value.rcvd.reason) == (4001, "as told")
        wait_until(lambda: len(ended) == 2, 5, "the server's close")
        with websocket(gate) as client:
            client.socket.shutdown(socket.SHUT_RDWR)  # leaves without a word
            wait_until(lambda: len(ended) == 3, 5, "the server to hear of it")
        assert ended[2][0] == 1006
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(websocket(gate)) for _ in range(20)]
            for at, client in enumerate(clients):
                client.send(f"client {at}")
            assert [client.recv(10) for client in clients] == [f"client {at}" for at in range(20)]
        wait_until(lambda: gate.listener()["sessions"] == 0, 5, "the sessions to end")
        listener = gate.listener()
        assert listener["ended"]["internal_error"] == 0
        assert min(listener["bytes_in"], listener["bytes_out"]) > 5 * MIB  # some of it was compressed


@pytest.mark.parametrize("parser", ["h11", "httptools"])
def test_websockets_of_uvicorn(parser: str) -> None:
    with uvicorn(parser, ws="websockets") as server, proxy(server.address) as gate:
        with websocket(gate, "/echo") as client:
            exchange(client)
            client.send("bye")
            with pytest.raises(ConnectionClosed) as caught:
                client.recv(10)
            assert caught.value.rcvd is not None and caught.value.rcvd.code == 4001
        with pytest.raises(InvalidStatus) as refused, websocket(gate, "/refused"):
            pass  # no upgrade after all: a plain response
        assert refused.value.response.status_code == 403
        with HttpClient(gate.port()) as plain:
            assert plain.get("/").status == plain.get("/again").status == 200
        with websocket(gate, "/echo") as client:
            client.send("still")
            assert client.recv(10) == "still"


@pytest.mark.parametrize("first", ["client", "backend"])
def test_half_closed_after_an_upgrade_the_other_direction_goes_on(first: str) -> None:
    content = os.urandom(2 * MIB)
    got: list[bytes] = []

    def switched(wire: Wire) -> None:
        read_head(wire)
        wire.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: raw\r\n\r\n")
        if first == "client":
            got.append(wire.rest())
            wire.send(content)
        else:
            wire.send(b"that is all")
            wire.sock.shutdown(socket.SHUT_WR)
            got.append(wire.rest())

    with (
        ScriptedBackend(switched) as backend,
        proxy(backend.address) as gate,
        HttpClient(gate.port()) as client,
    ):
        client.send(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: raw\r\n\r\n")
        assert read_head(client).status == 101
        if first == "client":
            client.send(b"that is all")
            client.sock.shutdown(socket.SHUT_WR)
            assert client.rest() == content
            assert got == [b"that is all"]
        else:
            assert client.rest() == b"that is all"
            client.send(content)
            client.sock.shutdown(socket.SHUT_WR)
            wait_until(lambda: got, 10, "the client's bytes")
            assert got == [content]
        wait_until(lambda: gate.listener()["sessions"] == 0, 5, "the session's end")
        assert gate.listener()["ended"]["done"] == 1
