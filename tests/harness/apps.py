"""What the servers of `harness.app_servers` run: WSGI and ASGI applications that say what they saw.

Every request that came whole is kept, and told in the response's field X-Seen (base64 of JSON), so that the
answer to a HEAD tells it too. `GET /seen?clear` from beside the proxy gives all of them and forgets them.
Uploads too large to be kept are known by their length and digest.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

REPORT = "/seen?clear"
"""The target that gives the report; tests have no other use for it."""

PATTERN = bytes(range(256)) * 256

KEPT_BYTES = 4096
"""Bodies up to this length are told whole."""

_lock = threading.Lock()
_seen: list[dict[str, Any]] = []


class Body:
    """A request's body as it comes."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._kept = b""
        self.length = 0

    def add(self, data: bytes) -> None:
        self._digest.update(data)
        self.length += len(data)
        if self.length <= KEPT_BYTES:
            self._kept += data

    def tell(self) -> dict[str, Any]:
        kept = self._kept.decode("latin-1") if self.length <= KEPT_BYTES else None
        return {"body": kept, "length": self.length, "digest": self._digest.hexdigest()}


def note(method: str, target: str, body: Body) -> str:
    """Keeps one request; the value of X-Seen."""
    record = {"method": method, "target": target, **body.tell()}
    with _lock:
        _seen.append(record)
    return encode(record).decode()


def encode(record: dict[str, Any]) -> bytes:
    """As a field value."""
    return base64.b64encode(json.dumps(record).encode())


def decode(value: str) -> dict[str, Any]:
    """What X-Seen tells."""
    record: dict[str, Any] = json.loads(base64.b64decode(value))
    return record


def report() -> bytes:
    """All that was kept since the last one."""
    with _lock:
        taken = _seen[:]
        _seen.clear()
    return json.dumps(taken).encode()


def download(target: str) -> Iterator[bytes] | None:
    """The body of `/bytes/N`: N bytes without a length given, for the server to frame."""
    if not target.startswith("/bytes/"):
        return None
    left = int(target.removeprefix("/bytes/"))
    return (PATTERN[: min(left - at, len(PATTERN))] for at in range(0, left, len(PATTERN)))


def wsgi(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    target = environ["RAW_URI"]
    if target == REPORT:
        answer = report()
        start_response("200 OK", [("Content-Length", str(len(answer)))])
        return [answer]
    if (pieces := download(target)) is not None:
        start_response("200 OK", [("Content-Type", "application/octet-stream")])
        return pieces
    body = Body()
    left = int(environ["CONTENT_LENGTH"]) if environ.get("CONTENT_LENGTH") else None
    if left is not None or environ.get("HTTP_TRANSFER_ENCODING"):
        while data := environ["wsgi.input"].read(65536):
            body.add(data)
    if left is not None and body.length != left:
        raise EOFError("the client left in the middle of the body")
    seen = note(environ["REQUEST_METHOD"], target, body)
    start_response("200 OK", [("X-Seen", seen), ("Content-Length", "4")])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [b"seen"]


async def asgi(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await websocket(scope, receive, send)
        return
    query = scope["query_string"].decode("latin-1")
    target = scope["raw_path"].decode("latin-1") + (f"?{query}" if query else "")
    if (pieces := download(target)) is not None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        return
    if target == REPORT:
        answer, fields = report(), []
    else:
        body = Body()
        while True:
            event = await receive()
            if event["type"] != "http.request":
                return  # it left in the middle of the body
            body.add(event.get("body", b""))
            if not event.get("more_body"):
                break
        answer, fields = b"seen", [(b"x-seen", note(scope["method"], target, body).encode())]
    fields.append((b"content-length", b"%d" % len(answer)))
    await send({"type": "http.response.start", "status": 200, "headers": fields})
    await send({"type": "http.response.body", "body": answer})


async def websocket(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Echoes; closes with 4001 on "bye"; refuses what is not for /echo."""
    await receive()
    if scope["path"] != "/echo":
        await send({"type": "websocket.close", "code": 1008})
        return
    await send({"type": "websocket.accept"})
    while (event := await receive())["type"] == "websocket.receive":
        text, data = event.get("text"), event.get("bytes")
        if text == "bye":
            await send({"type": "websocket.close", "code": 4001})
            return
        await send({"type": "websocket.send", **({"bytes": data} if text is None else {"text": text})})
