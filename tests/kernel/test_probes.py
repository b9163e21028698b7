"""The kernel's features by tidegate's probes and its doctor; a probe of what is broken must say so."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from tidegate.kernel import bpf, loader, probes
from tidegate.kernel.bpf import AttachType
from tidegate.kernel.half import KernelHalf
from tidegate.kernel.records import MAX_SLOTS, SlotState
from tidegate.supervisor import abilities

pytestmark = pytest.mark.bpf
TIDEGATE = Path(__file__).resolve().parents[2] / ".venv/bin/tidegate"


def test_kernel_has_what_kernels_of_its_age_must_have() -> None:
    lacking = {
        result.feature: result.reason
        for result in abilities.run_alone()
        if not result.works and probes.required(result.feature, platform.release())
    }
    assert lacking == {}


def test_probes_give_back_what_they_used() -> None:
    home = Path("/proc/self/cgroup").read_text()
    files = len(os.listdir("/proc/self/fd"))
    half = KernelHalf.start(f"test-probes-{os.getpid()}")
    try:
        programs = {
            attach: bpf.cgroup_prog_ids(half.cgroup.fd, attach)
            for attach in (AttachType.CGROUP_SOCK_OPS, AttachType.CGROUP_GETSOCKOPT)
        }
        first = probes.run(half)
        assert probes.run(half) == first
        tried = [feature for feature in probes.Feature if feature is not probes.Feature.SPLICE]
        assert [result.feature for result in first] == tried
        assert all(half.slots.state(slot) == SlotState.FREE for slot in range(MAX_SLOTS))
        for attach, before in programs.items():
            assert bpf.cgroup_prog_ids(half.cgroup.fd, attach) == before
    finally:
        half.close()
    assert Path("/proc/self/cgroup").read_text() == home
    assert not half.cgroup.path.exists()
    assert len(os.listdir("/proc/self/fd")) <= files + 2  # the mapped maps go with the object


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of bpf/ that the loader compiles instead."""
    copy = tmp_path / "bpf"
    shutil.copytree(loader.source_dir(), copy)
    monkeypatch.setattr(loader, "source_dir", lambda: copy)
    return copy


def _replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_steering_that_decides_nothing_is_seen(broken: Path) -> None:
    _replace(broken / "steer.c", "return steer(ctx);", "return SK_PASS;")
    found = {result.feature: result for result in abilities.run_here()}
    assert found["queue_age"].works
    assert not found["steer"].works
    assert "connections went where the program said" in found["steer"].reason


@pytest.mark.feature("splice")
def test_splicing_that_moves_bytes_twice_is_seen(broken: Path) -> None:
    _replace(broken / "splice.c", "if (again) {", "if (0) {")
    found = {result.feature: result for result in abilities.run_here()}
    assert found["steer"].works
    assert not found["splice"].works
    assert "lost or doubled" in found["splice"].reason


def test_a_trace_that_times_no_accept_is_seen(broken: Path) -> None:
    _replace(broken / "trace_accept.c", "accepts->buckets[bucket]++;", "")
    found = {result.feature: result for result in abilities.run_here()}
    assert found["steer"].works
    assert not found["accept_trace"].works
    assert "were timed" in found["accept_trace"].reason


def test_program_that_the_verifier_refuses_takes_the_whole_half_with_it(broken: Path) -> None:
    _replace(broken / "getsockopt.c", "return 1;", "return *(volatile int *)0;")
    results = abilities.run_here()
    assert not any(result.works for result in results)
    assert "getsockopt.c" in results[0].reason


def test_doctor_tells_the_same_as_json() -> None:
    done = subprocess.run([TIDEGATE, "doctor", "--json"], capture_output=True, text=True, timeout=300)
    report = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout
    assert report["ok"]
    assert report["kernel"] == platform.release()
    tried = [(result.feature, result.works) for result in abilities.run_alone()]
    assert [(each["feature"], each["works"]) for each in report["features"]] == tried
