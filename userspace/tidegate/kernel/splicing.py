"""Splicing, the kernel's side of it: one worker's maps and program, and the record of each direction.

    splicing = Splicing.create(objects)      # as root: a worker does it before it drops privileges
    up, down = splicing.join(front, back, limit)     # both are targets, both directions have a record
    splicing.enter(up)                       # the kernel moves what front sends
    splicing.release((up, down))

A worker makes maps of its own and keeps nothing but their fds: no worker can reach another's sockets, and
whatever way it ends, the kernel frees all of it. bpf/splice.c moves bytes; session/splice.py decides.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import sys
import termios
from collections import deque
from collections.abc import Iterable

from tidegate.kernel import bpf, maps
from tidegate.kernel.bell import Bell
from tidegate.kernel.half import socket_cookie
from tidegate.kernel.loader import SPLICE, KernelUnavailable, MapNumber, Objects, splice_offsets
from tidegate.kernel.maps import MAX_SPLICE_FLOWS, SPLICE_BELL_SIZE
from tidegate.kernel.records import NO_BUDGET, SpliceFlow
from tidegate.kernel.slots import map_words
from tidegate.kernel.tcp_info import TCP_CLOSE, TCP_ESTABLISHED, Progress, progress

_WORDS = ctypes.sizeof(SpliceFlow) // 8
_CONSUMED = SpliceFlow.consumed.offset // 8
_LIMIT = SpliceFlow.limit.offset // 8
_BUDGET = SpliceFlow.budget.offset // 8
_BASE = SpliceFlow.base.offset // 8
_TARGET = SpliceFlow.target.offset // 8
_BEGIN = SpliceFlow.begin.offset // 8
_REDIRECTED = SpliceFlow.redirected.offset // 8
_PASSED = SpliceFlow.passed.offset // 8
_HELD = SpliceFlow.held.offset // 8
_RECEIVED_NS = SpliceFlow.received_ns.offset // 8
_REDIRECTED_NS = SpliceFlow.redirected_ns.offset // 8
_REPEATED = SpliceFlow.repeated.offset // 8
_BROKEN = SpliceFlow.broken.offset // 8

_MASK = (1 << 64) - 1
_NEGATIVE = 1 << 63
_WINDOW = 512 * 1024
# With less the window closes, or the target is full, at every other skb: copying is faster then.
_LEAST_RECEIVE = 512 * 1024
_LEAST_SEND = 128 * 1024
# What waits to be read in the map is no unread byte to TCP: a killed worker's sockets would be closed with a
# FIN and a closed window, and a peer that waits to send learn of it at its next probe.
_RESET, _NO_RESET = struct.pack("=ii", 1, 0), struct.pack("=ii", 0, 0)
_LOOKS = 50  # for two equal readings of a socket that receives
_MAPS = (
    MapNumber.SPLICED,
    MapNumber.SPLICE_INDEX,
    MapNumber.SPLICE_FLOWS,
    MapNumber.SPLICE_SOURCES,
    MapNumber.SPLICE_BELL,
)


class CannotSplice(Exception):
    """These two sockets stay with userspace; nothing was changed."""


class KernelFlow:
    """One direction: its record, and what TCP says at its two ends.

    The record is its source's, for as long as that lives; the target may change. All counts are of bytes
    since the record was made.
    """

    __slots__ = ("_at", "_base", "_read_before", "_words", "cookie", "index", "source", "target")

    def __init__(self, words: memoryview, index: int, source: socket.socket) -> None:
        """CannotSplice."""
        self._words = words
        self._at = at = index * _WORDS
        self._base = 0
        # an urgent byte is one of the stream, as the verdict sees it: recv() would skip it, and miscount
        source.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        self._read_before = _read_so_far(source)
        self.index = index
        self.source = source
        self.target = source  # until it is aimed
        self.cookie = socket_cookie(source)
        for word in range(at, at + _WORDS):
            words[word] = 0  # a budget of 0 passes everything
        words[at + _BEGIN] = self._read_before

    def aim(self, target: socket.socket, cookie: int, limit: int, done: int = 0) -> None:
        """What the source sends is `target`'s from now on, a spliced socket with that cookie.

        `done`: of what was passed, so much was read and has found its place: it was a former target's, or
        nobody's. Nothing is redirected before `set_budget`. CannotSplice.
        """
        words, at = self._words, self._at
        words[at + _BUDGET] = 0
        written = _written(target)
        if written is None:
            raise CannotSplice("its acknowledgements do not stand still")
        self.target = target
        self._base = written - words[at + _REDIRECTED] - done & _MASK
        words[at + _BASE] = self._base
        words[at + _TARGET] = cookie
        words[at + _LIMIT] = limit
        words[at + _CONSUMED] = done

    def begin(self, read: int, consumed: int) -> None:
        """Before the source enters: so many bytes were read since, and written to the target.

        They count as passed: those that userspace still holds come first.
        """
        self._words[self._at + _PASSED] = read
        self._words[self._at + _CONSUMED] = consumed

    @property
    def redirected(self) -> int:
        return self._words[self._at + _REDIRECTED]

    @property
    def passed(self) -> int:
        return self._words[self._at + _PASSED]

    @property
    def repeated(self) -> int:
        """Bytes that the source received twice, and the kernel cut off."""
        return self._words[self._at + _REPEATED]

    @property
    def broken(self) -> bool:
        """Whether bytes are missing in the stream: nothing can mend it."""
        return self._words[self._at + _BROKEN] != 0

    @property
    def held(self) -> int:
        """What the target held unacknowledged when the kernel last looked: it holds no more now."""
        return self._words[self._at + _HELD]

    @property
    def received_ns(self) -> int:
        """When the last bytes arrived; 0: none since."""
        return self._words[self._at + _RECEIVED_NS]

    @property
    def redirected_ns(self) -> int:
        return self._words[self._at + _REDIRECTED_NS]

    def consume(self, total: int) -> None:
        """So many of the bytes passed are in the target: the kernel redirects again when that is all."""
        self._words[self._at + _CONSUMED] = total

    def set_limit(self, limit: int) -> None:
        self._words[self._at + _LIMIT] = limit

    def in_flight(self) -> int:
        """What the target holds, not acknowledged, now: in its TCP or on the way into it."""
        words, at = self._words, self._at
        moved = words[at + _REDIRECTED] + words[at + _CONSUMED] + self._base
        held = moved - progress(self.target).acked & _MASK
        return held if held < _NEGATIVE else held - _MASK - 1  # our FIN is acknowledged, too

    @property
    def roomy(self) -> bool:
        """Whether the socket buffers at both ends, as they are now, hold a few skbs."""
        receive = self.source.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        return receive >= _LEAST_RECEIVE and (
            self.target.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= _LEAST_SEND
        )

    def set_budget(self, redirected: int) -> None:
        """What `redirected` may reach; what would pass it is passed."""
        self._words[self._at + _BUDGET] = redirected

    def hold(self) -> None:
        """Once this returns nothing is redirected: no verdict is under way that saw another budget."""
        self.set_budget(0)
        progress(self.source)  # waits for the socket's lock, under which verdicts run

    def written(self) -> int:
        """Bytes that got into the target's TCP, sent and acknowledged or not; -1: ask again."""
        written = _written(self.target)
        return -1 if written is None else written - self._base & _MASK

    def ended(self, moved: int) -> bool:
        """Once recv() told of the end: whether so many bytes are all that the source's TCP took in, in order.

        Its FIN counts as one. After a reset there is none, and recv() says the same when somebody who wrote
        to the socket was told of the reset before.
        """
        now = progress(self.source)
        more = now.received - self._read_before - moved
        return more == 1 or (more == 0 and now.state == TCP_CLOSE)

    def taken(self) -> int:
        """Bytes that the source's TCP took in, in order; its FIN counts as one."""
        return progress(self.source).received - self._read_before

    def acknowledged(self) -> Progress:
        """How far the target got."""
        return progress(self.target)


