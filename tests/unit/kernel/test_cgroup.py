"""Finding the cgroup2 mount, naming the instance's directory, sweeping: on plain directories."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from tidegate.kernel import cgroup
from tidegate.kernel.loader import KernelUnavailable

HYBRID = """\
tmpfs /sys/fs/cgroup tmpfs rw,relatime,mode=755 0 0
cgroup /sys/fs/cgroup/cpu cgroup rw,relatime,cpu 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0
"""


def test_mount_point_unified_and_hybrid() -> None:
    assert cgroup.mount_point(HYBRID) == Path("/sys/fs/cgroup/unified")
    assert cgroup.mount_point("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n") == Path("/sys/fs/cgroup")
    assert cgroup.mount_point("none /mnt/my\\040cgroups cgroup2 rw 0 0\n") == Path("/mnt/my cgroups")


def test_no_mount_says_how_to_make_one() -> None:
    with pytest.raises(KernelUnavailable, match="no cgroup2") as error:
        cgroup.mount_point("tmpfs / tmpfs rw 0 0\n")
    assert "mount -t cgroup2" in error.value.fix


def test_own_cgroup() -> None:
    assert cgroup.own_cgroup("9:name=systemd:/\n0::/user.slice/a\n") == "/user.slice/a"
    with pytest.raises(KernelUnavailable):
        cgroup.own_cgroup("9:name=systemd:/\n")


def test_base_is_the_delegated_cgroup_when_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = tmp_path / "system.slice" / "gate.service"
    service.mkdir(parents=True)
    monkeypatch.setattr(cgroup, "own_cgroup", lambda: "/system.slice/gate.service")
    monkeypatch.setattr(cgroup.os, "getxattr", lambda *_: b"0")
    assert cgroup.base_directory(tmp_path) == tmp_path / "tidegate"
    marks = {(str(service), "user.delegate"): b"1"}

    def getxattr(path: Path, name: str) -> bytes:
        try:
            return marks[str(path), name]
        except KeyError:
            raise OSError(61, "no such attribute") from None

    monkeypatch.setattr(cgroup.os, "getxattr", getxattr)
    assert cgroup.base_directory(tmp_path) == service / "tidegate"
    monkeypatch.setattr(cgroup, "own_cgroup", lambda: "/")
    assert cgroup.base_directory(tmp_path) == tmp_path / "tidegate"


def test_sweep_takes_empty_and_unlocked_ones_only(tmp_path: Path) -> None:
    base = tmp_path / "tidegate"
    for name in ("empty", "locked", "populated", "nested"):
        (base / name).mkdir(parents=True)
    (base / "populated" / "cgroup.procs").write_text("1\n")
    (base / "nested" / "inner").mkdir()
    fd = os.open(base / "locked", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert cgroup.sweep(base) == ["empty"]
    assert sorted(child.name for child in base.iterdir()) == ["locked", "nested", "populated"]
    os.close(fd)
    assert cgroup.sweep(base) == ["locked"]
    assert cgroup.sweep(tmp_path / "missing") == []


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "x" * 65, "a b"])
def test_unusable_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(KernelUnavailable, match="not usable"):
        cgroup.InstanceCgroup.create(name, tmp_path)


def test_two_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "own_cgroup", lambda: "/")
    monkeypatch.setattr(cgroup, "_DYING_S", 0.05)
    first = cgroup.InstanceCgroup.create("web", tmp_path)
    assert first.path == tmp_path / "tidegate" / "web"
    assert first.path.stat().st_mode & 0o777 == 0o700
    with pytest.raises(KernelUnavailable, match='"web" is running already'):
        cgroup.InstanceCgroup.create("web", tmp_path)
    other = cgroup.InstanceCgroup.create("other", tmp_path)
    assert first.path.exists(), "the sweep of a starting instance spares a live one"
    assert first.remove()
    assert not first.path.exists() and other.path.exists()
    again = cgroup.InstanceCgroup.create("web", tmp_path)
    assert again.remove() and other.remove()
    assert not (tmp_path / "tidegate").exists()
