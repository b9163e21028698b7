"""The control socket: JSON lines over a Unix socket, 0600, peers known by their credentials.

Verbs are given by the caller; each gets a `Reply` that it may answer later, so that nothing here ever
waits. A peer that is slow, silent, malformed or huge costs its own connection and nothing else.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import struct
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from tidegate import logs
from tidegate.control.client import PROTOCOL_VERSION
from tidegate.errors import OperatorError
from tidegate.loop.reactor import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, Reactor
from tidegate.loop.timers import Timer

# The longest request; the longest legitimate one names a few backends.
MAX_REQUEST = 1 << 20
# Peers at once: operators, tools that watch, a scraper.
MAX_PEERS = 64
# A peer that neither asks nor takes its answer for this long is closed.
IDLE_NS = 60_000_000_000
_UCRED = struct.Struct("iII")

_log = logging.getLogger("tidegate.control")

Args = dict[str, Any]


class VerbError(Exception):
    """A verb's refusal: `code` from docs/tools.md, and a sentence for the operator."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Reply:
    """The answer to one request, now or later, once."""

    def __init__(self, peer: _Peer, request_id: object) -> None:
        self._peer: _Peer | None = peer
        self._id = request_id
        self.uid = peer.uid
        self.pid = peer.pid

    def ok(self, result: dict[str, Any]) -> None:
        self._send({"v": PROTOCOL_VERSION, "id": self._id, "ok": True, "result": result})

    def error(self, code: str, message: str) -> None:
        error = {"code": code, "message": message}
        self._send({"v": PROTOCOL_VERSION, "id": self._id, "ok": False, "error": error})

    def _send(self, answer: dict[str, Any]) -> None:
        peer, self._peer = self._peer, None
        if peer is not None:
            peer.answered(answer)


Verb = Callable[[Args, Reply], None]


class ControlServer:
    """Listens at `path`; `allowed` are the uids that may ask (root and our own are always among them)."""

    def __init__(
        self, reactor: Reactor, path: str, verbs: Mapping[str, Verb], allowed: Collection[int] = ()
    ) -> None:
        self.reactor = reactor
        self.path = path
        self.verbs = verbs
        self.allowed = {0, os.geteuid(), *allowed}
        self.peers: set[_Peer] = set()
        self._sock = self._listen(Path(path))
        self._identity = os.stat(path).st_ino
        reactor.add(self._sock.fileno(), EPOLLIN, self._on_readable)

    def close(self) -> None:
        """Stop listening; the path goes too, unless a successor has put its own there."""
        self.reactor.remove(self._sock.fileno())
        self._sock.close()
        for peer in list(self.peers):
            peer.close()
        try:
            if os.stat(self.path).st_ino == self._identity:
                os.unlink(self.path)
        except OSError:
            return

    def abandon(self) -> None:
        """In a forked child: drop our copies, touch nothing that others use."""
        self._sock.close()
        for peer in self.peers:
            peer.sock.close()

    @staticmethod
    def _listen(path: Path) -> socket.socket:
        """Bind beside the path and rename: the path never names a socket that does not listen."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)
            before = os.umask(0o177)
            try:
                sock.bind(str(temporary))
            finally:
                os.umask(before)
            sock.listen(MAX_PEERS)
            os.rename(temporary, path)
        except OSError as error:
            sock.close()
            reason = "path too long (107 bytes at most)" if error.errno is None else error.strerror
            raise OperatorError(
                f"cannot make the control socket {path}: {reason}",
                'write control = "/path/to/a/directory/you/may/write/control.sock"',
            ) from None
        return sock

    def _on_readable(self, mask: int) -> None:
        while True:
            try:
                sock, _ = self._sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    self._shed()
                return
            pid, uid, _gid = _UCRED.unpack(
                sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
            )
            if uid not in self.allowed:
                logs.event(_log, logging.WARNING, "control_refused", uid=uid, pid=pid)
                sock.close()
                continue
            if len(self.peers) >= MAX_PEERS:
                self._shed()
            self.peers.add(_Peer(self, sock, uid, pid))

    def _shed(self) -> None:
        """Make room: the peer that has been silent longest goes."""
        if self.peers:
            min(self.peers, key=lambda peer: peer.heard_ns).close()


def is_served(path: str) -> bool:
    """Whether somebody listens at a control path."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(path)
        except OSError:
            return False
    return True


