"""The oldest kernels on which the kernel half is any good. docs/kernels.md says why, feature by feature."""

from __future__ import annotations

import os
import re

BPF_FLOOR = (6, 1)
"""The oldest kernel on which the BPF half is tested; all it uses is there since 5.14."""
SPLICE_FLOOR = (6, 6)
"""sockmap's sequence and ACK accounting was wrong in the releases before, and lost or repeated bytes."""


def version(release: str) -> tuple[int, int]:
    """(6, 1) of "6.1.0-56-amd64"; (0, 0) when it is no such thing."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def below_floor(release: str | None = None) -> str:
    """Why this kernel is too old for the BPF half; "" when it is not."""
    release = release or os.uname().release
    if version(release) >= BPF_FLOOR:
        return ""
    oldest = ".".join(map(str, BPF_FLOOR))
    return f"Linux {release} is older than {oldest}, the oldest that the BPF half is tested on"
