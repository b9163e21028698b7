"""The closed-loop C client, from Python."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness import native


@dataclass(frozen=True, slots=True)
class Load:
    """What a run of load_client counted after its warm-up. Times in ns."""

    count: int
    errors: int
    seconds: float
    rate: float
    p50_ns: int
    p90_ns: int
    p99_ns: int
    max_ns: int


def drive(
    host: str, port: int, mode: str, *, connections: int, seconds: float, size: int, cpus: Sequence[int] = ()
) -> Load:
    """Runs `mode` (connect, echo, pull or push) and returns its figures; see src/load_client.c."""
    prefix = ["taskset", "-c", ",".join(map(str, cpus))] if cpus else []
    done = subprocess.run(
        [
            *prefix,
            str(native.build("load_client")),
            host,
            str(port),
            mode,
            str(connections),
            str(seconds),
            str(size),
        ],
        capture_output=True,
        text=True,
        timeout=seconds + 60,
        check=True,
    )
    figures: dict[str, Any] = json.loads(done.stdout)
    return Load(**figures)
