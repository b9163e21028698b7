"""The maps of an instance: made here, named to the programs by number, handed over by fd."""

from __future__ import annotations

import ctypes
import os

from tidegate.kernel import bpf, btf
from tidegate.kernel.bpf import MapType
from tidegate.kernel.loader import MapNumber
from tidegate.kernel.records import (
    MAX_LISTENERS,
    MAX_SLOTS,
    MAX_WORKERS,
    AgeHistogram,
    Slot,
    SpliceFlow,
    Stamp,
    SteerGroup,
)

# migrated connections wait in a backlog: this many may do so at once before the oldest are forgotten
MAX_MOVED = 65536
# directions that one worker may splice at once, 128 bytes each; two make a session
MAX_SPLICE_FLOWS = 8192
# a power of two; a record of a ring buffer takes 16 bytes, and each direction rings twice at most
SPLICE_BELL_SIZE = 32 * MAX_SPLICE_FLOWS


def _records(kind: MapType, record: type[ctypes.Structure], entries: int, name: str, flags: int) -> int:
    blob, key, value = btf.describe(record)
    btf_fd = bpf.btf_load(blob)
    try:
        return bpf.map_create(kind, 4, ctypes.sizeof(record), entries, name, flags, btf=(btf_fd, key, value))
    finally:
        os.close(btf_fd)


def create(number: MapNumber) -> int:
    """The fd of a new map of that kind. OSError when the kernel refuses."""
    match number:
        case MapNumber.STAMPS:
            flags = bpf.F_NO_PREALLOC | bpf.F_CLONE  # children inherit the listener's entry
            return _records(MapType.SK_STORAGE, Stamp, 0, "tg_stamps", flags)
        case MapNumber.SLOTS:
            size = MAX_SLOTS * ctypes.sizeof(Slot)  # one value: the programs index it by themselves
            return bpf.map_create(MapType.ARRAY, 4, size, 1, "tg_slots", bpf.F_MMAPABLE)
        case MapNumber.AGES:
            return _records(MapType.ARRAY, AgeHistogram, MAX_SLOTS, "tg_ages", bpf.F_MMAPABLE)
        case MapNumber.LISTENERS:
            return bpf.map_create(MapType.HASH, 8, 4, MAX_LISTENERS * MAX_WORKERS, "tg_listeners")
        case MapNumber.MOVED:
            return bpf.map_create(MapType.LRU_HASH, 8, 4, MAX_MOVED, "tg_moved")
        case MapNumber.GROUP:
            return _records(MapType.ARRAY, SteerGroup, 1, "tg_group", bpf.F_MMAPABLE)
        case MapNumber.SOCKS:
            return bpf.map_create(MapType.REUSEPORT_SOCKARRAY, 4, 8, MAX_WORKERS, "tg_socks")
        case MapNumber.SPLICED:
            return bpf.map_create(MapType.SOCKHASH, 8, 8, MAX_SPLICE_FLOWS, "tg_spliced")
        case MapNumber.SPLICE_SOURCES:
            return bpf.map_create(MapType.SOCKHASH, 8, 8, MAX_SPLICE_FLOWS, "tg_splice_src")
        case MapNumber.SPLICE_INDEX:
            return bpf.map_create(MapType.HASH, 8, 4, MAX_SPLICE_FLOWS, "tg_splice_index")
        case MapNumber.SPLICE_BELL:
            return bpf.map_create(MapType.RINGBUF, 0, 0, SPLICE_BELL_SIZE, "tg_splice_bell")
        case MapNumber.SPLICE_FLOWS:
            return _records(MapType.ARRAY, SpliceFlow, MAX_SPLICE_FLOWS, "tg_splice_flows", bpf.F_MMAPABLE)


# one of each per instance; a steered listener adds a GROUP and a SOCKS of its own
INSTANCE_MAPS = (
    MapNumber.STAMPS,
    MapNumber.SLOTS,
    MapNumber.AGES,
    MapNumber.LISTENERS,
    MapNumber.MOVED,
)
