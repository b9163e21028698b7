"""Packets lost on loopback, in a network namespace of its own."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def losing(percent: int) -> Iterator[None]:
    """So many of a hundred TCP packets that arrive are dropped, at random, while the block runs."""
    rules = (
        "table inet loss {\n chain input {\n type filter hook input priority 0\n"
        f" meta l4proto tcp numgen random mod 100 < {percent} drop\n }}\n}}\n"
    )
    if percent:
        subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True)
    try:
        yield
    finally:
        if percent:
            subprocess.run(["nft", "delete", "table", "inet", "loss"], check=True)
