"""How vm-test follows a guest: with a stand-in for QEMU that writes to the files QEMU would write to."""

from __future__ import annotations

import os
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[3] / "tools"
# finds the paths of its chardevs among its arguments, then does what the test says
STAND_IN = """\
#!/bin/bash
for argument in "$@"; do
    case $argument in
        file,id=out,path=*) out=${argument#*path=} ;;
        file,id=result,path=*) result=${argument#*path=} ;;
        file:*) console=${argument#file:} ;;
    esac
done
echo $$ >"${out%/*}/pid"
"""


@pytest.fixture
def devlib(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    from devlib import base, common, image, qemu

    return {"base": base, "common": common, "image": image, "qemu": qemu}


def _boot(devlib: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, **limits: float) -> Any:
    bin_dir, folder = tmp_path / "bin", tmp_path / "run"
    bin_dir.mkdir()
    folder.mkdir()
    program = bin_dir / "qemu-system-x86_64"
    program.write_text(STAND_IN + script + "\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(bin_dir), prepend=":")
    shown: list[str] = []
    outcome = devlib["qemu"].boot(
        devlib["image"].Image(tmp_path),
        devlib["base"].KERNELS[0],
        tmp_path / "job.tar",
        folder,
        shown.append,
        **{"limit_s": 30.0, "silence_s": 30.0, **limits},
    )
    assert not Path("/proc", (folder / "pid").read_text().strip()).exists()
    return outcome, shown


def test_what_the_guest_says_is_shown_line_by_line_and_its_result_read(
    devlib: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "printf 'one\\r\\ntw' >>$out; sleep 0.2; echo o >>$out; echo '{\"status\": 3}' >$result"
    outcome, shown = _boot(devlib, tmp_path, monkeypatch, script)
    assert shown == ["one", "two"]
    assert outcome.result == {"status": 3}
    assert 0 < outcome.booted_s <= outcome.total_s


@pytest.mark.parametrize("limits", [{"limit_s": 0.5}, {"silence_s": 0.5}])
def test_guest_that_hangs_is_ended_with_its_console_shown(
    devlib: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, float]
) -> None:
    script = "echo 'Kernel panic - not syncing' >$console; exec sleep 60"
    began = time.monotonic()
    outcome, shown = _boot(devlib, tmp_path, monkeypatch, script, **limits)
    assert outcome.result is None
    assert "was ended" in shown[0]
    assert shown[-1] == "console: Kernel panic - not syncing"
    assert time.monotonic() - began < 30


def test_guest_that_goes_away_says_what_qemu_said(
    devlib: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome, shown = _boot(devlib, tmp_path, monkeypatch, "echo 'cannot allocate memory' >&2; exit 1")
    assert outcome.result is None
    assert shown[0] == "the guest went away without a result (QEMU ended with status 1)"
    assert "qemu: cannot allocate memory" in shown


def test_machine_without_qemu_says_so(devlib: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert devlib["qemu"].available() == "qemu-system-x86_64 is not installed"


def test_guest_gets_the_working_tree_without_what_is_derived_from_it(devlib: Any, tmp_path: Path) -> None:
    file = tmp_path / "job.tar"
    devlib["common"].carry_tar(file, {".guest-job": "TESTS=(a)\n"})
    with tarfile.open(file) as tar:
        names = tar.getnames()
        job = tar.extractfile(".guest-job")
        assert job is not None
        assert job.read() == b"TESTS=(a)\n"
    assert {"tools/dev", "pyproject.toml", "bpf/records.h", "tests/conftest.py"} <= set(names)
    assert not [name for name in names if name.startswith((".venv/", ".git/")) or "__pycache__" in name]
    assert list(tmp_path.iterdir()) == [file]


def test_killed_run_is_swept_and_a_living_one_is_not(devlib: Any, tmp_path: Path) -> None:
    for name in ("building.abc", "run-999999999.abc", f"run-{os.getpid()}.abc", "image-0123"):
        (tmp_path / name).mkdir()
    devlib["common"].sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"run-{os.getpid()}.abc", "image-0123"}
