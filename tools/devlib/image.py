"""A bootable disk image of the base tree with this project's Python dependencies, made without a mount."""

from __future__ import annotations

import fcntl
import shutil
from dataclasses import dataclass
from pathlib import Path

from devlib import base, trees
from devlib.base import GUEST_CHECKOUT, KERNELS, Kernel, chroot
from devlib.common import cache_folder, digest, installation, replace, say, scratch, sweep

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


def _build_image(bare: Path, into: Path) -> None:
    tree = into / "tree"
    say("installing the Python dependencies into the tree")
    trees.with_environment(bare, tree, GUEST_CHECKOUT)
    trees.common_files(tree, "tidegate-guest")
    trees.mask(tree, _MASKED)
    (tree / "etc/systemd/system/tidegate-guest.service").write_text(_GUEST_UNIT)
    script = tree / "usr/local/sbin/tidegate-guest"
    script.write_text(_GUEST_SCRIPT)
    script.chmod(0o755)
    chroot(tree, "enabling the guest's job", "systemctl", "enable", "tidegate-guest.service")
    image = Image(into)
    for kernel in KERNELS:
        trees.boot_files(tree, kernel, image.vmlinuz(kernel), image.initrd(kernel))
    say("making the disk image")
    trees.make_disk(tree, image.disk)
    shutil.rmtree(tree)


def ensure(*, rebuild: bool = False) -> Image:
    """The image for this checkout: from the cache when nothing it is made of has changed.

    Raises:
        BuildError: a step of the build did not work.
    """
    cache = cache_folder()
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sweep(cache)
        base_key, tree = base.ensure(rebuild=rebuild)
        sources = (
            Path(__file__).read_text(),
            Path(trees.__file__).read_text(),
            installation(),
        )
        final = cache / f"image-{digest(base_key, *sources)}"
        if rebuild or not final.exists():
            with scratch(cache, "building") as folder:
                made = folder / "image"
                made.mkdir()
                _build_image(tree, made)
                replace(cache, "image-", made, final)
        return Image(final)
