"""A bootable disk image of the base tree with this project's Python dependencies, made without a mount."""

from __future__ import annotations

import fcntl
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from devlib import base
from devlib.base import GUEST_CHECKOUT, KERNELS, Kernel, chroot
from devlib.common import ROOT, BuildError, cache_folder, carry_tree, digest, replace, run, say, scratch

_DISK_BYTES = 6 << 30
_MASKED = (
    # they take the console
    "serial-getty@ttyS0.service",
    "getty@tty1.service",
    # and these CPU in the middle of a test
    "systemd-timesyncd.service",
    "ssh.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "man-db.timer",
    "dpkg-db-backup.timer",
)

_GUEST_UNIT = """\
[Unit]
Description=tidegate's tests
After=basic.target
SuccessAction=poweroff-force
FailureAction=poweroff-force

[Service]
Type=oneshot
ExecStart=/usr/local/sbin/tidegate-guest
ExecStopPost=/bin/sync
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
Environment=HOME=/root LANG=C.UTF-8

[Install]
WantedBy=multi-user.target
"""

# The image knows no more than where its job comes from: a tar on the second disk.
_GUEST_SCRIPT = """\
#!/bin/bash
set -e
mkdir -p /%s
tar -xf /dev/vdb -C /%s
exec /%s/tools/devlib/guest.sh
""" % ((GUEST_CHECKOUT,) * 3)  # braces are the shell's


@dataclass(frozen=True, slots=True)
class Image:
    """A built image: `disk` is never written to (runs put a throw-away overlay on it)."""

    folder: Path

    @property
    def disk(self) -> Path:
        return self.folder / "disk.img"

    def vmlinuz(self, kernel: Kernel) -> Path:
        return self.folder / f"vmlinuz-{kernel.release}"

    def initrd(self, kernel: Kernel) -> Path:
        return self.folder / f"initrd-{kernel.release}"


def _configure(tree: Path) -> None:
    """Makes the tree a guest that runs its job and powers off."""
    (tree / "etc/fstab").write_text("/dev/vda / ext4 noatime 0 1\n")
    (tree / "etc/hostname").write_text("tidegate-guest\n")
    (tree / "etc/hosts").write_text("127.0.0.1 localhost tidegate-guest\n::1 localhost ip6-localhost\n")
    (tree / "etc/systemd/system/tidegate-guest.service").write_text(_GUEST_UNIT)
    script = tree / "usr/local/sbin/tidegate-guest"
    script.write_text(_GUEST_SCRIPT)
    script.chmod(0o755)
    for unit in _MASKED:
        link = tree / "etc/systemd/system" / unit
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")


def _build_image(bare: Path, into: Path) -> None:
    tree = into / "tree"
    run(["cp", "-a", "--reflink=auto", str(bare), str(tree)], "copying the tree")
    say("installing the Python dependencies into it")
    carry_tree(tree / GUEST_CHECKOUT)
    chroot(tree, "tools/dev setup", f"/{GUEST_CHECKOUT}/tools/dev", "setup")
    for path in (tree / GUEST_CHECKOUT).iterdir():
        if path.name != ".venv":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for folder in ("root/.cache", "tmp"):
        shutil.rmtree(tree / folder, ignore_errors=True)
    (tree / "tmp").mkdir(mode=0o1777)
    (tree / "tmp").chmod(0o1777)
    (tree / "usr/sbin/policy-rc.d").unlink(missing_ok=True)
    _configure(tree)
    chroot(tree, "enabling the guest's job", "systemctl", "enable", "tidegate-guest.service")
    image = Image(into)
    for kernel in KERNELS:
        # the meta package of the later suite replaced the earlier one's; the kernels stay side by side
        found = sorted((tree / "boot").glob(f"vmlinuz-{kernel.release}.*-cloud-amd64"))
        if not found:
            raise BuildError(
                f"{kernel.suite} has no {kernel.release} kernel: {sorted(os.listdir(tree / 'boot'))}"
            )
        shutil.copy(found[-1], image.vmlinuz(kernel))
        shutil.copy(tree / "boot" / found[-1].name.replace("vmlinuz", "initrd.img"), image.initrd(kernel))
    say("making the disk image")
    with image.disk.open("wb") as file:
        file.truncate(_DISK_BYTES)
    run(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=1", "-d", str(tree), str(image.disk)],
        "mke2fs",
    )
    shutil.rmtree(tree)


def ensure(*, rebuild: bool = False) -> Image:
    """The image for this checkout: from the cache when nothing it is made of has changed.

    Raises:
        BuildError: a step of the build did not work.
    """
    cache = cache_folder()
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        base_key, tree = base.ensure(rebuild=rebuild)
        sources = (Path(__file__).read_text(), (ROOT / "pyproject.toml").read_text())
        final = cache / f"image-{digest(base_key, *sources)}"
        if rebuild or not final.exists():
            with scratch(cache, "building") as folder:
                made = folder / "image"
                made.mkdir()
                _build_image(tree, made)
                replace(cache, "image-", made, final)
        return Image(final)