class _Peer:
    """One connection: requests are answered one after the other."""

    def __init__(self, server: ControlServer, sock: socket.socket, uid: int, pid: int) -> None:
        sock.setblocking(False)
        self.server = server
        self.sock = sock
        self.uid = uid
        self.pid = pid
        self.heard_ns = server.reactor.now
        self._in = bytearray()
        self._out = bytearray()
        self._busy = False
        self._ended = False  # the peer sent all it will
        self._closed = False
        self._interest = EPOLLIN
        self._timer = Timer(self._on_idle)
        server.reactor.add(sock.fileno(), EPOLLIN, self._on_event)
        server.reactor.timers.arm(self._timer, server.reactor.now + IDLE_NS)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        reactor = self.server.reactor
        reactor.timers.cancel(self._timer)
        reactor.remove(self.sock.fileno())
        reactor.close_after_batch(self.sock)
        self.server.peers.discard(self)

    def answered(self, answer: dict[str, Any]) -> None:
        if self._closed:
            return
        self._busy = False
        self._out += json.dumps(answer).encode() + b"\n"
        self._flush()
        self._next_request()

    def _on_event(self, mask: int) -> None:
        self.heard_ns = self.server.reactor.now
        self._timer.deadline_ns = self.heard_ns + IDLE_NS
        if mask & EPOLLERR:
            self.close()
            return
        if mask & EPOLLOUT:
            self._flush()
        if mask & (EPOLLIN | EPOLLHUP) and not self._closed and not self._ended:
            self._read()
        elif mask & EPOLLHUP:
            self.close()

    def _read(self) -> None:
        try:
            data = self.sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if not data:
            self._ended = True
            if not self._busy and not self._out:
                self.close()
            else:
                self._update_interest()
            return
        self._in += data
        if len(self._in) > MAX_REQUEST:
            self._refuse("too_large", f"a request is one line of at most {MAX_REQUEST} bytes")
            return
        self._next_request()

    def _next_request(self) -> None:
        while not self._busy and not self._closed:
            line, separator, rest = self._in.partition(b"\n")
            if not separator:
                break
            self._in = rest
            self._request(bytes(line))
        if not self._closed:
            self._update_interest()

    def _request(self, line: bytes) -> None:
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError):
            self._refuse("malformed", 'a request is a JSON object: {"v":1,"id":1,"verb":"status","args":{}}')
            return
        self._busy = True
        reply = Reply(self, request.get("id"))
        if request.get("v") != PROTOCOL_VERSION:
            reply.error("version", f"this tidegate speaks version {PROTOCOL_VERSION} of the control protocol")
            return
        args = request.get("args", {})
        name = request.get("verb")
        verb = self.server.verbs.get(name) if isinstance(name, str) else None
        if verb is None or not isinstance(args, dict):
            known = ", ".join(sorted(self.server.verbs))
            reply.error("unknown_verb", f"args must be an object and verb one of: {known}")
            return
        try:
            verb(args, reply)
        except VerbError as error:
            reply.error(error.code, error.message)
        except OperatorError as error:
            reply.error("failed", str(error))
        except Exception:
            _log.exception("control_verb_failed")
            reply.error("internal_error", f"{name} failed: see the log")

    def _refuse(self, code: str, message: str) -> None:
        """What came is not our protocol: say so and close when it is said."""
        self._in.clear()
        self._ended = True
        self._busy = True
        Reply(self, None).error(code, message)

    def _flush(self) -> None:
        if self._out:
            try:
                sent = self.sock.send(self._out)
            except BlockingIOError:
                sent = 0
            except OSError:
                self.close()
                return
            del self._out[:sent]
        if not self._out and self._ended and not self._busy:
            self.close()
            return
        self._update_interest()

    def _update_interest(self) -> None:
        if self._closed:
            return
        # while a request is being answered nothing more is read: a flood waits in the peer's own buffer
        interest = (0 if self._busy or self._ended else EPOLLIN) | (EPOLLOUT if self._out else 0)
        if interest != self._interest:
            self._interest = interest
            self.server.reactor.modify(self.sock.fileno(), interest)

    def _on_idle(self, now: int) -> None:
        if self._busy:
            self.server.reactor.timers.arm(self._timer, now + IDLE_NS)
        else:
            self.close()
