"""A tidegate whose sessions are spliced, and what the kernel's records of them say."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from harness.backends import Backend
from harness.proc import Tidegate, tcp_config
from harness.waiting import wait_until

MIB = 1024 * 1024


@contextmanager
def spliced(backend: Backend, *, surely: bool = True, **listener: Any) -> Iterator[Tidegate]:
    """A tidegate that has spliced something when the block ends, or, not `surely`, could have."""
    options = {"splice": "on", "splice_after": "0", **listener}
    with Tidegate(tcp_config([backend.address], **options)) as gate:
        assert not surely or gate.status()["splice"] == {"by": "kernel", "reason": ""}
        yield gate
        wait_until(lambda: gate.listener()["sessions"] == 0, 10, "every session to end")
        if surely:
            assert gate.listener()["spliced"] > 0
            assert gate.listener()["bytes_spliced"] > 0
        assert gate.listener()["ended"]["internal_error"] == 0


def address(gate: Tidegate) -> tuple[str, int]:
    return "127.0.0.1", gate.port()


def spliced_maps() -> set[str]:
    """Ids of all maps of spliced sockets, of whoever."""
    return {str(one["id"]) for one in _bpftool("map", "list") if one.get("name", "").startswith("tg_splice")}


def flows(strangers: set[str]) -> list[dict[str, int]]:
    """The records that ever moved something, of every worker but those with these maps."""
    found = []
    for one in _bpftool("map", "list"):
        if one.get("name") == "tg_splice_flows" and str(one["id"]) not in strangers:
            dump = _bpftool("map", "dump", "id", str(one["id"]))
            values = (entry.get("formatted", entry)["value"] for entry in dump)
            found += [value for value in values if value["redirected"] or value["passed"]]
    return found


def _bpftool(*arguments: str) -> list[dict[str, Any]]:
    done = subprocess.run(["bpftool", "-j", *arguments], capture_output=True, text=True, check=True)
    answer: list[dict[str, Any]] = json.loads(done.stdout)
    return answer
