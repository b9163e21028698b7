"""ctypes mirrors of bpf/records.h. All times are CLOCK_MONOTONIC nanoseconds.

The kernel side is compiled with one static assertion per size and offset of these classes (see
`static_asserts`), so a mirror that differs from the header fails at load, not in production.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from ctypes import c_uint32, c_uint64
from enum import IntEnum, IntFlag

RECORDS_VERSION = 1

SOL_TIDEGATE = 0x7467
QUEUE_AGE = 1
QUEUE_AGE_SIZE = 32

MAX_SLOTS = 4096
MAX_LISTENERS = 256
MAX_WORKERS = 64
AGE_BUCKETS = 40
NO_SLOT = 0xFFFFFFFF
NO_BUDGET = 0xFFFFFFFF_FFFFFFFF


class StampFlag(IntFlag):
    TAKEN = 1 << 0
    HALF_CLOSED = 1 << 1
    GONE = 1 << 2
    LISTENER = 1 << 3


class SlotState(IntEnum):
    FREE = 0
    ACTIVE = 1
    DRAINING = 2
    DEAD = 3


class SteerPolicy(IntEnum):
    P2C = 0
    LEAST_QUEUE = 1
    HASH = 2
    CPU = 3


class WhenFullRule(IntEnum):
    QUEUE = 0
    REFUSE = 1


class Verdict(IntEnum):
    """What steer.c decided; `MIGRATED` is counted on top of one of the others."""

    FIT = 0
    ALL_HUNG = 1
    ALL_FULL = 2
    REFUSED = 3
    FALLBACK = 4
    MIGRATED = 5


VERDICTS = 8


class Stamp(ctypes.Structure):
    _c_name_ = "stamp"
    _fields_ = [
        ("established_ns", c_uint64),
        ("cookie", c_uint64),
        ("flags", c_uint32),
        ("slot", c_uint32),
    ]


class QueueAgeAnswer(ctypes.Structure):
    _c_name_ = "queue_age"
    _fields_ = [
        ("established_ns", c_uint64),
        ("cookie", c_uint64),
        ("age_ns", c_uint64),
        ("flags", c_uint32),
        ("slot", c_uint32),
    ]


class Slot(ctypes.Structure):
    _c_name_ = "slot"
    _fields_ = [
        ("heartbeat_ns", c_uint64),
        ("active", c_uint64),
        ("capacity", c_uint64),
        ("state", c_uint64),
        ("backlog", c_uint64),
        ("lost", c_uint64),
        ("user_pad", c_uint64 * 2),
        ("arrived", c_uint64),
        ("taken", c_uint64),
        ("half_closed", c_uint64),
        ("gone", c_uint64),
        ("migrated", c_uint64),
        ("kernel_pad", c_uint64 * 3),
    ]


class AgeHistogram(ctypes.Structure):
    _c_name_ = "age_histogram"
    _fields_ = [
        ("count", c_uint64),
        ("sum_ns", c_uint64),
        ("max_ns", c_uint64),
        ("buckets", c_uint64 * AGE_BUCKETS),
        ("pad", c_uint64 * 5),
    ]


class SteerGroup(ctypes.Structure):
    _c_name_ = "steer_group"
    _fields_ = [
        ("policy", c_uint64),
        ("when_full", c_uint64),
        ("hang_after_ns", c_uint64),
        ("count", c_uint64),
        ("pad", c_uint64 * 4),
        ("slots", c_uint32 * MAX_WORKERS),
        ("verdicts", c_uint64 * VERDICTS),
    ]


class SpliceFlow(ctypes.Structure):
    _c_name_ = "splice_flow"
    _fields_ = [
        ("consumed", c_uint64),
        ("limit", c_uint64),
        ("budget", c_uint64),
        ("base", c_uint64),
        ("target", c_uint64),
        ("begin", c_uint64),
        ("user_pad", c_uint64 * 2),
        ("redirected", c_uint64),
        ("passed", c_uint64),
        ("held", c_uint64),
        ("received_ns", c_uint64),
        ("redirected_ns", c_uint64),
        ("repeated", c_uint64),
        ("broken", c_uint64),
        ("kernel_pad", c_uint64),
    ]


SHARED: tuple[type[ctypes.Structure], ...] = (
    Stamp,
    QueueAgeAnswer,
    Slot,
    AgeHistogram,
    SteerGroup,
    SpliceFlow,
)

CONSTANTS: dict[str, int] = {
    "RECORDS_VERSION": RECORDS_VERSION,
    "SOL_TIDEGATE": SOL_TIDEGATE,
    "QUEUE_AGE": QUEUE_AGE,
    "STAMP_TAKEN": StampFlag.TAKEN,
    "STAMP_HALF_CLOSED": StampFlag.HALF_CLOSED,
    "STAMP_GONE": StampFlag.GONE,
    "STAMP_LISTENER": StampFlag.LISTENER,
    "SLOT_FREE": SlotState.FREE,
    "SLOT_ACTIVE": SlotState.ACTIVE,
    "SLOT_DRAINING": SlotState.DRAINING,
    "SLOT_DEAD": SlotState.DEAD,
    "MAX_SLOTS": MAX_SLOTS,
    "MAX_LISTENERS": MAX_LISTENERS,
    "MAX_WORKERS": MAX_WORKERS,
    "AGE_BUCKETS": AGE_BUCKETS,
    "NO_SLOT": NO_SLOT,
    "NO_BUDGET": NO_BUDGET,
    "STEER_P2C": SteerPolicy.P2C,
    "STEER_LEAST_QUEUE": SteerPolicy.LEAST_QUEUE,
    "STEER_HASH": SteerPolicy.HASH,
    "STEER_CPU": SteerPolicy.CPU,
    "WHEN_FULL_QUEUE": WhenFullRule.QUEUE,
    "WHEN_FULL_REFUSE": WhenFullRule.REFUSE,
    "VERDICT_FIT": Verdict.FIT,
    "VERDICT_ALL_HUNG": Verdict.ALL_HUNG,
    "VERDICT_ALL_FULL": Verdict.ALL_FULL,
    "VERDICT_REFUSED": Verdict.REFUSED,
    "VERDICT_FALLBACK": Verdict.FALLBACK,
    "VERDICT_MIGRATED": Verdict.MIGRATED,
    "VERDICTS": VERDICTS,
}


def c_name(record: type[ctypes.Structure]) -> str:
    """The C tag of a mirror."""
    name: str = getattr(record, "_c_name_")  # noqa: B009 - mypy takes it for a field
    return name


def layout(record: type[ctypes.Structure]) -> Iterator[tuple[str, int, int]]:
    """(field, offset, size) of each field, in bytes."""
    for name, *_ in record._fields_:
        field = getattr(record, name)
        yield name, field.offset, field.size


def static_asserts() -> str:
    """C that fails to compile wherever records.h and this module differ."""
    lines = []
    for record in SHARED:
        tag = c_name(record)
        lines.append(f'_Static_assert(sizeof(struct {tag}) == {ctypes.sizeof(record)}, "size of {tag}");')
        for name, offset, size in layout(record):
            where = f'"{tag}.{name}"'
            lines.append(f"_Static_assert(__builtin_offsetof(struct {tag}, {name}) == {offset}, {where});")
            lines.append(f"_Static_assert(sizeof(((struct {tag} *)0)->{name}) == {size}, {where});")
    lines += [f'_Static_assert({name} == {int(value)}ull, "{name}");' for name, value in CONSTANTS.items()]
    return "\n".join(lines) + "\n"
