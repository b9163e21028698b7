"""From the base tree to what boots: this project's environment in it, a disk made of it, its kernel."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from devlib.base import Kernel, chroot
from devlib.common import BuildError, carry_tree, run

_DISK_BYTES = 6 << 30


def with_environment(bare: Path, tree: Path, checkout: str) -> None:
    """Copies the base tree and makes the .venv that a checkout at /`checkout` will find there."""
    run(["cp", "-a", "--reflink=auto", str(bare), str(tree)], "copying the tree")
    carry_tree(tree / checkout)
    chroot(tree, "tools/dev setup", f"/{checkout}/tools/dev", "setup")
    for path in (tree / checkout).iterdir():
        if path.name != ".venv":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for folder in ("root/.cache", "tmp"):
        shutil.rmtree(tree / folder, ignore_errors=True)
    (tree / "tmp").mkdir()
    (tree / "tmp").chmod(0o1777)
    # what kept services from starting while the tree was built
    (tree / "usr/sbin/policy-rc.d").unlink(missing_ok=True)


def common_files(tree: Path, name: str) -> None:
    """What every machine has: its name, its one disk."""
    (tree / "etc/fstab").write_text("/dev/vda / ext4 noatime 0 1\n")
    (tree / "etc/hostname").write_text(f"{name}\n")
    (tree / "etc/hosts").write_text(f"127.0.0.1 localhost {name}\n::1 localhost ip6-localhost\n")


def mask(tree: Path, units: tuple[str, ...]) -> None:
    """Keeps systemd units from ever starting."""
    for unit in units:
        link = tree / "etc/systemd/system" / unit
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")


def boot_files(tree: Path, kernel: Kernel, vmlinuz: Path, initrd: Path) -> None:
    """Copies a kernel and its initrd out of the tree: guests boot without a boot loader.

    Raises:
        BuildError: the tree has no such kernel.
    """
    boot = tree / "boot"
    found = sorted(boot.glob(f"vmlinuz-{kernel.release}.*-cloud-amd64"))
    if not found:
        raise BuildError(f"{kernel.suite} has no {kernel.release} kernel: {sorted(os.listdir(boot))}")
    shutil.copy(found[-1], vmlinuz)
    shutil.copy(boot / found[-1].name.replace("vmlinuz", "initrd.img"), initrd)


def make_disk(tree: Path, disk: Path) -> None:
    """An ext4 file with the tree in it, made without mounting anything."""
    with disk.open("wb") as file:
        file.truncate(_DISK_BYTES)
    run(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=1", "-d", str(tree), str(disk)], "mke2fs"
    )
