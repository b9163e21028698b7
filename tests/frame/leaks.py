"""What a test session left behind: processes it started and cgroups of tidegate's."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

SESSION_VARIABLE = "TIDEGATE_TEST_SESSION"
"""Set in our environment, so every process started from here carries it unless its title overwrote it."""


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    parent: int
    started: int  # clock ticks since boot
    title: str

    def __str__(self) -> str:
        return f"process {self.pid}: {self.title or '(no title)'}"


def processes(proc: Path = Path("/proc")) -> list[Process]:
    """Everything alive, zombies left out."""
    found = []
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
            title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue
        fields = stat[stat.rindex(")") + 2 :].split()
        if fields[0] not in "ZX":
            found.append(Process(int(entry.name), int(fields[1]), int(fields[19]), title))
    return found


def _carries(pid: int, mark: bytes, proc: Path) -> bool:
    try:
        return mark in (proc / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return False


def of_another(instance: str, me: int, proc: Path = Path("/proc")) -> bool:
    """Whether an instance says by its name, `e2e-PID-NUMBER`, that another living process made it."""
    found = re.fullmatch(r"e2e-(\d+)-\d+", instance)
    return found is not None and int(found[1]) != me and (proc / found[1]).is_dir()


def _instance(pid: int, proc: Path) -> str:
    """Of tidegate, by the process's cgroup; "" for none."""
    try:
        found = re.search(r"/tidegate/([^/\n]+)", (proc / str(pid) / "cgroup").read_text())
    except OSError:
        return ""
    return found[1] if found else ""


def left_processes(session: str, since: int, me: int, proc: Path = Path("/proc")) -> list[Process]:
    """Processes of this session that still run: our descendants, those that carry its mark, and orphans
    called "tidegate: ..." born since (a title is written over the environment, mark and all), unless they are
    in the cgroup of a session beside this one.

    `since` and the start times are clock ticks since boot, `me` is the session's own pid.
    """
    alive = processes(proc)
    children: dict[int, list[Process]] = {}
    for process in alive:
        children.setdefault(process.parent, []).append(process)
    ours: dict[int, Process] = {}
    unseen = list(children.get(me, []))
    mark = f"{SESSION_VARIABLE}={session}".encode()
    for process in alive:
        orphan = (
            process.parent == 1
            and process.started >= since
            and process.title.startswith("tidegate: ")
            and not of_another(_instance(process.pid, proc), me, proc)
        )
        if process.pid != me and (orphan or _carries(process.pid, mark, proc)):
            unseen.append(process)
    while unseen:
        process = unseen.pop()
        if process.pid not in ours:
            ours[process.pid] = process
            unseen.extend(children.get(process.pid, []))
    return sorted(ours.values(), key=lambda process: process.pid)


def other_sessions(me: int, proc: Path = Path("/proc")) -> bool:
    """Whether another pytest runs on this machine: then new cgroups may be its own."""
    return any(process.pid != me and "pytest" in process.title for process in processes(proc))


def instance_cgroups(mount: Path | None) -> set[Path]:
    """The instances of tidegate that have a cgroup: `<mount>/tidegate/*`."""
    if mount is None or not (mount / "tidegate").is_dir():
        return set()
    return {path for path in (mount / "tidegate").iterdir() if path.is_dir()}


def settle(look: Callable[[], list[T]], seconds: float = 3.0) -> list[T]:
    """What is still there after at most `seconds`: ending takes a killed process a moment."""
    deadline = time.monotonic() + seconds
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def start_ticks(pid: int | None = None) -> int:
    """When a process (this one by default) started, in clock ticks since boot."""
    stat = Path(f"/proc/{pid or os.getpid()}/stat").read_text()
    return int(stat[stat.rindex(")") + 2 :].split()[19])
