"""A Vagrant box for libvirt, made of the base tree: for hosts that no box registry or KVM serves."""

from __future__ import annotations

import fcntl
import json
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

from devlib import base, trees
from devlib.base import KERNELS, chroot
from devlib.common import BuildError, cache_folder, digest, installation, replace, run, say, scratch, sweep

CHECKOUT = "tidegate"
"""Where the Vagrantfile's synced folder puts the checkout, without the slash."""

_NETWORK = """\
[Match]
Name=en* eth*

[Network]
DHCP=yes
"""
_MASKED = (
    *("serial-getty@ttyS0.service", "getty@tty1.service", "systemd-timesyncd.service"),
    *("systemd-networkd-wait-online.service", "apt-daily.timer", "apt-daily-upgrade.timer"),
    *("e2scrub_all.timer", "e2scrub_reap.service", "man-db.timer", "dpkg-db-backup.timer"),
)


@dataclass(frozen=True, slots=True)
class Box:
    """`file` is what `vagrant box add` takes; vmlinuz and initrd lie beside it."""

    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "tidegate.box"


def _insecure_key() -> str:
    """The public key that Vagrant expects in every box, from the installed Vagrant."""
    for place in ("usr/share/**/vagrant*/keys/vagrant.pub", "opt/vagrant/**/keys/vagrant.pub"):
        for found in Path("/").glob(place):
            return found.read_text()
    raise BuildError("this Vagrant comes without keys/vagrant.pub")


def _configure(tree: Path, key: str) -> None:
    trees.common_files(tree, "tidegate")
    trees.mask(tree, _MASKED)
    chroot(tree, "the user vagrant", "useradd", "--create-home", "--shell", "/bin/bash", "vagrant")
    ssh = tree / "home/vagrant/.ssh"
    ssh.mkdir(mode=0o700)
    (ssh / "authorized_keys").write_text(key)
    chroot(tree, "the user's key", "chown", "-R", "vagrant:vagrant", "/home/vagrant", f"/{CHECKOUT}")
    (tree / "etc/sudoers.d/vagrant").write_text("vagrant ALL=(ALL) NOPASSWD: ALL\n")
    (tree / "etc/sudoers.d/vagrant").chmod(0o440)
    (tree / "etc/systemd/network/10-dhcp.network").write_text(_NETWORK)
    (tree / "etc/ssh/sshd_config.d").mkdir(exist_ok=True)
    (tree / "etc/ssh/sshd_config.d/vagrant.conf").write_text("UseDNS no\n")
    chroot(tree, "the box's services", "systemctl", "enable", "ssh.service", "systemd-networkd.service")


def _build(bare: Path, into: Path) -> None:
    tree, disk = into / "tree", into / "disk.img"
    key = _insecure_key()
    say("making a Vagrant box")
    trees.with_environment(bare, tree, CHECKOUT)
    _configure(tree, key)
    trees.boot_files(tree, KERNELS[0], into / "vmlinuz", into / "initrd")
    trees.make_disk(tree, disk)
    shutil.rmtree(tree)
    run(["qemu-img", "convert", "-O", "qcow2", str(disk), str(into / "box.img")], "qemu-img convert")
    size = disk.stat().st_size >> 30
    disk.unlink()
    (into / "metadata.json").write_text(
        json.dumps({"provider": "libvirt", "format": "qcow2", "virtual_size": size})
    )
    (into / "Vagrantfile").write_text('Vagrant.configure("2") { |config| }\n')
    with tarfile.open(Box(into).file, "w") as tar:
        for name in ("metadata.json", "Vagrantfile", "box.img"):
            tar.add(into / name, name)
            (into / name).unlink()


def ensure() -> Box:
    """The box for this checkout, from the cache when nothing it is made of has changed.

    Raises:
        BuildError: a step of the build did not work.
    """
    cache = cache_folder()
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sweep(cache)
        base_key, tree = base.ensure()
        sources = (Path(__file__).read_text(), Path(trees.__file__).read_text(), installation())
        final = cache / f"box-{digest(base_key, *sources)}"
        if not final.exists():
            with scratch(cache, "building") as folder:
                made = folder / "box"
                made.mkdir()
                _build(tree, made)
                replace(cache, "box-", made, final)
        return Box(final)
