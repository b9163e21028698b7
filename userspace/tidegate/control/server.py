"""The control socket: JSON lines over a Unix socket, peers known by their credentials.

Verbs are given by the caller; each gets a `Reply` that it may answer later, so that nothing here ever
waits. A peer that is slow, silent, malformed or huge costs its own connection and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tidegate import logs
from tidegate.control.peer import MAX_STREAMS, EventStream, Peer
from tidegate.control.protocol import Arg, ErrorCode, VerbError, answer_line, code_of, error_line
from tidegate.errors import OperatorError
from tidegate.loop.reactor import EPOLLIN, Reactor

__all__ = ["Args", "ControlServer", "Reply", "Verb", "VerbError", "is_served"]

# Peers at once: operators, tools that watch, scrapers.
MAX_PEERS: Final = 256
# listen(2): connects beyond it wait in the kernel
BACKLOG: Final = 128
_UCRED: Final = struct.Struct("iII")

_log = logging.getLogger("tidegate.control")
_limited = logs.RateLimited(_log, per_second=1)
# who changed what is logged whatever `log.level` says, for that verb is one of those audited
_audit = logging.getLogger("tidegate.audit")
_audit.setLevel(logging.INFO)

Args = dict[str, Any]


class Reply:
    """The answer to one request, now or later, once."""

    def __init__(
        self, peer: Peer, request_id: int | str | None, verb: str, args: object, audit: bool
    ) -> None:
        self._peer: Peer | None = peer
        self._id = request_id
        self._verb = verb
        self._args = args
        self._audit = audit
        self.uid = peer.uid
        self.pid = peer.pid

    def ok(self, result: Mapping[str, Any]) -> None:
        self._send(answer_line(self._id, result), "ok")

    def error(self, code: ErrorCode | str, message: str) -> None:
        known = code_of(code)
        self._send(error_line(self._id, known, message), known.value)

    def stream(self, result: Mapping[str, Any], on_close: Callable[[], None]) -> EventStream:
        """Answer, and go on: what is sent to the stream follows. Raises VerbError when there are too many."""
        peer, self._peer = self._peer, None
        assert peer is not None
        if sum(other.stream is not None for other in peer.server.peers) >= MAX_STREAMS:
            self._peer = peer
            raise VerbError(ErrorCode.BUSY, f"{MAX_STREAMS} streams are open already")
        return peer.begin_stream(answer_line(self._id, result), self._id, on_close)

    def _send(self, line: bytes, outcome: str) -> None:
        peer, self._peer = self._peer, None
        if peer is None:
            return
        if self._audit:
            logs.event(
                _audit,
                logging.INFO,
                "control",
                verb=self._verb,
                args=json.dumps(self._args),
                result=outcome,
                uid=self.uid,
                pid=self.pid,
            )
        peer.answered(line)


@dataclass(frozen=True, slots=True)
class Verb:
    """What a verb does and takes. `mutates`: each use of it leaves a line in the log."""

    run: Callable[[Args, Reply], None]
    doc: str
    args: tuple[Arg, ...] = ()
    mutates: bool = False


class ControlServer:
    """Listens at `path`; `allowed` are the uids that may ask (root and our own are always among them)."""

    def __init__(
        self, reactor: Reactor, path: str, verbs: Mapping[str, Verb], allowed: Collection[int] = ()
    ) -> None:
        self.reactor = reactor
        self.path = path
        self.verbs = verbs
        self.peers: set[Peer] = set()
        self._sock = self._listen(Path(path))
        self._identity = os.stat(path).st_ino
        self.allow(allowed)
        reactor.add(self._sock.fileno(), EPOLLIN, self._on_readable)

    def allow(self, uids: Collection[int]) -> None:
        """Who may ask from now on, besides root and ourselves; open connections of others are closed.

        The file's mode lets everybody reach the socket as soon as somebody else is allowed: the credentials
        then decide.
        """
        self.allowed = {0, os.geteuid(), *uids}
        with contextlib.suppress(OSError):
            if os.stat(self.path).st_ino == self._identity:
                os.chmod(self.path, 0o666 if uids else 0o600)
        for peer in [peer for peer in self.peers if peer.uid not in self.allowed]:
            peer.close()

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

    def start_request(
        self, peer: Peer, request_id: int | str | None, verb: str, args: object, audit: bool
    ) -> Reply:
        return Reply(peer, request_id, verb, args, audit)

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
            sock.listen(BACKLOG)
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
        for _ in range(BACKLOG):  # bounded: a flood of connects gets its turn and no more
            try:
                sock, _address = self._sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE) and self._shed():
                    continue
                return
            self._welcome(sock)

    def _welcome(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        pid, uid, _gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if uid not in self.allowed:
            _limited.event(logging.WARNING, "control_refused", uid=uid, pid=pid)
            self._turn_away(sock, ErrorCode.FORBIDDEN, f"user {uid} may not ask: see control_users")
        elif len(self.peers) >= MAX_PEERS and not self._shed():
            self._turn_away(sock, ErrorCode.BUSY, f"{MAX_PEERS} others wait for their answers")
        else:
            self.peers.add(Peer(self, sock, uid, pid))

    @staticmethod
    def _turn_away(sock: socket.socket, code: ErrorCode, message: str) -> None:
        with contextlib.suppress(OSError):
            sock.send(error_line(None, code, message))
        sock.close()

    def _shed(self) -> bool:
        """Make room: of the peers that wait for no answer the one silent longest goes."""
        idle = [peer for peer in self.peers if not peer.busy]
        if not idle:
            return False
        min(idle, key=lambda peer: peer.heard_ns).close()
        return True


def is_served(path: str) -> bool:
    """Whether somebody listens at a control path."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(path)
        except OSError:
            return False
    return True
