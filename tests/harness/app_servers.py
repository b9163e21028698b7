"""Real servers that report each request as their own parser read it: gunicorn, uvicorn, nginx, HAProxy.

gunicorn and uvicorn run an application (`harness.apps`). nginx and HAProxy read the request, body included,
and pass what they read, written anew, to a recorder in the test's process.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from harness import apps
from harness.http_wire import ScriptedBackend, Wire, read_request
from harness.peers import HAProxy, Nginx
from harness.ports import free_port, wait_listening
from harness.processes import Child, python_env

Record = dict[str, Any]


class Reporter:
    """A running server with an `address`; `seen()` gives the requests since the last call."""

    name = ""
    address = ""

    def __enter__(self) -> Self:
        raise NotImplementedError

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        raise NotImplementedError

    def seen(self) -> list[Record]:
        raise NotImplementedError


class AppServer(Reporter):
    """An application server in a process of its own, on a port of 127.0.0.1."""

    def __init__(self, name: str, arguments: Sequence[str]) -> None:
        """`arguments` of `python -m`, "{port}" among them."""
        self.name = name
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._arguments = [argument.replace("{port}", str(self.port)) for argument in arguments]
        self._directory = tempfile.TemporaryDirectory(prefix="tg-app-")
        self._child: Child | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def start(self) -> None:
        """Also after its process was killed: again on the same port."""
        self._child = Child(
            [sys.executable, "-m", *self._arguments],
            Path(self._directory.name) / "log",
            env=python_env({"HOME": self._directory.name}),  # where gunicorn puts a socket
        )
        try:
            wait_listening(self.port, timeout_s=20)
        except BaseException as error:
            error.add_note(f"--- output of {self.name}\n{self.output()}")
            self._stop()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        if error is not None:
            error.add_note(f"--- output of {self.name} (last lines)\n{self.output()[-3000:]}")
        self._stop()

    def _stop(self) -> None:
        if self._child is not None:
            self._child.kill()
        self._directory.cleanup()

    @property
    def child(self) -> Child:
        if self._child is None:
            raise RuntimeError(f"{self.name} was not started")
        return self._child

    def output(self) -> str:
        return self.child.output()

    def seen(self) -> list[Record]:
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(client):
            client.request("GET", apps.REPORT)
            records: list[Record] = json.loads(client.getresponse().read())
        return records


def gunicorn(app: str = "harness.apps:wsgi", threads: int = 2) -> AppServer:
    """Its own parser, in Python; keep-alive, as its threaded worker has it."""
    more = ["--threads", str(threads), "--keep-alive", "60"]
    return AppServer("gunicorn", ["gunicorn", "-b", "127.0.0.1:{port}", *more, app])


def uvicorn(parser: str, app: str = "harness.apps:asgi", ws: str = "none") -> AppServer:
    """`parser` is h11 or httptools; `ws` is what uvicorn has for WebSockets: "none", "websockets", ..."""
    more = ["--http", parser, "--ws", ws, "--lifespan", "off", "--no-access-log"]
    more += ["--timeout-keep-alive", "60"]
    return AppServer(f"uvicorn-{parser}", ["uvicorn", "--host", "127.0.0.1", "--port", "{port}", *more, app])


class Recorder(ScriptedBackend):
    """Answers as the applications do, in the test's process; its input must be written regularly."""

    def __init__(self) -> None:
        super().__init__(self._serve)
        self._lock = threading.Lock()
        self._records: list[Record] = []

    def seen(self) -> list[Record]:
        with self._lock:
            taken, self._records = self._records, []
        return taken

    def _serve(self, wire: Wire) -> None:
        wire.recording = False
        while True:
            request = read_request(wire)
            body = apps.Body()
            body.add(request.body)
            record = {"method": request.method, "target": request.target, **body.tell()}
            with self._lock:
                self._records.append(record)
            answer = b"" if request.method == "HEAD" else b"seen"
            wire.send(
                b"HTTP/1.1 200 OK\r\nX-Seen: %b\r\nContent-Length: 4\r\n\r\n%b"
                % (apps.encode(record), answer)
            )


class Between(Reporter):
    """Another proxy before a recorder."""

    def __init__(self, kind: type[Nginx] | type[HAProxy]) -> None:
        self._kind = kind
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._recorder = self._stack.enter_context(Recorder())
        try:
            peer = self._stack.enter_context(self._kind(self._recorder.address, mode="http"))
        except BaseException:
            self._stack.close()
            raise
        self.name, self.address = peer.name.split()[0], peer.address
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self._stack.__exit__(kind, error, trace)

    def seen(self) -> list[Record]:
        return self._recorder.seen()
