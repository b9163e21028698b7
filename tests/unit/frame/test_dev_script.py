"""tools/dev: what it refuses and says. `id`, `uname` and others are stood in for; nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def bin_dir(tmp_path: Path) -> Path:
    """Comes first in PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


def _stand_in(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)


def _dev(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(
        [ROOT / "tools/dev", *args],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


def test_help_names_every_verb_and_an_unknown_one_is_a_usage_error(bin_dir: Path) -> None:
    done = _dev(bin_dir)
    assert done.returncode == 0
    for verb in ("run", "test", "lint", "setup", "vm-test", "vagrant-test"):
        assert f"tools/dev {verb}" in done.stdout
    wrong = _dev(bin_dir, "tset")
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    assert "tools/dev test" in wrong.stderr


@pytest.mark.parametrize(
    "words", [["test", "tests/unit", "-k", "a"], ["vm-test", "--kernel", "6.12"], ["vagrant-test"]]
)
def test_what_needs_root_says_the_line_to_type_instead(bin_dir: Path, words: list[str]) -> None:
    _stand_in(bin_dir, "id", "echo 1000")
    done = _dev(bin_dir, *words)
    assert done.returncode == 1
    assert f"sudo tools/dev {' '.join(words)}\n" in done.stderr


def test_missing_packages_are_named_to_those_who_may_not_install_them(bin_dir: Path) -> None:
    _stand_in(bin_dir, "id", "echo 1000")
    _stand_in(bin_dir, "dpkg-query", "echo installed python3")
    done = _dev(bin_dir, "run")
    assert done.returncode == 1
    assert "python3-bpfcc" in done.stderr
    assert "sudo tools/dev run\n" in done.stderr


def test_machine_without_dpkg_is_told_so(bin_dir: Path, tmp_path: Path) -> None:
    for name in ("bash", "dirname", "stat", "uname", "id"):
        (bin_dir / name).symlink_to(shutil.which(name) or pytest.fail(name))
    done = subprocess.run(
        ["bash", ROOT / "tools/dev", "run"],
        env={"PATH": str(bin_dir)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "this is no Debian or Ubuntu" in done.stderr


def test_headers_of_another_kernel_are_linked_where_none_are_packaged(bin_dir: Path, tmp_path: Path) -> None:
    """Not the cloud or rt flavours, the newest by version and not by name, and -common as source."""
    log = tmp_path / "log"
    packages = subprocess.run([ROOT / "tools/dev", "packages"], capture_output=True, text=True, check=True)
    installed = [f"installed {name}" for name in (*packages.stdout.split(), "linux-headers-amd64")]
    _stand_in(bin_dir, "id", "echo 0")
    _stand_in(bin_dir, "uname", "echo 9.9.9-nobodys")
    _stand_in(bin_dir, "dpkg", "echo amd64")
    _stand_in(bin_dir, "dpkg-query", "\n".join(f"echo {line}" for line in installed))
    _stand_in(bin_dir, "apt-cache", "exit 100")
    _stand_in(bin_dir, "apt-get", f'echo apt-get "$@" >>{log}')
    _stand_in(bin_dir, "mkdir", f'echo mkdir "$@" >>{log}')
    _stand_in(bin_dir, "ln", f'echo ln "$@" >>{log}')
    sources = [f"/usr/src/linux-headers-6.1.0-{build}-amd64" for build in ("9", "56", "10")]
    _stand_in(bin_dir, "find", "\n".join(f"echo {source}" for source in sources))
    done = _dev(bin_dir, "setup-system")
    assert done.returncode == 0, done.stderr
    assert log.read_text().splitlines() == [
        "mkdir -p /lib/modules/9.9.9-nobodys",
        "ln -sfn /usr/src/linux-headers-6.1.0-56-amd64 /lib/modules/9.9.9-nobodys/build",
        # no such -common folder here: the headers themselves serve
        f"ln -sfn {_common()} /lib/modules/9.9.9-nobodys/source",
    ]


def _common() -> str:
    common = Path("/usr/src/linux-headers-6.1.0-56-common")
    return str(common) if common.is_dir() else "/usr/src/linux-headers-6.1.0-56-amd64"
