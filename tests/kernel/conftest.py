"""A kernel half for a module's tests; the process is in its cgroup meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tidegate.kernel.half import KernelHalf


@pytest.fixture(scope="module")
def half() -> Iterator[KernelHalf]:
    half = KernelHalf.start(f"test-{os.getpid()}")
    try:
        yield half
    finally:
        assert half.close()
