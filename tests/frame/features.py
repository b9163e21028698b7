"""What the kernel tests need of the host, really tried, each with the name that a skip shows."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import subprocess
import sys
from functools import cache
from pathlib import Path

_BPF_SYSCALL = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}
_PROG_LOAD = 5
_SOCKET_FILTER = 1
# r0 = 0; exit
_PROGRAM = struct.pack("<BBhi", 0xB7, 0, 0, 0) + struct.pack("<BBhi", 0x95, 0, 0, 0)


def load_smallest_program() -> OSError | None:
    """Loads a two-instruction program by bpf(2), with nothing of tidegate's or BCC's in between.

    Returns what the kernel answered when it refused, None when it took it.
    """
    number = _BPF_SYSCALL.get(platform.machine())
    if number is None:
        return OSError(f"no bpf(2) number is known for {platform.machine()}")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    program = ctypes.create_string_buffer(_PROGRAM, len(_PROGRAM))
    licence = ctypes.create_string_buffer(b"GPL")
    attr = struct.pack(
        "<IIQQIIQII16s",
        _SOCKET_FILTER,
        len(_PROGRAM) // 8,
        ctypes.addressof(program),
        ctypes.addressof(licence),
        0,
        0,
        0,
        0,
        0,
        b"tidegate_try",
    )
    buffer = ctypes.create_string_buffer(attr, len(attr))
    fd = libc.syscall(number, _PROG_LOAD, buffer, len(attr))
    if fd < 0:
        error = ctypes.get_errno()
        return OSError(error, os.strerror(error))
    os.close(fd)
    return None


@cache
def missing_for_root() -> str | None:
    """The named feature that `root` tests lack here, or None."""
    return None if os.geteuid() == 0 else "root"


@cache
def missing_for_bpf() -> str | None:
    """The named feature that `bpf` tests lack here, or None: root, bpf(2), BCC, headers, cgroup v2."""
    if missing := missing_for_root():
        return missing
    if refused := load_smallest_program():
        return f"bpf(2): PROG_LOAD: {refused}"
    # in a process of its own: it maps LLVM
    tried = subprocess.run([sys.executable, "-c", "from bcc import BPF"], capture_output=True, text=True)
    if tried.returncode != 0:
        return f"python3-bpfcc: {tried.stderr.strip().splitlines()[-1] if tried.stderr else 'import failed'}"
    if not Path("/lib/modules", platform.release(), "build").is_dir():
        return f"kernel headers: no /lib/modules/{platform.release()}/build"
    if cgroup2_mount() is None:
        return "cgroup v2: not mounted"
    return None


@cache
def cgroup2_mount() -> Path | None:
    """Where the first cgroup v2 hierarchy is mounted (unified or hybrid)."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        fields = line.split()
        if fields[2] == "cgroup2":
            return Path(fields[1])
    return None


@cache
def kernel_features() -> dict[str, str]:
    """Every feature that tidegate's own probes know: why this kernel lacks it, or "" when it has it."""
    from tidegate.supervisor import abilities

    return {result.feature: "" if result.works else result.reason for result in abilities.run_alone()}
