"""Asking a running tidegate: one request, one answer, as JSON lines over its Unix socket."""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tidegate.control.protocol import PROTOCOL_VERSION
from tidegate.errors import EXIT_UNREACHABLE, OperatorError

# An answer larger than this is not one of ours; `sessions` of a full worker stays below.
MAX_ANSWER = 64 * 1024 * 1024


class ControlUnreachable(OperatorError):
    """Nobody answers at the control socket."""

    exit_code = EXIT_UNREACHABLE


class ControlAbsent(ControlUnreachable):
    """There is no socket of that name, or nobody listens on it."""


class ControlForbidden(ControlUnreachable):
    """The socket, or its directory, is not for this user."""


class ControlError(OperatorError):
    """tidegate answered that it could not do it; `code` is one of the closed list in control.protocol."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Asked:
    """What a verb was answered, and, of one that streams, what comes after it."""

    def __init__(self, sock: socket.socket, result: dict[str, Any], rest: bytes) -> None:
        self.result = result
        self.ended = False  # by tidegate, not by the reader
        self._sock = sock
        self._buffer = rest

    def events(self, reader_fd: int = -1) -> Iterator[dict[str, Any]]:
        """Each {"event": {...}} or {"lost": n} as it comes, until tidegate ends the stream.

        With `reader_fd`, the writing end of a pipe, it ends as well when nobody reads that pipe any more: an
        event may never come that would tell. Waits for events without a limit.
        """
        self._sock.settimeout(None)
        waiting = select.poll()
        waiting.register(self._sock, select.POLLIN)
        if reader_fd >= 0:
            waiting.register(reader_fd, 0)  # errors are reported unasked
        while True:
            line, separator, rest = self._buffer.partition(b"\n")
            if separator:
                self._buffer = rest
                event = json.loads(line)
                yield {key: event[key] for key in ("event", "lost") if key in event}
                continue
            if any(fd == reader_fd for fd, _ in waiting.poll()):
                return
            try:
                chunk = self._sock.recv(65536)
            except OSError:
                chunk = b""
            if not chunk:
                self.ended = True
                return
            self._buffer += chunk


def call(path: str, verb: str, args: dict[str, Any] | None = None, timeout_s: float = 5.0) -> dict[str, Any]:
    """The result of `verb`; raises ControlUnreachable or ControlError."""
    with ask(path, verb, args, timeout_s) as asked:
        return asked.result


def stream(
    path: str, verb: str, args: dict[str, Any] | None = None, timeout_s: float = 5.0
) -> Iterator[dict[str, Any]]:
    """The events of a verb that streams; see `ask` and `Asked.events`."""
    with ask(path, verb, args, timeout_s) as asked:
        yield from asked.events()


@contextmanager
def ask(path: str, verb: str, args: dict[str, Any] | None = None, timeout_s: float = 5.0) -> Iterator[Asked]:
    """A connection on which `verb` was asked and answered, open for as long as the block lasts.

    `timeout_s` limits the wait for the answer. Raises ControlUnreachable or ControlError.
    """
    request = {"v": PROTOCOL_VERSION, "id": 1, "verb": verb, "args": args or {}}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        try:
            sock.connect(path)
            line, rest = _exchange(sock, json.dumps(request).encode() + b"\n")
        except TimeoutError:
            raise ControlUnreachable(
                f"no answer from {path} within {timeout_s:g} s",
                "look at the supervisor: ps -C tidegate, its log",
            ) from None
        except PermissionError:
            raise ControlForbidden(
                f"no permission to use {path}", "run it as root or as tidegate's own user"
            ) from None
        except OSError as error:
            absent = isinstance(error, FileNotFoundError | ConnectionRefusedError)
            raise (ControlAbsent if absent else ControlUnreachable)(
                f"no tidegate answers at {path} ({error.strerror or error})",
                "start one with `tidegate run FILE`, or name its control socket with --control",
            ) from None
        yield Asked(sock, _result(path, line), rest)


def _result(path: str, line: bytes) -> dict[str, Any]:
    strange = ControlUnreachable(f"{path} does not speak tidegate's control protocol")
    try:
        answer = json.loads(line)
    except ValueError:
        raise strange from None
    if not isinstance(answer, dict):
        raise strange
    if not answer.get("ok"):
        refusal = answer.get("error", {})
        raise ControlError(refusal.get("code", "unknown"), refusal.get("message", "no reason given"))
    result = answer.get("result")
    if not isinstance(result, dict):
        raise strange
    return result


def _exchange(sock: socket.socket, request: bytes) -> tuple[bytes, bytes]:
    """Send a request; its answer's line, and what came behind it."""
    try:
        sock.sendall(request)
    except (BrokenPipeError, ConnectionResetError):
        pass  # it may have said why before it closed
    received = bytearray()
    while True:
        chunk = sock.recv(65536)
        if not chunk:
            raise ConnectionError("closed without an answer")
        end = chunk.find(b"\n")
        if end >= 0:
            return bytes(received) + chunk[:end], chunk[end + 1 :]
        received += chunk
        if len(received) > MAX_ANSWER:
            raise ConnectionError("answer too large")
