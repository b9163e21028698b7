"""What is read of a socket in two calls, with the kernel at work between them."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from tidegate.kernel import splicing
from tidegate.kernel.tcp_info import TCP_ESTABLISHED, Progress


class Peer:
    """Acknowledges so many bytes after each look, until it has all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, total: int, step: Callable[[int], int]) -> None:
        self.acked, self.total, self._step, self._looks = 1, total, step, 0
        monkeypatch.setattr(splicing, "progress", self.progress)
        monkeypatch.setattr(splicing, "_ioctl", self.queued)

    def _look(self) -> None:
        self._looks += 1
        self.acked = min(self.total, self.acked + self._step(self._looks))

    def progress(self, _sock: socket.socket) -> Progress:
        answer = Progress(TCP_ESTABLISHED, 0, 0, self.acked, 0)
        self._look()
        return answer

    def queued(self, _sock: socket.socket, _request: int) -> int:
        answer = self.total - self.acked
        self._look()
        return answer


@pytest.fixture
def sock() -> socket.socket:
    return socket.socket()


@pytest.mark.parametrize("first", range(1, 6))
def test_an_acknowledgement_between_two_readings_is_not_counted_out(
    monkeypatch: pytest.MonkeyPatch, sock: socket.socket, first: int
) -> None:
    with sock:
        Peer(monkeypatch, 1000, lambda look: 300 if look == first else 0)
        assert splicing._written(sock) == 1000


def test_one_that_never_stands_still_is_not_guessed_at(
    monkeypatch: pytest.MonkeyPatch, sock: socket.socket
) -> None:
    with sock:
        Peer(monkeypatch, 1 << 40, lambda look: 1)
        assert splicing._written(sock) is None
