"""bpf(2) by ctypes: maps, programs, links, object info.

Every call raises OSError with the command's name when it fails. File descriptors are close-on-exec,
as the kernel makes them, and belong to the caller.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from ctypes import c_char, c_int32, c_uint32
from enum import IntEnum
from typing import NamedTuple

from tidegate.kernel import bpf_attrs as attrs

_SYSCALL_NUMBER = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class Cmd(IntEnum):
    MAP_CREATE = 0
    MAP_LOOKUP_ELEM = 1
    MAP_UPDATE_ELEM = 2
    MAP_DELETE_ELEM = 3
    MAP_GET_NEXT_KEY = 4
    PROG_LOAD = 5
    PROG_ATTACH = 8
    PROG_TEST_RUN = 10
    MAP_GET_NEXT_ID = 12
    PROG_GET_FD_BY_ID = 13
    MAP_GET_FD_BY_ID = 14
    OBJ_GET_INFO_BY_FD = 15
    PROG_QUERY = 16
    BTF_LOAD = 18
    LINK_CREATE = 28
    LINK_UPDATE = 29
    ENABLE_STATS = 32
    LINK_DETACH = 34


class MapType(IntEnum):
    HASH = 1
    ARRAY = 2
    PERCPU_ARRAY = 6
    LRU_HASH = 9
    SOCKHASH = 18
    REUSEPORT_SOCKARRAY = 20
    SK_STORAGE = 24
    RINGBUF = 27


class ProgType(IntEnum):
    SCHED_CLS = 3
    SOCK_OPS = 13
    SK_SKB = 14
    CGROUP_SOCK_ADDR = 18
    SK_REUSEPORT = 21
    CGROUP_SOCKOPT = 25


class AttachType(IntEnum):
    NONE = 0
    CGROUP_SOCK_OPS = 3
    SK_SKB_STREAM_VERDICT = 5
    CGROUP_GETSOCKOPT = 21
    CGROUP_INET4_GETPEERNAME = 29
    CGROUP_INET6_GETPEERNAME = 30
    SK_REUSEPORT_SELECT_OR_MIGRATE = 40


F_NO_PREALLOC = 1 << 0
F_CLONE = 1 << 9
F_MMAPABLE = 1 << 10

ANY = 0
NOEXIST = 1
EXIST = 2


class MapInfo(NamedTuple):
    id: int
    name: str
    type: int
    key_size: int
    value_size: int
    max_entries: int


class ProgInfo(NamedTuple):
    id: int
    name: str
    type: int


class RunStats(NamedTuple):
    """Counted only while statistics are enabled (`enable_stats`)."""

    run_ns: int
    runs: int


def _bpf(cmd: Cmd, attr: ctypes.Structure) -> int:
    number = _SYSCALL_NUMBER.get(platform.machine())
    if number is None:
        raise OSError(38, f"bpf(2): its number on {platform.machine()} is not known here")
    result: int = _libc.syscall(number, c_int32(cmd), ctypes.byref(attr), c_uint32(ctypes.sizeof(attr)))
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"BPF_{cmd.name}: {os.strerror(errno)}")
    return result


def _address(buffer: ctypes.Array[c_char] | ctypes.Structure) -> int:
    return ctypes.addressof(buffer)


def map_create(
    kind: MapType,
    key_size: int,
    value_size: int,
    max_entries: int,
    name: str,
    flags: int = 0,
    btf: tuple[int, int, int] | None = None,
) -> int:
    """The fd of a new map. `btf` is (BTF fd, type id of the key, type id of the value)."""
    btf_fd, btf_key, btf_value = btf or (0, 0, 0)
    return _bpf(
        Cmd.MAP_CREATE,
        attrs.MapCreate(
            map_type=kind,
            key_size=key_size,
            value_size=value_size,
            max_entries=max_entries,
            map_flags=flags,
            map_name=name.encode()[:15],
            btf_fd=btf_fd,
            btf_key_type_id=btf_key,
            btf_value_type_id=btf_value,
        ),
    )


def map_lookup(fd: int, key: bytes, value_size: int) -> bytes:
    """The value under `key`. OSError(ENOENT) when there is none."""
    key_buffer = ctypes.create_string_buffer(key, len(key))
    value = ctypes.create_string_buffer(value_size)
    _bpf(Cmd.MAP_LOOKUP_ELEM, attrs.MapElem(map_fd=fd, key=_address(key_buffer), value=_address(value)))
    return value.raw


def map_update(fd: int, key: bytes, value: bytes, flags: int = ANY) -> None:
    key_buffer = ctypes.create_string_buffer(key, len(key))
    value_buffer = ctypes.create_string_buffer(value, len(value))
    _bpf(
        Cmd.MAP_UPDATE_ELEM,
        attrs.MapElem(map_fd=fd, key=_address(key_buffer), value=_address(value_buffer), flags=flags),
    )


def map_delete(fd: int, key: bytes) -> None:
    key_buffer = ctypes.create_string_buffer(key, len(key))
    _bpf(Cmd.MAP_DELETE_ELEM, attrs.MapElem(map_fd=fd, key=_address(key_buffer)))


def map_next_key(fd: int, key: bytes | None, key_size: int) -> bytes | None:
    """The key after `key` (the first one after None), None at the end."""
    key_buffer = ctypes.create_string_buffer(key, key_size) if key is not None else None
    following = ctypes.create_string_buffer(key_size)
    attr = attrs.MapElem(map_fd=fd, key=_address(key_buffer) if key_buffer else 0, value=_address(following))
    try:
        _bpf(Cmd.MAP_GET_NEXT_KEY, attr)
    except FileNotFoundError:
        return None
    return following.raw


def map_lookup_percpu(fd: int, key: bytes, value_size: int) -> list[bytes]:
    """The value of each possible CPU."""
    step = -(-value_size // 8) * 8
    whole = map_lookup(fd, key, step * possible_cpus())
    return [whole[at : at + value_size] for at in range(0, len(whole), step)]


def possible_cpus() -> int:
    """CPUs that the kernel keeps values for, present or not."""
    with open("/sys/devices/system/cpu/possible") as file:
        last = file.read().replace("-", ",").split(",")[-1]
    return int(last) + 1


def map_ids() -> Iterator[int]:
    """Of every map there is. PermissionError without root."""
    attr = attrs.NextId()
    while True:
        try:
            _bpf(Cmd.MAP_GET_NEXT_ID, attr)
        except FileNotFoundError:
            return
        yield attr.next_id
        attr.start_id = attr.next_id


def prog_test_run(fd: int, packet: bytes, context: bytes = b"") -> bytes:
    """Runs a program once on a packet; what it made of it. `context` is a struct __sk_buff."""
    given = ctypes.create_string_buffer(packet, len(packet))
    out = ctypes.create_string_buffer(len(packet))
    around = ctypes.create_string_buffer(context, len(context)) if context else None
    attr = attrs.TestRun(
        prog_fd=fd,
        data_size_in=len(packet),
        data_size_out=len(packet),
        data_in=_address(given),
        data_out=_address(out),
        ctx_size_in=len(context),
        ctx_in=_address(around) if around is not None else 0,
    )
    _bpf(Cmd.PROG_TEST_RUN, attr)
    return out.raw[: attr.data_size_out]


def prog_load(
    kind: ProgType, insns: bytes, name: str, attach: AttachType = AttachType.NONE, log_size: int = 0
) -> tuple[int, str]:
    """Loads a GPL program: (fd, verifier log). On failure the OSError carries the log as `verifier_log`."""
    code = ctypes.create_string_buffer(insns, len(insns))
    licence = ctypes.create_string_buffer(b"GPL")
    log = ctypes.create_string_buffer(log_size) if log_size else None
    attr = attrs.ProgLoad(
        prog_type=kind,
        insn_cnt=len(insns) // 8,
        insns=_address(code),
        license=_address(licence),
        log_level=1 if log else 0,
        log_size=log_size,
        log_buf=_address(log) if log else 0,
        prog_name=name.encode()[:15],
        expected_attach_type=attach,
    )
    try:
        fd = _bpf(Cmd.PROG_LOAD, attr)
    except OSError as error:
        error.verifier_log = log.value.decode(errors="replace") if log else ""  # type: ignore[attr-defined]
        raise
    return fd, log.value.decode(errors="replace") if log else ""


def btf_load(blob: bytes) -> int:
    buffer = ctypes.create_string_buffer(blob, len(blob))
    return _bpf(Cmd.BTF_LOAD, attrs.BtfLoad(btf=_address(buffer), btf_size=len(blob)))


def link_create(prog_fd: int, target_fd: int, attach: AttachType) -> int:
    """Attaches a program for as long as somebody holds the link's fd."""
    return _bpf(Cmd.LINK_CREATE, attrs.LinkCreate(prog_fd=prog_fd, target_fd=target_fd, attach_type=attach))


