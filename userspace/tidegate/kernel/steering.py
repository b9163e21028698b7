"""Steering of one reuseport group: its program, its settings, and who is in it.

A group has positions, one per listening socket; each stands for a slot. The worker's state lives in
the slot (slots.py); here is only which slots compete for the group's connections, and how.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Mapping
from typing import Any

from tidegate.config.model import Steer, WhenFull
from tidegate.kernel import bpf, maps
from tidegate.kernel.loader import STEER, KernelUnavailable, MapNumber, Objects
from tidegate.kernel.records import (
    MAX_WORKERS,
    NO_SLOT,
    SteerGroup,
    SteerPolicy,
    Verdict,
    WhenFullRule,
)
from tidegate.kernel.slots import map_words

_SO_ATTACH_REUSEPORT_EBPF = 52
_SO_DETACH_REUSEPORT_BPF = 68

_POLICY = SteerGroup.policy.offset // 8
_WHEN_FULL = SteerGroup.when_full.offset // 8
_HANG_AFTER = SteerGroup.hang_after_ns.offset // 8
_COUNT = SteerGroup.count.offset // 8
_SLOTS = SteerGroup.slots.offset // 4
_VERDICTS = SteerGroup.verdicts.offset // 8

_POLICIES = {
    Steer.P2C: SteerPolicy.P2C,
    Steer.LEAST_QUEUE: SteerPolicy.LEAST_QUEUE,
    Steer.HASH: SteerPolicy.HASH,
    Steer.CPU: SteerPolicy.CPU,
}
_RULES = {WhenFull.QUEUE: WhenFullRule.QUEUE, WhenFull.REFUSE: WhenFullRule.REFUSE}


class SteeredGroup:
    """One listener's reuseport group under steer.c. Owns its two maps and its program."""

    def __init__(self, group_fd: int, socks_fd: int, prog_fd: int) -> None:
        self.group_fd = group_fd
        self.socks_fd = socks_fd
        self.prog_fd = prog_fd
        self._words = map_words(group_fd, ctypes.sizeof(SteerGroup))
        self._slots = self._words.cast("B").cast("I")

    @classmethod
    def load(cls, objects: Objects, map_fds: Mapping[MapNumber, int]) -> SteeredGroup:
        """Makes the group's maps and loads its program over them. KernelUnavailable where it is refused."""
        with contextlib.ExitStack() as undo:
            try:
                group_fd = maps.create(MapNumber.GROUP)
                undo.callback(os.close, group_fd)
                socks_fd = maps.create(MapNumber.SOCKS)
                undo.callback(os.close, socks_fd)
            except OSError as error:
                raise KernelUnavailable(
                    f"the kernel refuses a map for steering: {error.strerror}",
                    "Linux 5.14 or newer is needed",
                ) from error
            own = {**map_fds, MapNumber.GROUP: group_fd, MapNumber.SOCKS: socks_fd}
            prog_fd = objects.load(STEER, own)
            undo.callback(os.close, prog_fd)
            group = cls(group_fd, socks_fd, prog_fd)
            for position in range(MAX_WORKERS):
                group._slots[_SLOTS + position] = NO_SLOT
            undo.pop_all()
        return group

    def configure(self, policy: Steer, when_full: WhenFull, hang_after_ns: int) -> None:
        """Takes effect with the next connection. `hang_after_ns` = 0: no worker ever looks hung."""
        self._words[_POLICY] = _POLICIES[policy]
        self._words[_WHEN_FULL] = _RULES[when_full]
        self._words[_HANG_AFTER] = hang_after_ns

    def add(self, sock: socket.socket, slot: int) -> int:
        """Lets a listening SO_REUSEPORT socket compete; its position. OSError(EEXIST): it does already."""
        for position in range(MAX_WORKERS):
            if self._slots[_SLOTS + position] == NO_SLOT:
                break
        else:
            raise KernelUnavailable(f"more than {MAX_WORKERS} workers", f"workers = {MAX_WORKERS} at most")
        key = struct.pack("=I", position)
        # a listener that was closed left its place empty, but one that was only taken out did too
        bpf.map_update(self.socks_fd, key, struct.pack("=Q", sock.fileno()), bpf.ANY)
        self._slots[_SLOTS + position] = slot
        self._words[_COUNT] = max(self._words[_COUNT], position + 1)
        return position

    def remove(self, slot: int) -> None:
        """Takes a slot out: no new connection, nor one that migrates, is given to it. Idempotent."""
        for position in range(MAX_WORKERS):
            if self._slots[_SLOTS + position] == slot:
                self._slots[_SLOTS + position] = NO_SLOT
                with contextlib.suppress(FileNotFoundError):  # its socket is closed already
                    bpf.map_delete(self.socks_fd, struct.pack("=I", position))
        used = [p for p in range(MAX_WORKERS) if self._slots[_SLOTS + p] != NO_SLOT]
        self._words[_COUNT] = used[-1] + 1 if used else 0

    def attach(self, sock: socket.socket) -> None:
        """Puts the program on the whole reuseport group of a socket."""
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_EBPF, self.prog_fd)

    @staticmethod
    def detach(sock: socket.socket) -> None:
        """Back to the kernel's own hash."""
        sock.setsockopt(socket.SOL_SOCKET, _SO_DETACH_REUSEPORT_BPF, 0)

    @property
    def slots(self) -> list[int]:
        """The slots that compete, by position."""
        count = self._words[_COUNT]
        return [slot for slot in self._slots[_SLOTS : _SLOTS + count] if slot != NO_SLOT]

    def verdicts(self) -> dict[Verdict, int]:
        """How often each verdict was given."""
        return {verdict: self._words[_VERDICTS + verdict] for verdict in Verdict}

    def fds(self) -> dict[str, int]:
        """Its fds by name, for a hand-over."""
        return {"group": self.group_fd, "socks": self.socks_fd, "prog": self.prog_fd}

    @classmethod
    def adopt(cls, fds: Mapping[str, Any]) -> SteeredGroup:
        """The inverse of fds()."""
        return cls(fds["group"], fds["socks"], fds["prog"])

    def close(self) -> None:
        """Closes our fds; the program stays on the group as long as one of its sockets is open."""
        for fd in (self.group_fd, self.socks_fd, self.prog_fd):
            if fd >= 0:
                os.close(fd)
        self.group_fd = self.socks_fd = self.prog_fd = -1
