"""bpf(2) by ctypes: maps, programs, links, object info.

Every call raises OSError with the command's name when it fails. File descriptors are close-on-exec,
as the kernel makes them, and belong to the caller.
"""

from __future__ import annotations

import ctypes
import os
import platform
from ctypes import c_char, c_int32, c_uint8, c_uint32, c_uint64
from enum import IntEnum
from typing import NamedTuple

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
    LRU_HASH = 9
    SOCKHASH = 18
    REUSEPORT_SOCKARRAY = 20
    SK_STORAGE = 24
    RINGBUF = 27


class ProgType(IntEnum):
    SOCK_OPS = 13
    SK_SKB = 14
    SK_REUSEPORT = 21
    CGROUP_SOCKOPT = 25


class AttachType(IntEnum):
    NONE = 0
    CGROUP_SOCK_OPS = 3
    SK_SKB_STREAM_VERDICT = 5
    CGROUP_GETSOCKOPT = 21
    SK_REUSEPORT_SELECT_OR_MIGRATE = 40


F_NO_PREALLOC = 1 << 0
F_CLONE = 1 << 9
F_MMAPABLE = 1 << 10

ANY = 0
NOEXIST = 1
EXIST = 2


class _MapCreate(ctypes.Structure):
    _fields_ = [
        ("map_type", c_uint32),
        ("key_size", c_uint32),
        ("value_size", c_uint32),
        ("max_entries", c_uint32),
        ("map_flags", c_uint32),
        ("inner_map_fd", c_uint32),
        ("numa_node", c_uint32),
        ("map_name", c_char * 16),
        ("map_ifindex", c_uint32),
        ("btf_fd", c_uint32),
        ("btf_key_type_id", c_uint32),
        ("btf_value_type_id", c_uint32),
    ]


class _MapElem(ctypes.Structure):
    _fields_ = [
        ("map_fd", c_uint32),
        ("pad", c_uint32),
        ("key", c_uint64),
        ("value", c_uint64),
        ("flags", c_uint64),
    ]


class _ProgLoad(ctypes.Structure):
    _fields_ = [
        ("prog_type", c_uint32),
        ("insn_cnt", c_uint32),
        ("insns", c_uint64),
        ("license", c_uint64),
        ("log_level", c_uint32),
        ("log_size", c_uint32),
        ("log_buf", c_uint64),
        ("kern_version", c_uint32),
        ("prog_flags", c_uint32),
        ("prog_name", c_char * 16),
        ("prog_ifindex", c_uint32),
        ("expected_attach_type", c_uint32),
    ]


class _ById(ctypes.Structure):
    _fields_ = [("id", c_uint32), ("next_id", c_uint32), ("open_flags", c_uint32)]


class _Info(ctypes.Structure):
    _fields_ = [("bpf_fd", c_uint32), ("info_len", c_uint32), ("info", c_uint64)]


class _BtfLoad(ctypes.Structure):
    _fields_ = [
        ("btf", c_uint64),
        ("btf_log_buf", c_uint64),
        ("btf_size", c_uint32),
        ("btf_log_size", c_uint32),
        ("btf_log_level", c_uint32),
    ]


class _LinkCreate(ctypes.Structure):
    _fields_ = [
        ("prog_fd", c_uint32),
        ("target_fd", c_uint32),
        ("attach_type", c_uint32),
        ("flags", c_uint32),
    ]


class _LinkUpdate(ctypes.Structure):
    _fields_ = [
        ("link_fd", c_uint32),
        ("new_prog_fd", c_uint32),
        ("flags", c_uint32),
        ("old_prog_fd", c_uint32),
    ]


class _ProgAttach(ctypes.Structure):
    _fields_ = [
        ("target_fd", c_uint32),
        ("attach_bpf_fd", c_uint32),
        ("attach_type", c_uint32),
        ("attach_flags", c_uint32),
        ("replace_bpf_fd", c_uint32),
    ]


class _Word(ctypes.Structure):
    _fields_ = [("value", c_uint32)]


class _ProgQuery(ctypes.Structure):
    _fields_ = [
        ("target_fd", c_uint32),
        ("attach_type", c_uint32),
        ("query_flags", c_uint32),
        ("attach_flags", c_uint32),
        ("prog_ids", c_uint64),
        ("prog_cnt", c_uint32),
    ]


class _MapInfo(ctypes.Structure):
    _fields_ = [
        ("type", c_uint32),
        ("id", c_uint32),
        ("key_size", c_uint32),
        ("value_size", c_uint32),
        ("max_entries", c_uint32),
        ("map_flags", c_uint32),
        ("name", c_char * 16),
    ]


