"""The access log's file: buffered, appended, opened anew, never waited for."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from tidegate.loop.reactor import Reactor
from tidegate.session import accesslog
from tidegate.session.accesslog import LogFile, prepare


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000_000

    def __call__(self) -> int:
        return self.now


def turn(reactor: Reactor, clock: Clock, ns: int) -> None:
    clock.now += ns
    reactor.run_once(0)


def test_lines_are_written_together_and_soon(tmp_path: Path) -> None:
    clock = Clock()
    reactor = Reactor(clock)
    path = tmp_path / "log"
    log = LogFile(str(path), reactor)
    log.write("one\n")
    log.write("two\n")
    assert path.read_text() == ""
    turn(reactor, clock, accesslog.FLUSH_NS + 2_000_000)
    assert path.read_text() == "one\ntwo\n"
    log.write("x" * accesslog.FLUSH_BYTES + "\n")
    assert path.stat().st_size > accesslog.FLUSH_BYTES
    log.write("last\n")
    log.close()
    assert path.read_text().endswith("\nlast\n")
    reactor.close()


def test_two_workers_append_to_one_file(tmp_path: Path) -> None:
    reactor = Reactor(Clock())
    path = tmp_path / "log"
    first, second = LogFile(str(path), reactor), LogFile(str(path), reactor)
    for log, line in ((first, "a\n"), (second, "b\n"), (first, "c\n")):
        log.write(line)
        log.flush()
    assert path.read_text() == "a\nb\nc\n"
    first.close()
    second.close()
    reactor.close()


def test_after_a_rotation_the_path_is_a_new_file(tmp_path: Path) -> None:
    reactor = Reactor(Clock())
    path = tmp_path / "log"
    log = LogFile(str(path), reactor)
    log.write("old\n")
    path.rename(tmp_path / "log.1")
    log.flush()
    log.reopen()
    log.write("new\n")
    log.close()
    assert ((tmp_path / "log.1").read_text(), path.read_text()) == ("old\n", "new\n")
    reactor.close()


def test_a_path_that_cannot_be_opened_keeps_the_old_file(tmp_path: Path) -> None:
    reactor = Reactor(Clock())
    path = tmp_path / "log"
    log = LogFile(str(path), reactor)
    path.rename(tmp_path / "log.1")
    path.mkdir()
    log.reopen()
    log.write("still\n")
    log.close()
    assert (tmp_path / "log.1").read_text() == "still\n"
    reactor.close()


def test_a_full_pipe_stops_nothing_and_loses_only_what_is_too_much(tmp_path: Path) -> None:
    clock = Clock()
    reactor = Reactor(clock)
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    log = LogFile(str(path), reactor)
    line = "x" * 999 + "\n"
    written = 2 * accesslog.MAX_BUFFER // len(line)
    for _ in range(written):
        log.write(line)
    assert 0 < log.dropped < written
    read = 0
    for _ in range(100_000):
        try:
            read += len(os.read(reader, 1 << 20))
        except BlockingIOError:
            if not log._unsent and not log._lines:
                break
        log.flush()
    assert read == (written - log.dropped) * len(line)  # whole lines, none twice
    log.close()
    os.close(reader)
    reactor.close()


def test_a_file_is_made_for_the_workers_user(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("kept\n")
    prepare(str(path), os.getuid(), os.getgid())
    assert path.read_text() == "kept\n"
    prepare(str(tmp_path / "new"), os.getuid(), os.getgid())
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
    prepare("stdout", 0, 0)
