"""BPF programs, maps and links that processes hold, and whether they are still in the kernel."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

_SYS_BPF = {"x86_64": 321, "aarch64": 280}[platform.machine()]
# bpf(2) commands that open an object by its id
_GET_FD_BY_ID = {"prog": 13, "map": 14, "link": 30}
_KEYS = {"prog_id": "prog", "map_id": "map", "link_id": "link"}
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(slots=True)
class KernelObjects:
    """Ids by kind: "prog", "map", "link"."""

    ids: dict[str, set[int]] = field(default_factory=lambda: {"prog": set(), "map": set(), "link": set()})

    def __bool__(self) -> bool:
        return any(self.ids.values())

    def __str__(self) -> str:
        return ", ".join(f"{kind} {sorted(ids)}" for kind, ids in self.ids.items() if ids) or "nothing"

    def add(self, other: KernelObjects) -> None:
        for kind, ids in other.ids.items():
            self.ids[kind] |= ids

    def remaining(self) -> KernelObjects:
        """Those that still exist. Ids are not used again while the machine is up."""
        left = KernelObjects()
        for kind, ids in self.ids.items():
            left.ids[kind] = {each for each in ids if exists(kind, each)}
        return left


def held_by(pids: Iterable[int]) -> KernelObjects:
    """What these processes have open, by /proc/PID/fdinfo."""
    found = KernelObjects()
    for pid in pids:
        try:
            entries = list(Path(f"/proc/{pid}/fdinfo").iterdir())
        except OSError:
            continue
        for entry in entries:
            try:
                text = entry.read_text()
            except OSError:
                continue
            for line in text.splitlines():
                key, _, value = line.partition(":")
                if key in _KEYS:
                    found.ids[_KEYS[key]].add(int(value))
    return found


def exists(kind: str, number: int) -> bool:
    """Whether the kernel still has that object. Needs CAP_SYS_ADMIN.

    Raises:
        OSError: anything but "no such id".
    """
    attributes = ctypes.create_string_buffer(number.to_bytes(4, "little"), 128)
    fd = _libc.syscall(_SYS_BPF, _GET_FD_BY_ID[kind], attributes, ctypes.c_uint(len(attributes)))
    if fd >= 0:
        os.close(fd)
        return True
    code = ctypes.get_errno()
    if code == errno.ENOENT:
        return False
    raise OSError(code, os.strerror(code))


def cgroup2_mounts() -> list[Path]:
    mounts = []
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            mounts.append(Path(where))
    return mounts
