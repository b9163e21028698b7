"""Typed views of the mmapped maps: the slots (one per listener and worker) and their age histograms.

Every word is read and written by one aligned 8-byte access: no lock, no system call. Words of the
second cache line are the kernel's (atomic adds); userspace writes them only while nobody uses the slot.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import NamedTuple

from tidegate.kernel.records import AGE_BUCKETS, MAX_SLOTS, AgeHistogram, Slot, SlotState

_WORDS = ctypes.sizeof(Slot) // 8
_HEARTBEAT = Slot.heartbeat_ns.offset // 8
_ACTIVE = Slot.active.offset // 8
_CAPACITY = Slot.capacity.offset // 8
_STATE = Slot.state.offset // 8
_BACKLOG = Slot.backlog.offset // 8
_LOST = Slot.lost.offset // 8
_ARRIVED = Slot.arrived.offset // 8
_TAKEN = Slot.taken.offset // 8
_HALF_CLOSED = Slot.half_closed.offset // 8
_GONE = Slot.gone.offset // 8
_MIGRATED = Slot.migrated.offset // 8

_AGE_WORDS = ctypes.sizeof(AgeHistogram) // 8
_AGE_COUNT = AgeHistogram.count.offset // 8
_AGE_SUM = AgeHistogram.sum_ns.offset // 8
_AGE_MAX = AgeHistogram.max_ns.offset // 8
_AGE_BUCKETS = AgeHistogram.buckets.offset // 8
_SIGN = 1 << 63


def map_words(fd: int, size: int) -> memoryview:
    """A map's memory as 64-bit words, shared with the kernel and with forked children."""
    return memoryview(mmap.mmap(fd, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)).cast("Q")[: size // 8]


class SlotCounts(NamedTuple):
    """A reading of one slot, words read one after the other."""

    heartbeat_ns: int
    active: int
    capacity: int
    state: int
    backlog: int
    lost: int
    arrived: int
    taken: int
    half_closed: int
    gone: int
    migrated: int

    @property
    def waiting(self) -> int:
        return max(0, self.arrived - self.taken - self.lost)


class Slots:
    """slots[] of bpf/records.h. Indices are checked by the caller: IndexError beyond MAX_SLOTS."""

    __slots__ = ("words",)

    def __init__(self, fd: int) -> None:
        self.words = map_words(fd, MAX_SLOTS * ctypes.sizeof(Slot))

    def heartbeat(self, slot: int, now_ns: int) -> None:
        """The worker of this slot is alive now."""
        self.words[slot * _WORDS + _HEARTBEAT] = now_ns

    def set_active(self, slot: int, connections: int) -> None:
        """Connections accepted and not yet ended: part of the slot's load."""
        self.words[slot * _WORDS + _ACTIVE] = connections

    def active_store(self, slot: int) -> Callable[[int], None]:
        """`set_active` of one slot, for where it is called for every connection."""
        words, at = self.words, slot * _WORDS + _ACTIVE

        def store(connections: int) -> None:
            words[at] = connections

        return store

    def set_capacity(self, slot: int, connections: int) -> None:
        """Most that `active` may reach before steering calls the slot full; 0: no limit."""
        self.words[slot * _WORDS + _CAPACITY] = connections

    def set_state(self, slot: int, state: SlotState) -> None:
        self.words[slot * _WORDS + _STATE] = state

    def set_backlog(self, slot: int, backlog: int) -> None:
        self.words[slot * _WORDS + _BACKLOG] = backlog

    def set_lost(self, slot: int, connections: int) -> None:
        """May be negative: the correction that makes `waiting` what the kernel says."""
        self.words[slot * _WORDS + _LOST] = connections % (_SIGN << 1)

    def heartbeat_ns(self, slot: int) -> int:
        return self.words[slot * _WORDS + _HEARTBEAT]

    def active(self, slot: int) -> int:
        return self.words[slot * _WORDS + _ACTIVE]

    def state(self, slot: int) -> SlotState:
        return SlotState(self.words[slot * _WORDS + _STATE])

    def arrived(self, slot: int) -> int:
        return signed(self.words[slot * _WORDS + _ARRIVED])

    def taken(self, slot: int) -> int:
        return self.words[slot * _WORDS + _TAKEN]

    def waiting(self, slot: int) -> int:
        """Connections in the kernel's accept queue of this slot."""
        at = slot * _WORDS
        words = self.words
        # taken first: an arrival between the two readings must not look negative
        taken = words[at + _TAKEN]
        return max(0, signed(words[at + _ARRIVED]) - taken - signed(words[at + _LOST]))

    def read(self, slot: int) -> SlotCounts:
        w = self.words
        at = slot * _WORDS
        taken = w[at + _TAKEN]
        return SlotCounts(
            heartbeat_ns=w[at + _HEARTBEAT],
            active=w[at + _ACTIVE],
            capacity=w[at + _CAPACITY],
            state=w[at + _STATE],
            backlog=w[at + _BACKLOG],
            lost=signed(w[at + _LOST]),
            arrived=signed(w[at + _ARRIVED]),
            taken=taken,
            half_closed=w[at + _HALF_CLOSED],
            gone=w[at + _GONE],
            migrated=w[at + _MIGRATED],
        )

    def reset(self, slot: int) -> None:
        """Zeroes a slot. Only while no listener and no worker uses it."""
        for word in range(slot * _WORDS, (slot + 1) * _WORDS):
            self.words[word] = 0


def signed(word: int) -> int:
    """A word that both sides may bring below zero."""
    return word - (_SIGN << 1) if word & _SIGN else word


class AgeCounts(NamedTuple):
    """Ages at first read, ns: bucket b counts those in [2^b, 2^(b+1)), the last all above."""

    count: int  # type: ignore[assignment]  # shadows tuple.count, which nobody needs
    sum_ns: int
    max_ns: int
    buckets: tuple[int, ...]


class Ages:
    """ages[] of bpf/records.h, one histogram per slot."""

    __slots__ = ("words",)

    def __init__(self, fd: int) -> None:
        self.words = map_words(fd, MAX_SLOTS * ctypes.sizeof(AgeHistogram))

    def read(self, slot: int) -> AgeCounts:
        at = slot * _AGE_WORDS
        w = self.words
        buckets = tuple(w[at + _AGE_BUCKETS : at + _AGE_BUCKETS + AGE_BUCKETS])
        return AgeCounts(w[at + _AGE_COUNT], w[at + _AGE_SUM], w[at + _AGE_MAX], buckets)

    def reset(self, slot: int) -> None:
        for word in range(slot * _AGE_WORDS, (slot + 1) * _AGE_WORDS):
            self.words[word] = 0
