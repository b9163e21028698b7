"""vagrant/Vagrantfile, as Vagrant itself reads it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "vagrant"


def _vagrant(tmp_path: Path, *args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "VAGRANT_CWD": str(FOLDER),
        "VAGRANT_HOME": str(tmp_path / "home"),
        "VAGRANT_DOTFILE_PATH": str(tmp_path / "dot"),
        "VAGRANT_CHECKPOINT_DISABLE": "1",
        **variables,
    }
    return subprocess.run(["vagrant", *args], env=env, capture_output=True, text=True, timeout=110)


@pytest.mark.skipif(not shutil.which("vagrant"), reason="needs vagrant: apt-get install vagrant")
@pytest.mark.parametrize("boot", ["", "/nowhere"])
def test_vagrant_finds_nothing_wrong_with_it(tmp_path: Path, boot: str) -> None:
    variables = {"TIDEGATE_VAGRANT_BOX": "local", "TIDEGATE_VAGRANT_BOOT": boot} if boot else {}
    done = _vagrant(tmp_path, "validate", "--ignore-provider", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    for machine in ("debian12", "debian13", "ubuntu2404"):
        assert machine in done.stdout


@pytest.mark.skipif(not shutil.which("vagrant"), reason="needs vagrant: apt-get install vagrant")
def test_error_in_it_would_be_found(tmp_path: Path) -> None:
    copy = tmp_path / "vagrant"
    shutil.copytree(FOLDER, copy)
    text = (copy / "Vagrantfile").read_text()
    assert 'type: "rsync"' in text
    (copy / "Vagrantfile").write_text(text.replace("config.ssh.insert_key", "config.sssh.insert_key"))
    done = _vagrant(
        tmp_path, "validate", "--ignore-provider", VAGRANT_CWD=str(copy), TIDEGATE_VAGRANT_BOOT="/x"
    )
    assert done.returncode != 0
