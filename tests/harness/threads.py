"""Stopping one thread of a process: SIGSTOP always stops all of them, ptrace stops one."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PTRACE_DETACH = 17
_PTRACE_SEIZE = 0x4206
_PTRACE_INTERRUPT = 0x4207
_WALL = 0x40000000  # wait for threads as well
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def threads(pid: int) -> list[int]:
    """Thread ids, the main thread first."""
    return sorted(int(name.name) for name in Path(f"/proc/{pid}/task").iterdir())


@contextmanager
def thread_stopped(tid: int) -> Iterator[None]:
    """Holds one thread while the block runs. The calling thread has to stay the same.

    Raises:
        OSError: ptrace was refused (another tracer, no permission).
    """
    _ptrace(_PTRACE_SEIZE, tid)
    try:
        _ptrace(_PTRACE_INTERRUPT, tid)
        os.waitpid(tid, _WALL)
        yield
    finally:
        _ptrace(_PTRACE_DETACH, tid)


def _ptrace(request: int, tid: int) -> None:
    if _libc.ptrace(request, tid, None, None) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"ptrace of {tid}: {os.strerror(code)}")