class _ProgInfo(ctypes.Structure):
    _fields_ = [
        ("type", c_uint32),
        ("id", c_uint32),
        ("tag", c_uint8 * 8),
        ("jited_prog_len", c_uint32),
        ("xlated_prog_len", c_uint32),
        ("jited_prog_insns", c_uint64),
        ("xlated_prog_insns", c_uint64),
        ("load_time", c_uint64),
        ("created_by_uid", c_uint32),
        ("nr_map_ids", c_uint32),
        ("map_ids", c_uint64),
        ("name", c_char * 16),
        ("ifindex", c_uint32),
        ("gpl_compatible", c_uint32),
        ("netns_dev", c_uint64),
        ("netns_ino", c_uint64),
        ("nr_jited_ksyms", c_uint32),
        ("nr_jited_func_lens", c_uint32),
        ("jited_ksyms", c_uint64),
        ("jited_func_lens", c_uint64),
        ("btf_id", c_uint32),
        ("func_info_rec_size", c_uint32),
        ("func_info", c_uint64),
        ("nr_func_info", c_uint32),
        ("nr_line_info", c_uint32),
        ("line_info", c_uint64),
        ("jited_line_info", c_uint64),
        ("nr_jited_line_info", c_uint32),
        ("line_info_rec_size", c_uint32),
        ("jited_line_info_rec_size", c_uint32),
        ("nr_prog_tags", c_uint32),
        ("prog_tags", c_uint64),
        ("run_time_ns", c_uint64),
        ("run_cnt", c_uint64),
    ]


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
        _MapCreate(
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
    _bpf(Cmd.MAP_LOOKUP_ELEM, _MapElem(map_fd=fd, key=_address(key_buffer), value=_address(value)))
    return value.raw


def map_update(fd: int, key: bytes, value: bytes, flags: int = ANY) -> None:
    key_buffer = ctypes.create_string_buffer(key, len(key))
    value_buffer = ctypes.create_string_buffer(value, len(value))
    _bpf(
        Cmd.MAP_UPDATE_ELEM,
        _MapElem(map_fd=fd, key=_address(key_buffer), value=_address(value_buffer), flags=flags),
    )


def map_delete(fd: int, key: bytes) -> None:
    key_buffer = ctypes.create_string_buffer(key, len(key))
    _bpf(Cmd.MAP_DELETE_ELEM, _MapElem(map_fd=fd, key=_address(key_buffer)))


def map_next_key(fd: int, key: bytes | None, key_size: int) -> bytes | None:
    """The key after `key` (the first one after None), None at the end."""
    key_buffer = ctypes.create_string_buffer(key, key_size) if key is not None else None
    following = ctypes.create_string_buffer(key_size)
    attr = _MapElem(map_fd=fd, key=_address(key_buffer) if key_buffer else 0, value=_address(following))
    try:
        _bpf(Cmd.MAP_GET_NEXT_KEY, attr)
    except FileNotFoundError:
        return None
    return following.raw


def prog_load(
    kind: ProgType, insns: bytes, name: str, attach: AttachType = AttachType.NONE, log_size: int = 0
) -> tuple[int, str]:
    """Loads a GPL program: (fd, verifier log). On failure the OSError carries the log as `verifier_log`."""
    code = ctypes.create_string_buffer(insns, len(insns))
    licence = ctypes.create_string_buffer(b"GPL")
    log = ctypes.create_string_buffer(log_size) if log_size else None
    attr = _ProgLoad(
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
    return _bpf(Cmd.BTF_LOAD, _BtfLoad(btf=_address(buffer), btf_size=len(blob)))


def link_create(prog_fd: int, target_fd: int, attach: AttachType) -> int:
    """Attaches a program for as long as somebody holds the link's fd."""
    return _bpf(Cmd.LINK_CREATE, _LinkCreate(prog_fd=prog_fd, target_fd=target_fd, attach_type=attach))


def map_attach(prog_fd: int, map_fd: int, attach: AttachType) -> None:
    """Gives a map of sockets its program, for as long as the map exists."""
    _bpf(Cmd.PROG_ATTACH, _ProgAttach(target_fd=map_fd, attach_bpf_fd=prog_fd, attach_type=attach))


def link_update(link_fd: int, new_prog_fd: int) -> None:
    """Replaces the program behind a link in one step: no socket sees a moment without one."""
    _bpf(Cmd.LINK_UPDATE, _LinkUpdate(link_fd=link_fd, new_prog_fd=new_prog_fd))


def link_detach(link_fd: int) -> None:
    _bpf(Cmd.LINK_DETACH, _Word(value=link_fd))


def map_fd_by_id(map_id: int) -> int:
    return _bpf(Cmd.MAP_GET_FD_BY_ID, _ById(id=map_id))


def prog_fd_by_id(prog_id: int) -> int:
    return _bpf(Cmd.PROG_GET_FD_BY_ID, _ById(id=prog_id))


def _info(fd: int, info: ctypes.Structure) -> None:
    _bpf(Cmd.OBJ_GET_INFO_BY_FD, _Info(bpf_fd=fd, info_len=ctypes.sizeof(info), info=_address(info)))


def map_info(fd: int) -> MapInfo:
    info = _MapInfo()
    _info(fd, info)
    name = info.name.decode()
    return MapInfo(info.id, name, info.type, info.key_size, info.value_size, info.max_entries)


def prog_info(fd: int) -> ProgInfo:
    info = _ProgInfo()
    _info(fd, info)
    return ProgInfo(info.id, info.name.decode(), info.type)


def prog_run_stats(fd: int) -> RunStats:
    info = _ProgInfo()
    _info(fd, info)
    return RunStats(info.run_time_ns, info.run_cnt)


def enable_stats() -> int:
    """Run times are counted while the fd returned stays open."""
    return _bpf(Cmd.ENABLE_STATS, _Word(value=0))


def cgroup_prog_ids(cgroup_fd: int, attach: AttachType) -> list[int]:
    """Ids of the programs attached to one cgroup (not those inherited from above)."""
    ids = (c_uint32 * 64)()
    attr = _ProgQuery(target_fd=cgroup_fd, attach_type=attach, prog_ids=ctypes.addressof(ids), prog_cnt=64)
    _bpf(Cmd.PROG_QUERY, attr)
    return list(ids[: attr.prog_cnt])
