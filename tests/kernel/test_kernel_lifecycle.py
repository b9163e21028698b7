"""What is left of an instance after each way of ending, and what stands in its way of starting."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from harness.kernel_objects import KernelObjects, held_by
from harness.waiting import wait_until

from tidegate.kernel import cgroup
from tidegate.kernel.half import KernelHalf
from tidegate.kernel.loader import KernelUnavailable

pytestmark = pytest.mark.bpf

_CHILD = """
import sys
from harness.kernel_sockets import listen
from tidegate.config.model import Steer, WhenFull
from tidegate.kernel.half import KernelHalf
half = KernelHalf.start(sys.argv[1])
listener = listen(reuseport=True)
slot = half.allocate_slot()
half.mark_listener(listener, slot, 128)
half.steer_listener(0, [(listener, slot)], policy=Steer.P2C, when_full=WhenFull.QUEUE, hang_after_ns=0)
print("ready", flush=True)
order = sys.stdin.readline().strip()
if order == "close":
    assert half.close()
elif order == "raise":
    raise RuntimeError("told to")
"""


class Child:
    """A process with a kernel half."""

    def __init__(self, name: str) -> None:
        self.name = name
        tests = Path(__file__).resolve().parent.parent
        paths = [str(tests), *(path for path in sys.path if path)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_CHILD), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "ready\n":
            _, errors = self.process.communicate(timeout=10)
            raise KernelUnavailable(errors)

    @property
    def directory(self) -> Path:
        return cgroup.base_directory() / self.name

    def objects(self) -> KernelObjects:
        found = held_by([self.process.pid])
        assert len(found.ids["prog"]) == 3 and len(found.ids["link"]) == 2 and len(found.ids["map"]) == 7
        return found

    def end(self, order: str) -> str:
        """Its standard error."""
        if order == "kill":
            self.process.send_signal(signal.SIGKILL)
        return self.process.communicate("" if order == "kill" else f"{order}\n", timeout=20)[1]


def _name(suffix: str) -> str:
    return f"test-{os.getpid()}-{suffix}"


def test_nothing_is_left_after_close() -> None:
    child = Child(_name("close"))
    objects = child.objects()
    assert child.directory.stat().st_mode & 0o777 == 0o700
    assert cgroup.members(child.directory) == [child.process.pid]
    child.end("close")
    assert child.process.returncode == 0
    assert not child.directory.exists()
    wait_until(lambda: not objects.remaining(), 5, "the kernel to free programs and maps")


@pytest.mark.parametrize("order", ["raise", "kill"])
def test_only_an_empty_cgroup_is_left_after_a_sudden_end(order: str) -> None:
    child = Child(_name(order))
    objects = child.objects()
    errors = child.end(order)
    assert child.process.returncode == (1 if order == "raise" else -signal.SIGKILL), errors
    wait_until(lambda: not objects.remaining(), 5, "the kernel to free programs and maps")
    assert child.directory.exists() and cgroup.members(child.directory) == []
    # the next start, of whatever name, sweeps it
    other = Child(_name("next"))
    assert not child.directory.exists()
    other.end("close")
    assert not other.directory.exists()


def test_a_name_in_use_is_refused_and_its_owner_not_disturbed() -> None:
    owner = Child(_name("owner"))
    try:
        with pytest.raises(KernelUnavailable, match=f'"{owner.name}" is running.*{owner.process.pid}'):
            KernelHalf.start(owner.name)
        with pytest.raises(KernelUnavailable, match="is running"):
            Child(owner.name)
        neighbour = Child(_name("neighbour"))
        neighbour.end("close")
        assert cgroup.members(owner.directory) == [owner.process.pid]
        assert owner.objects()
    finally:
        owner.end("close")
    assert not owner.directory.exists()


def test_a_name_is_free_again_after_kill() -> None:
    first = Child(_name("again"))
    first.end("kill")
    second = Child(_name("again"))
    second.end("close")
    assert not second.directory.exists()


def test_a_failed_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cgroup.own_cgroup()

    def refuse(*_: object) -> None:
        raise KernelUnavailable("no")

    monkeypatch.setattr(KernelHalf, "_attach", refuse)
    with pytest.raises(KernelUnavailable):
        KernelHalf.start(_name("failed"))
    assert not (cgroup.base_directory() / _name("failed")).exists()
    assert cgroup.own_cgroup() == before
    assert held_by([os.getpid()]).ids["link"] == set()


def test_start_and_close_leave_the_process_as_it_was() -> None:
    before = cgroup.own_cgroup()
    half = KernelHalf.start(_name("roundtrip"))
    assert cgroup.own_cgroup() != before
    held = held_by([os.getpid()])
    assert held.ids["link"]
    assert half.close()
    assert cgroup.own_cgroup() == before
    del half
    wait_until(lambda: not held.remaining(), 5, "the kernel to free programs and maps")
