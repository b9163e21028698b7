"""Which process holds a socket."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import psutil


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that holds a listening socket: of several, the one the others descend from."""

    pid: int
    name: str
    pids: tuple[int, ...]  # all that hold it

    def __str__(self) -> str:
        return f"{self.name}/{self.pid}"


@dataclass(slots=True)
class Owners:
    """By socket inode. `hidden` tells that some processes could not be looked into.

    That is so for all but root, and for root in a container without CAP_SYS_PTRACE.
    """

    by_inode: dict[int, Owner] = field(default_factory=dict)
    hidden: bool = False
    by_root: bool = False  # it was root who looked


def find(inodes: Collection[int]) -> Owners:
    """Looks through the open files of every process we may see."""
    holders: dict[int, list[int]] = {}
    found = Owners(by_root=os.geteuid() == 0)
    targets = {f"socket:[{inode}]": inode for inode in inodes}
    for pid in psutil.pids():
        try:
            for inode in _held(pid, targets):
                holders.setdefault(inode, []).append(pid)
        except PermissionError:
            found.hidden = True
        except OSError:
            continue  # it ended
    known: dict[tuple[int, ...], Owner] = {}
    for inode, pids in holders.items():
        key = tuple(pids)
        if key not in known:
            known[key] = _owner(key)
        found.by_inode[inode] = known[key]
    return found


def _held(pid: int, targets: dict[str, int]) -> Iterable[int]:
    directory = f"/proc/{pid}/fd"
    seen = set()
    for fd in os.listdir(directory):
        try:
            inode = targets.get(os.readlink(f"{directory}/{fd}"))
        except FileNotFoundError:
            continue
        if inode is not None:
            seen.add(inode)
    return seen


def _owner(pids: tuple[int, ...]) -> Owner:
    parents = {pid: _parent(pid) for pid in pids}
    roots = [pid for pid in pids if parents[pid] not in parents]
    first = min(roots or pids)
    return Owner(first, _name(first), pids)


def _parent(pid: int) -> int:
    try:
        return psutil.Process(pid).ppid()
    except psutil.Error:
        return 0


def _name(pid: int) -> str:
    """What it is: the script for an interpreter, the first word of a title it gave itself, or its name."""
    try:
        process = psutil.Process(pid)
        name, command = process.name(), process.cmdline()
    except psutil.Error:
        return "?"
    if command and len(command) > 1 and name.startswith(("python", "ruby", "node", "perl", "php")):
        return _script(command[1:]) or name
    return name.split(":")[0].split(" ")[0] or "?"


def _script(arguments: list[str]) -> str:
    for index, argument in enumerate(arguments):
        if argument == "-m" and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument in ("-c", "-e"):
            return ""
        if not argument.startswith("-"):
            return os.path.basename(argument)
    return ""
