"""The child cgroup in which our sockets are born: <base>/<instance>, one per running instance.

A socket belongs to the cgroup of the process that opened it, and that decides which programs run on
it. Base is `<cgroup2 mount>/tidegate`, or `<our cgroup>/tidegate` where systemd delegated ours.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import time
from pathlib import Path

from tidegate.kernel.loader import KernelUnavailable

_DIRECTORY = "tidegate"
_INSTANCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_DYING_S = 1.0  # what a killed predecessor's workers may take to end


def mount_point(mounts: str | None = None) -> Path:
    """Where cgroup2 is mounted, alone or beside version 1. `mounts`: text of /proc/self/mounts."""
    text = Path("/proc/self/mounts").read_text() if mounts is None else mounts
    for line in text.splitlines():
        fields = line.split()
        if len(fields) >= 3 and fields[2] == "cgroup2":
            return Path(fields[1].encode().decode("unicode_escape"))
    raise KernelUnavailable("no cgroup2 hierarchy is mounted", "mount -t cgroup2 none /sys/fs/cgroup/unified")


def own_cgroup(text: str | None = None) -> str:
    """Our path in the cgroup2 hierarchy, "/" first. `text`: of /proc/self/cgroup."""
    for line in (Path("/proc/self/cgroup").read_text() if text is None else text).splitlines():
        if line.startswith("0::"):
            return line[3:]
    raise KernelUnavailable("this process is in no cgroup2 hierarchy", "tidegate doctor")


def is_cgroup(directory: Path) -> bool:
    """Whether it is a directory of a cgroup2 hierarchy; those of version 1 lack the file."""
    return (directory / "cgroup.controllers").is_file()


def _delegated(directory: Path) -> bool:
    for name in ("trusted.delegate", "user.delegate"):
        with contextlib.suppress(OSError):
            if os.getxattr(directory, name) == b"1":
                return True
    return False


def base_directory(mount: Path | None = None) -> Path:
    """The directory that holds the instances."""
    root = mount or mount_point()
    own = root / own_cgroup().lstrip("/")
    return (own if own != root and _delegated(own) else root) / _DIRECTORY


def move(pid: int, directory: Path) -> None:
    """Moves a process into a cgroup (0: the caller)."""
    (directory / "cgroup.procs").write_text(f"{pid}\n")


def members(directory: Path) -> list[int]:
    """Pids in a cgroup; [] when it does not exist."""
    try:
        return [int(line) for line in (directory / "cgroup.procs").read_text().split()]
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):
            return []
        raise


def _lock(directory: Path) -> int | None:
    """An fd of the directory with an exclusive lock on it; None when somebody else holds it."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def sweep(base: Path) -> list[str]:
    """Removes what killed instances left: empty, unlocked children only. Their names."""
    swept = []
    try:
        children = [child for child in base.iterdir() if child.is_dir()]
    except FileNotFoundError:
        return []
    for child in children:
        # gone meanwhile, or populated: rmdir refuses what is in use
        with contextlib.suppress(OSError):
            fd = _lock(child)
            if fd is None:
                continue
            try:
                if not members(child):
                    child.rmdir()
                    swept.append(child.name)
            finally:
                os.close(fd)
    return swept


class InstanceCgroup:
    """An instance's cgroup, held by an exclusive lock on `fd` for as long as the instance lives."""

    def __init__(self, path: Path, origin: Path, fd: int) -> None:
        self.path = path
        self.origin = origin  # where the supervisor was before it joined
        self.fd = fd

    @classmethod
    def create(cls, instance: str, mount: Path | None = None) -> InstanceCgroup:
        """Makes or takes over <base>/<instance>, and sweeps the leftovers of others.

        KernelUnavailable when a live instance has that name, or without the rights to make it.
        """
        if not _INSTANCE.fullmatch(instance):
            raise KernelUnavailable(
                f"cgroup name {instance!r} is not usable", "use letters, digits and . _ @ - (at most 64)"
            )
        root = mount or mount_point()
        base = base_directory(root)
        path = base / instance
        origin = root / own_cgroup().lstrip("/")
        if origin == path or path in origin.parents:
            origin = base.parent
        try:
            sweep(base)
            fd = cls._take(path)
        except PermissionError as error:
            raise KernelUnavailable(f"may not create {path}", "run tidegate as root") from error
        except OSError as error:
            raise KernelUnavailable(f"cannot create {path}: {error.strerror}", "tidegate doctor") from error
        return cls(path, origin, fd)

    @staticmethod
    def _take(path: Path) -> int:
        deadline = time.monotonic() + _DYING_S
        while True:
            path.parent.mkdir(mode=0o755, exist_ok=True)
            path.mkdir(mode=0o700, exist_ok=True)
            fd = _lock(path)
            if fd is not None:
                try:
                    same = os.path.samestat(os.fstat(fd), os.stat(path))
                except FileNotFoundError:
                    same = False
                # not the same: somebody swept it between mkdir and lock
                if same and not members(path):
                    os.chmod(path, 0o700)
                    return fd
                os.close(fd)
            if time.monotonic() > deadline:
                pids = ", ".join(map(str, members(path))) or "unknown"
                raise KernelUnavailable(
                    f'an instance named "{path.name}" is running already (pids {pids})',
                    'give this one another name (cgroup = "..."), or stop that one',
                )
            time.sleep(0.02)

    def join(self, pid: int = 0) -> None:
        """Moves a process in: sockets it opens from now on are ours."""
        move(pid, self.path)

    def close_fd(self) -> None:
        """Lets go of the lock and the directory without removing anything."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def remove(self) -> bool:
        """Moves what is left back to where the supervisor came from and removes the directory.

        False when it could not be removed; the next start sweeps it.
        """
        for pid in members(self.path):
            with contextlib.suppress(OSError):  # it ended meanwhile
                move(pid, self.origin if self.origin.exists() else self.path.parent.parent)
        removed = False
        deadline = time.monotonic() + _DYING_S
        while not removed:
            try:
                self.path.rmdir()
                removed = True
            except FileNotFoundError:
                removed = True
            except OSError:
                # an exiting process counts until it is reaped
                if time.monotonic() > deadline:
                    break
                time.sleep(0.005)
        self.close_fd()
        with contextlib.suppress(OSError):  # other instances live there
            self.path.parent.rmdir()
        return removed
