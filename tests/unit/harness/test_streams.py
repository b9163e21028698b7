"""The digest streams notice damage, and bad habits alone are not damage."""

from __future__ import annotations

import socket
import threading

import pytest
from harness.backends import Backend
from harness.pattern import CHUNK, Pattern, digest, new_digest
from harness.streams import Exchange, Stream, assert_intact, mixed


def test_every_habit_arrives_intact_without_a_proxy() -> None:
    with Backend("exchange") as backend:
        done = Exchange(("127.0.0.1", backend.port), mixed(12, 600_000, seed=4)).run(60)
        assert_intact(done, backend)
        reset = [record for record in done if record.stream.reset_after]
        assert reset, "the draw has to include resets"
        seen = backend.stats()["done"]
        assert all(seen[r.stream.id]["error"] or not seen[r.stream.id]["eof"] for r in reset)


class BadRelay:
    """A relay that damages what it passes on, once, after 100 kB."""

    def __init__(self, target: int, damage: str) -> None:
        self.target = target
        self.damage = damage
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.threads = [threading.Thread(target=self.relay, daemon=True)]
        self.threads[0].start()

    def relay(self) -> None:
        client, _ = self.listener.accept()
        back = socket.create_connection(("127.0.0.1", self.target))
        other = threading.Thread(target=self.pump, args=(back, client, False), daemon=True)
        other.start()
        self.pump(client, back, True)
        other.join(10)
        client.close()
        back.close()

    def pump(self, source: socket.socket, target: socket.socket, damages: bool) -> None:
        passed = 0
        while data := source.recv(4096):
            passed += len(data)
            if damages and passed > 100_000:
                damages = False
                if self.damage == "loss":
                    continue
                if self.damage == "flip":
                    data = bytes([data[0] ^ 1]) + data[1:]
                if self.damage == "double":
                    target.sendall(data)
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("damage", ["loss", "flip", "double"])
def test_damage_is_noticed(damage: str) -> None:
    with Backend("exchange") as backend:
        relay = BadRelay(backend.port, damage)
        port = relay.listener.getsockname()[1]
        done = Exchange(("127.0.0.1", port), [Stream("a", up=300_000, down=1000)]).run(30)
        with pytest.raises(AssertionError, match="damaged"):
            assert_intact(done, backend)
        relay.listener.close()


def test_pattern_is_reproducible_and_its_blocks_differ() -> None:
    running = new_digest()
    for chunk in Pattern(7).chunks(3 * CHUNK + 5):
        running.update(chunk)
    assert running.hexdigest() == digest(7, 3 * CHUNK + 5)
    first, second, third = (bytes(chunk) for chunk in Pattern(7).chunks(3 * CHUNK))
    assert len({first, second, third}) == 3
    assert digest(7, 1000) != digest(8, 1000)
