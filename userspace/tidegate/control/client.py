"""Asking a running tidegate: one request, one answer, as JSON lines over its Unix socket."""

from __future__ import annotations

import json
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


class ControlError(OperatorError):
    """tidegate answered that it could not do it; `code` is one of the closed list in control.protocol."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def call(path: str, verb: str, args: dict[str, Any] | None = None, timeout_s: float = 5.0) -> dict[str, Any]:
    """The result of `verb`; raises ControlUnreachable or ControlError."""
    with _asked(path, verb, args, timeout_s) as (_sock, result, _rest):
        return result


def stream(
    path: str, verb: str, args: dict[str, Any] | None = None, timeout_s: float = 5.0
) -> Iterator[dict[str, Any]]:
    """The events of a verb that streams, each {"event": {...}} or {"lost": n}, until tidegate ends it.

    `timeout_s` limits the wait for the answer, not that for an event. Raises ControlUnreachable or
    ControlError before the first one.
    """
    with _asked(path, verb, args, timeout_s) as (sock, _result, buffer):
        sock.settimeout(None)
        while True:
            line, separator, rest = buffer.partition(b"\n")
            if separator:
                buffer = rest
                event = json.loads(line)
                yield {key: event[key] for key in ("event", "lost") if key in event}
                continue
            try:
                chunk = sock.recv(65536)
            except OSError:
                return
            if not chunk:
                return
            buffer += chunk


@contextmanager
def _asked(
    path: str, verb: str, args: dict[str, Any] | None, timeout_s: float
) -> Iterator[tuple[socket.socket, dict[str, Any], bytes]]:
    """A connection on which `verb` was asked and answered: the result, and what came after it."""
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
            raise ControlUnreachable(
                f"no permission to use {path}", "run it as root or as tidegate's own user"
            ) from None
        except OSError as error:
            raise ControlUnreachable(
                f"no tidegate answers at {path} ({error.strerror or error})",
                "start one with `tidegate run FILE`, or name its control socket with --control",
            ) from None
        yield sock, _result(path, line), rest


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
