"""Process chores: forking, dying with the parent, giving privileges up, fd limits."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from tidegate.config.resolve import Identity

# linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38
PR_CAPBSET_DROP = 24

_libc = ctypes.CDLL(None, use_errno=True)


def fork(body: Callable[[], None]) -> int:
    """Run `body` in a child that never returns into our stack; returns the child's pid."""
    sys.stderr.flush()
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        _run_and_exit(body)
    return pid


def _run_and_exit(body: Callable[[], None]) -> NoReturn:
    code = 70  # EX_SOFTWARE
    try:
        body()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def die_with(parent: int) -> None:
    """Be killed when `parent` dies; ends at once when it is dead already.

    Called after the last change of user: the kernel clears the setting there.
    """
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def become(user: Identity | None) -> None:
    """Give up root and every capability, for good; open fds stay usable."""
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    if user is None:
        return
    for capability in range(64):
        if _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break  # past the last one this kernel knows
    os.setgroups([])
    os.setresgid(user.gid, user.gid, user.gid)
    os.setresuid(user.uid, user.uid, user.uid)


def raise_nofile() -> int:
    """Lift the soft limit of open files to the hard one; returns it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), f"prctl({option})")
