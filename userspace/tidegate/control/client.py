"""Asking a running tidegate: one request, one answer, as JSON lines over its Unix socket."""

from __future__ import annotations

import json
import socket
from typing import Any

from tidegate.errors import EXIT_UNREACHABLE, OperatorError

PROTOCOL_VERSION = 1
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
    request = {"v": PROTOCOL_VERSION, "id": 1, "verb": verb, "args": args or {}}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        try:
            sock.connect(path)
            sock.sendall(json.dumps(request).encode() + b"\n")
            line = _read_line(sock)
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
    try:
        answer = json.loads(line)
    except ValueError:
        raise ControlUnreachable(f"{path} does not speak tidegate's control protocol") from None
    if not answer.get("ok"):
        refusal = answer.get("error", {})
        raise ControlError(refusal.get("code", "unknown"), refusal.get("message", "no reason given"))
    result = answer["result"]
    assert isinstance(result, dict)
    return result


def _read_line(sock: socket.socket) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        chunk = sock.recv(65536)
        if not chunk:
            raise ConnectionError("closed without an answer")
        chunks.append(chunk)
        size += len(chunk)
        if chunk.endswith(b"\n"):
            return b"".join(chunks)
        if size > MAX_ANSWER:
            raise ConnectionError("answer too large")
