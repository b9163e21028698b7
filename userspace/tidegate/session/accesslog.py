"""Access log files: buffered, appended to, opened again on demand; the loop never waits for one.

Lines are kept in memory and written a few times a second, or when there are many. A pipe or socket that is
full is tried again; when too much has piled up, further lines are dropped and counted, the log says how many.
"""

from __future__ import annotations

import logging
import os
import stat
from typing import Final

from tidegate import logs
from tidegate.loop.reactor import Reactor
from tidegate.loop.timers import Timer

FLUSH_NS: Final = 250_000_000
FLUSH_BYTES: Final = 64 * 1024
# What may wait for a reader that does not read: some seconds of a busy worker.
MAX_BUFFER: Final = 4 * 1024 * 1024

_log = logging.getLogger("tidegate.accesslog")
_limited = logs.RateLimited(_log, per_second=1)


class LogFile:
    """One file (or "stdout"), in one worker."""

    def __init__(self, path: str, reactor: Reactor) -> None:
        self.path = path
        self._reactor = reactor
        self.dropped = 0  # lines that were lost
        self._lines: list[str] = []
        self._size = 0  # characters in `_lines`
        self._unsent = b""
        self._fd = -1
        self._timer = Timer(lambda now: self.flush())
        self.reopen()

    def write(self, line: str) -> None:
        """Take a line, its newline included; never blocks."""
        if self._size + len(self._unsent) > MAX_BUFFER:
            self.dropped += 1
            return
        self._lines.append(line)
        self._size += len(line)
        if self._size >= FLUSH_BYTES:
            self.flush()
        elif not self._timer.armed:
            self._reactor.timers.arm(self._timer, self._reactor.now + FLUSH_NS)

    def flush(self) -> None:
        """Write what there is, as far as it goes without waiting."""
        if self._lines:
            self._unsent += "".join(self._lines).encode("utf-8", "backslashreplace")
            self._lines.clear()
            self._size = 0
        if self._fd < 0:
            self.reopen()
        while self._unsent and self._fd >= 0:
            try:
                self._unsent = self._unsent[os.write(self._fd, self._unsent[:FLUSH_BYTES]) :]
            except BlockingIOError:
                break
            except OSError as error:
                _limited.event(logging.ERROR, "access_log_failed", path=self.path, error=error.strerror)
                self.dropped += self._unsent.count(b"\n")
                self._unsent = b""
        if self._unsent:
            if self._fd < 0:
                self.dropped += self._unsent.count(b"\n")
                self._unsent = b""
            else:
                self._reactor.timers.arm(self._timer, self._reactor.now + FLUSH_NS)

    def reopen(self) -> None:
        """Open the path (anew): after a rotation that renamed the file. A failure keeps the old one."""
        try:
            fd = _open_stdout() if self.path == "stdout" else _open(self.path)
        except OSError as error:
            _limited.event(
                logging.ERROR, "access_log_not_opened", path=self.path, error=error.strerror, uid=os.geteuid()
            )
            return
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd

    def close(self) -> None:
        """Write what is left and close."""
        self.flush()
        self._reactor.timers.cancel(self._timer)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _open(path: str) -> int:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    return os.open(path, flags, 0o640)


def _open_stdout() -> int:
    """A description of our own: O_NONBLOCK on the inherited one would be everybody's."""
    kind = os.fstat(1).st_mode
    if stat.S_ISFIFO(kind) or stat.S_ISCHR(kind) or stat.S_ISREG(kind):
        try:
            return _open("/proc/self/fd/1")
        except OSError:
            pass  # a terminal or pipe of another user, or no /proc: share it then
    return os.dup(1)


def prepare(path: str, uid: int, gid: int) -> None:
    """Make a log file that a worker without privileges can open. Raises OSError."""
    if path == "stdout":
        return
    fd = _open(path)
    try:
        if os.fstat(fd).st_uid != uid:
            os.fchown(fd, uid, gid)
    finally:
        os.close(fd)