def map_attach(prog_fd: int, map_fd: int, attach: AttachType) -> None:
    """Gives a map of sockets its program, for as long as the map exists."""
    _bpf(Cmd.PROG_ATTACH, attrs.ProgAttach(target_fd=map_fd, attach_bpf_fd=prog_fd, attach_type=attach))


def link_update(link_fd: int, new_prog_fd: int) -> None:
    """Replaces the program behind a link in one step: no socket sees a moment without one."""
    _bpf(Cmd.LINK_UPDATE, attrs.LinkUpdate(link_fd=link_fd, new_prog_fd=new_prog_fd))


def link_detach(link_fd: int) -> None:
    _bpf(Cmd.LINK_DETACH, attrs.Word(value=link_fd))


def map_fd_by_id(map_id: int) -> int:
    return _bpf(Cmd.MAP_GET_FD_BY_ID, attrs.ById(id=map_id))


def prog_fd_by_id(prog_id: int) -> int:
    return _bpf(Cmd.PROG_GET_FD_BY_ID, attrs.ById(id=prog_id))


def _info(fd: int, info: ctypes.Structure) -> None:
    _bpf(Cmd.OBJ_GET_INFO_BY_FD, attrs.Info(bpf_fd=fd, info_len=ctypes.sizeof(info), info=_address(info)))


def map_info(fd: int) -> MapInfo:
    info = attrs.MapInfo()
    _info(fd, info)
    name = info.name.decode()
    return MapInfo(info.id, name, info.type, info.key_size, info.value_size, info.max_entries)


def prog_info(fd: int) -> ProgInfo:
    info = attrs.ProgInfo()
    _info(fd, info)
    return ProgInfo(info.id, info.name.decode(), info.type)


def prog_run_stats(fd: int) -> RunStats:
    info = attrs.ProgInfo()
    _info(fd, info)
    return RunStats(info.run_time_ns, info.run_cnt)


def enable_stats() -> int:
    """Run times are counted while the fd returned stays open."""
    return _bpf(Cmd.ENABLE_STATS, attrs.Word(value=0))


def cgroup_prog_ids(cgroup_fd: int, attach: AttachType) -> list[int]:
    """Ids of the programs attached to one cgroup (not those inherited from above)."""
    ids = (c_uint32 * 64)()
    attr = attrs.ProgQuery(
        target_fd=cgroup_fd, attach_type=attach, prog_ids=ctypes.addressof(ids), prog_cnt=64
    )
    _bpf(Cmd.PROG_QUERY, attr)
    return list(ids[: attr.prog_cnt])