class Splicing:
    """One worker's maps of spliced sockets, and which records are free."""

    def __init__(self, fds: dict[MapNumber, int], prog_fd: int) -> None:
        self._targets = fds[MapNumber.SPLICED]
        self._sources = fds[MapNumber.SPLICE_SOURCES]
        self._index = fds[MapNumber.SPLICE_INDEX]
        self._flows = fds[MapNumber.SPLICE_FLOWS]
        self._prog = prog_fd
        self.bell = Bell(fds[MapNumber.SPLICE_BELL], SPLICE_BELL_SIZE)  # rings indexes of directions
        self._words = map_words(self._flows, MAX_SPLICE_FLOWS * ctypes.sizeof(SpliceFlow))
        # the one freed longest ago is used next: nothing that still runs can write to a stranger's record
        self._free: deque[int] = deque(range(MAX_SPLICE_FLOWS))

    @classmethod
    def create(cls, objects: Objects) -> Splicing:
        """Makes the maps and gives them their program; needs root. KernelUnavailable where it is refused."""
        if not all(splice_offsets().values()):
            raise KernelUnavailable(
                "this kernel gives no type information of its own", "a kernel with CONFIG_DEBUG_INFO_BTF"
            )
        with contextlib.ExitStack() as undo:
            fds: dict[MapNumber, int] = {}
            try:
                for number in _MAPS:
                    fds[number] = maps.create(number)
                    undo.callback(os.close, fds[number])
                prog = objects.load(SPLICE, fds)
                undo.callback(os.close, prog)
                bpf.map_attach(prog, fds[MapNumber.SPLICE_SOURCES], SPLICE.attach)
            except OSError as error:
                raise KernelUnavailable(
                    f"the kernel refuses to splice: {error}", "tidegate doctor"
                ) from error
            undo.pop_all()
        return cls(fds, prog)

    def drop_program(self) -> None:
        """In a worker: the map holds the program; its fd would allow more than a worker needs."""
        if self._prog >= 0:
            os.close(self._prog)
            self._prog = -1

    def close(self) -> None:
        self.drop_program()
        self.bell.close()
        for fd in (self._targets, self._sources, self._index, self._flows):
            os.close(fd)

    @property
    def free(self) -> int:
        """Directions that still have a record."""
        return len(self._free)

    def source(self, sock: socket.socket) -> KernelFlow:
        """A record for what a socket receives. Moves no byte by that. CannotSplice.

        Until the record is given back, the end of this process, however it comes, resets the connection.
        """
        if not self._free:
            raise CannotSplice("no record is free")
        index = self._free.popleft()
        try:
            flow = KernelFlow(self._words, index, sock)
            bpf.map_update(self._index, _u64(flow.cookie), struct.pack("=I", index))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        except (OSError, CannotSplice) as error:
            self._free.append(index)
            raise CannotSplice(str(error)) from error
        return flow

    def add_target(self, sock: socket.socket) -> int:
        """Lets the kernel give bytes to a socket; its cookie. Until it is closed. CannotSplice."""
        try:
            cookie = socket_cookie(sock)
            with contextlib.suppress(FileExistsError):
                self._insert(self._targets, cookie, sock)
        except OSError as error:  # EOPNOTSUPP: it is closing
            raise CannotSplice(str(error)) from error
        return cookie

    def join(self, front: socket.socket, back: socket.socket, limit: int) -> tuple[KernelFlow, KernelFlow]:
        """Both directions of a session: (front to back, back to front). Moves no byte by that.

        CannotSplice.
        """
        flows: list[KernelFlow] = []
        try:
            for sock in (front, back):
                flows.append(self.source(sock))
            for flow, target in zip(flows, (back, front), strict=True):
                flow.aim(target, self.add_target(target), limit)
                flow.set_budget(NO_BUDGET)
        except CannotSplice:
            for flow in flows:
                with contextlib.suppress(FileNotFoundError):
                    bpf.map_delete(self._targets, _u64(flow.cookie))
            self.release(flows)
            raise
        up, down = flows
        return up, down

    def enter(self, flow: KernelFlow) -> bool:
        """Gives the source's bytes to the verdict from here on. OSError (EOPNOTSUPP: it is closing).

        One that bytes may come from stays in until it is closed.
        False when the buffers are too small for it to pay: nothing was done.
        """
        # Makes the receive buffer hold so much, if it does not. Where segments are of 64 KiB, as on loopback,
        # a smaller one leaves too little room for the kernel to open the window once all was redirected.
        flow.source.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, _WINDOW)
        try:
            if not flow.roomy:
                return False
            self._insert(self._sources, flow.cookie, flow.source)
            return True
        finally:
            # runs the verdict on what came between the last recv() and the insertion
            flow.source.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)

    def leave(self, flow: KernelFlow) -> None:
        """The source's bytes are userspace's again. What arrives in this moment is lost: nothing may."""
        with contextlib.suppress(FileNotFoundError):
            bpf.map_delete(self._sources, _u64(flow.cookie))

    @staticmethod
    def _insert(fd: int, cookie: int, sock: socket.socket) -> None:
        bpf.map_update(fd, _u64(cookie), struct.pack("=Q", sock.fileno()), bpf.NOEXIST)

    def release(self, flows: Iterable[KernelFlow]) -> None:
        """Gives records back. Their sockets are about to be closed, which takes them out.

        Who wants them reset says so after this.
        """
        for flow in flows:
            with contextlib.suppress(FileNotFoundError):
                bpf.map_delete(self._index, _u64(flow.cookie))
            with contextlib.suppress(OSError):  # closed already
                flow.source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_RESET)
                progress(flow.source)  # waits for a verdict that found the record, see `hold`
            self._free.append(flow.index)

    def cookies(self) -> set[int]:
        """The cookies of all directions that have a record, as the kernel sees them."""
        found: set[int] = set()
        key = bpf.map_next_key(self._index, None, 8)
        while key is not None and len(found) <= MAX_SPLICE_FLOWS:
            found.add(int.from_bytes(key, sys.byteorder))
            key = bpf.map_next_key(self._index, key, 8)
        return found

    def forget(self, cookies: Iterable[int]) -> int:
        """Deletes entries that belong to no session; how many."""
        count = 0
        for cookie in cookies:
            for fd in (self._sources, self._targets, self._index):
                with contextlib.suppress(FileNotFoundError):
                    bpf.map_delete(fd, _u64(cookie))
            count += 1
        return count


def _u64(value: int) -> bytes:
    return struct.pack("=Q", value)


def _read_so_far(sock: socket.socket) -> int:
    """Bytes that were ever read of a socket that is in no map (FIONREAD is not to be trusted there)."""
    for _ in range(_LOOKS):
        before = progress(sock)
        if before.state != TCP_ESTABLISHED:
            break
        unread = _ioctl(sock, termios.FIONREAD)
        if progress(sock).received == before.received:
            return before.received - unread
    raise CannotSplice("it is closing, or its bytes do not stand still")


def _ioctl(sock: socket.socket, request: int) -> int:
    return int.from_bytes(fcntl.ioctl(sock.fileno(), request, b"\0\0\0\0"), sys.byteorder)


def _written(sock: socket.socket) -> int | None:
    """All that was ever written to a socket's TCP, in its own bytes_acked. None: it does not stand still.

    Exact, also under loss: each acknowledgement takes from one what it adds to the other. One that comes
    between the two readings would make it too small.
    """
    acked = progress(sock).acked
    for _ in range(_LOOKS):
        before, queued = acked, _ioctl(sock, termios.TIOCOUTQ)
        acked = progress(sock).acked
        if acked == before:
            return acked + queued
    return None
