"""Network namespaces: those with a name, those of processes, and a sock_diag socket in each."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tidegate.errors import EXIT_USAGE, OperatorError
from tidegate.kernel import sock_diag

NAMED = Path("/run/netns")  # where ip-netns(8) keeps them
_CLONE_NEWNET = 0x40000000
_AS_ROOT = "run it as root"
_libc = ctypes.CDLL(None, use_errno=True)


class NamespaceError(OperatorError):
    """A network namespace that does not exist or may not be entered."""

    exit_code = EXIT_USAGE


@dataclass(frozen=True, slots=True)
class Namespace:
    """`name` is what people call it; "" for the one we are in."""

    name: str
    path: str


OWN = Namespace("", "/proc/self/ns/net")


def by_name(name: str) -> Namespace:
    """`name` as `ip netns` has it, a path, or a process as pid:123."""
    if name.startswith("pid:"):
        path = f"/proc/{name.removeprefix('pid:')}/ns/net"
    else:
        path = name if "/" in name else str(NAMED / name)
    try:
        os.stat(path)
    except PermissionError:
        raise NamespaceError(f"no permission to look at network namespace {name}", _AS_ROOT) from None
    except OSError:
        fix = "ip netns list; or give a path, or pid:NUMBER"
        raise NamespaceError(f"no network namespace {name}", fix) from None
    return Namespace(name, path)


def every() -> list[Namespace]:
    """All that can be found, each once: ours, the named, and those that only processes hold (as pid:123)."""
    found = {_inode(OWN.path): OWN}
    if NAMED.is_dir():
        for entry in sorted(NAMED.iterdir()):
            found.setdefault(_inode(str(entry)), Namespace(entry.name, str(entry)))
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        path = f"/proc/{pid}/ns/net"
        try:
            inode = _inode(path)
        except OSError:
            continue  # it ended, or it is somebody else's and we are not root
        found.setdefault(inode, Namespace(f"pid:{pid}", path))
    return list(found.values())


def _inode(path: str) -> int:
    return os.stat(path).st_ino


def open_diag(namespace: Namespace) -> sock_diag.SockDiag:
    """A sock_diag socket inside the namespace; this thread is back in its own when it returns.

    Raises:
        NamespaceError: it may not be entered (this takes CAP_SYS_ADMIN), or it is gone.
    """
    with inside(namespace):
        return sock_diag.SockDiag(sock_diag.open_socket())


@contextmanager
def inside(namespace: Namespace) -> Iterator[None]:
    """This thread is in the namespace while the block lasts. Raises NamespaceError as `open_diag` does."""
    if namespace == OWN:
        yield
        return
    own = os.open(OWN.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            _enter(namespace.path)
        except OSError as error:
            fix = _AS_ROOT if isinstance(error, PermissionError) else ""
            raise NamespaceError(f"network namespace {namespace.name}: {error.strerror}", fix) from None
        try:
            yield
        finally:
            _setns(own)
    finally:
        os.close(own)


def passive_opens(namespace: Namespace) -> int | None:
    """TCP connections that came in and were established there, ever; None when that cannot be read."""
    try:
        with inside(namespace):
            text = Path("/proc/thread-self/net/snmp").read_text()
        names, values = (line.split() for line in text.splitlines() if line.startswith("Tcp:"))
        return int(values[names.index("PassiveOpens")])
    except (OSError, NamespaceError, ValueError):
        return None


def _enter(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _setns(fd)
    finally:
        os.close(fd)


def _setns(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))
