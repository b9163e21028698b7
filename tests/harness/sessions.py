"""Which process holds how many sessions of a port, by /proc alone: the same for every proxy."""

from __future__ import annotations

import os
from collections.abc import Sequence

_ESTABLISHED = "01"


def sessions_by_pid(pids: Sequence[int], port: int) -> dict[int, int]:
    """Established sockets with that local port, by the process that has them open."""
    inodes: set[str] = set()
    suffix = f":{port:04X}"
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table) as lines:
            next(lines)
            for line in lines:
                fields = line.split()
                if fields[3] == _ESTABLISHED and fields[1].endswith(suffix):
                    inodes.add(fields[9])
    counts = {}
    for pid in pids:
        count = 0
        directory = f"/proc/{pid}/fd"
        for name in os.listdir(directory):
            try:
                target = os.readlink(f"{directory}/{name}")
            except OSError:
                continue
            count += target.startswith("socket:[") and target[8:-1] in inodes
        counts[pid] = count
    return counts


def excess(counts: Sequence[int]) -> float:
    """By which part of the mean the largest count lies above it; 0 for none."""
    mean = sum(counts) / len(counts)
    return max(counts) / mean - 1 if mean else 0.0
