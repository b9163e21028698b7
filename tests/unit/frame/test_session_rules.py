"""The suite's own rules, seen from outside: each case is a pytest session of its own with our conftest."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from frame import leaks
from frame.skips import ELSEWHERE, HOST, KERNEL, Skips

TESTS = Path(__file__).resolve().parents[2]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs `source` as a test file under a copy of our conftest. `features` replaces what the host offers."""
    shutil.copy(TESTS / "conftest.py", tmp_path)
    shutil.copytree(TESTS / "frame", tmp_path / "frame", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\naddopts = -p no:cacheprovider --import-mode=importlib --strict-markers\npythonpath = .\n"
        "markers =\n  root: r\n  bpf: b\n  soak: s\n"
    )

    def go(source: str, *args: str, features: str = "", ci: bool = False) -> subprocess.CompletedProcess[str]:
        (tmp_path / "test_it.py").write_text("import os, subprocess, sys, pytest\n" + source)
        with (tmp_path / "frame" / "features.py").open("a") as file:
            file.write(features)
        env = {name: value for name, value in os.environ.items() if name != "CI"}
        if ci:
            env["CI"] = "true"
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *args],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return go


LOADS = "\ndef missing_for_bpf(): return None\n"
LOADS_NOT = "\ndef missing_for_bpf(): return 'bpf(2): PROG_LOAD: Operation not permitted'\n"
PROBES = "\ndef kernel_features(): return {'steer': '', 'migrate': 'since 5.14'}\n"


def test_bpf_test_is_skipped_with_the_missing_feature_named(run: Run) -> None:
    done = run("@pytest.mark.bpf\ndef test_a(): assert False\n", features=LOADS_NOT)
    assert done.returncode == 0, done.stdout
    assert "1 skipped: needs bpf(2): PROG_LOAD: Operation not permitted" in done.stdout


def test_bpf_test_runs_where_programs_load(run: Run) -> None:
    done = run("@pytest.mark.bpf\ndef test_a(): assert False\n", features=LOADS)
    assert done.returncode == 1
    assert "1 failed" in done.stdout


def test_skipped_bpf_test_fails_a_session_that_can_load_bpf(run: Run) -> None:
    done = run("@pytest.mark.bpf\ndef test_a(): pytest.skip('no time')\n", features=LOADS)
    assert done.returncode == 1
    assert "1 bpf tests were skipped although this machine loads BPF programs" in done.stdout


def test_other_skips_fail_the_session_in_ci_only(run: Run) -> None:
    source = "def test_a(): pytest.skip('needs wrk')\n"
    assert run(source).returncode == 0
    done = run(source, ci=True)
    assert done.returncode == 1
    assert "1 tests were skipped, and CI=true allows none" in done.stdout


def test_kernel_feature_is_asked_of_the_probes_and_its_lack_is_no_fault(run: Run) -> None:
    source = (
        "@pytest.mark.bpf\n@pytest.mark.feature('migrate')\ndef test_a(): assert False\n"
        "@pytest.mark.bpf\n@pytest.mark.feature('steer')\ndef test_b(): pass\n"
    )
    done = run(source, features=LOADS + PROBES, ci=True)
    assert done.returncode == 0, done.stdout
    assert "1 skipped: kernel lacks migrate: since 5.14" in done.stdout
    assert "1 passed, 1 skipped" in done.stdout


def test_unknown_kernel_feature_is_an_error(run: Run) -> None:
    done = run("@pytest.mark.feature('stear')\ndef test_a(): pass\n", features=PROBES)
    assert done.returncode == 1
    assert "no feature 'stear'" in done.stdout


def test_soak_runs_only_when_named(run: Run) -> None:
    source = "@pytest.mark.soak\ndef test_long(): pass\ndef test_short(): pass\n"
    assert "1 passed, 1 deselected" in run(source).stdout
    assert "1 passed, 1 deselected" in run(source, "-m", "soak").stdout
    assert "1 passed in" in run(source, "test_it.py::test_long").stdout


def test_process_left_behind_fails_the_session(run: Run) -> None:
    source = (
        "def test_a():\n"
        "    # a grandchild in a session of its own: nobody's child once its parent has gone\n"
        "    code = \"import subprocess; subprocess.Popen(['sleep', '33'], start_new_session=True)\"\n"
        "    subprocess.run([sys.executable, '-c', code], check=True)\n"
    )
    done = run(source)
    try:
        assert done.returncode == 1
        assert "left behind: process" in done.stdout
        assert "sleep 33" in done.stdout
    finally:
        for line in done.stdout.splitlines():
            if line.startswith("left behind: process"):
                os.kill(int(line.split()[3].rstrip(":")), 9)


def test_clean_session_passes(run: Run) -> None:
    done = run("def test_a(): subprocess.run(['true'], check=True)\n", ci=True)
    assert done.returncode == 0, done.stdout


def test_ci_counts_every_reason_but_what_no_machine_could_mend() -> None:
    skips = Skips()
    skips.add(f"Skipped: {KERNEL}wake: since 7.0", bpf=True)
    skips.add(f"Skipped: {ELSEWHERE}a corpus", bpf=False)
    assert skips.faults(can_load_bpf=True, ci=True) == []
    skips.add(f"{HOST}root", bpf=True)
    skips.add(f"{HOST}root", bpf=False)
    assert len(skips.faults(can_load_bpf=True, ci=True)) == 2
    assert skips.faults(can_load_bpf=False, ci=False) == []
    assert skips.lines()[0].endswith("2 skipped: needs root")


def test_what_another_living_process_made_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "41").mkdir()
    assert leaks.of_another("e2e-41-1", me=40, proc=tmp_path)
    assert not leaks.of_another("e2e-41-1", me=41, proc=tmp_path)
    assert not leaks.of_another("e2e-42-1", me=40, proc=tmp_path)  # it died and left this
    assert not leaks.of_another("site", me=40, proc=tmp_path)


@pytest.mark.parametrize(("maker", "ours"), [(40, True), (41, False), (42, True)])
def test_an_orphan_belongs_to_who_made_its_instance(tmp_path: Path, maker: int, ours: bool) -> None:
    (tmp_path / "41").mkdir()
    orphan = tmp_path / "77"
    orphan.mkdir()
    stat = " ".join(["77", "(tidegate)", "S", "1", *["0"] * 17, "5000", *["0"] * 10])
    (orphan / "stat").write_text(stat)
    (orphan / "cmdline").write_bytes(b"tidegate: metrics")
    (orphan / "cgroup").write_text(f"1:name=systemd:/\n0::/tidegate/e2e-{maker}-3\n")
    left = leaks.left_processes("no-such-session", 4000, me=40, proc=tmp_path)
    assert [process.pid for process in left] == ([77] if ours else [])
