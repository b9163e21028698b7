"""The base layer of every image: a Debian tree with stock kernels and the packages that tools/dev installs.

Minutes to build, so it is kept and built anew only when this file, that list or the mirror changes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from devlib.common import ROOT, BuildError, cache_folder, carry_tree, digest, replace, run, say, scratch

SUITE = "bookworm"
GUEST_CHECKOUT = "root/tidegate"


@dataclass(frozen=True, slots=True)
class Kernel:
    """A stock kernel: `release` is what tests name it by, `suite` where its packages come from."""

    release: str
    suite: str


KERNELS = (Kernel("6.1", SUITE), Kernel("6.12", f"{SUITE}-backports"))

# what a guest needs to boot by itself and a Vagrant box to be talked to; all else is tools/dev's own list
_BASE_PACKAGES = (
    *("systemd-sysv", "udev", "dbus", "initramfs-tools", "zstd", "ca-certificates"),
    *("openssh-server", "sudo", "rsync"),
)


# what it mounts is gone and what it started is dead when it ends, or we do
_ISOLATED = ("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child")


def debian_mirrors() -> tuple[str, str | None]:
    """The machine's own apt mirror of Debian and, if it has one, of Debian's security updates.

    Raises:
        BuildError: apt is not configured for Debian, and TIDEGATE_DEBIAN_MIRROR names no mirror.
    """
    named = os.environ.get("TIDEGATE_DEBIAN_MIRROR")
    targets = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(LABEL)|$(COMPONENT)|$(REPO_URI)", "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.splitlines()
    found: dict[str, str] = {}
    for line in targets:
        label, component, address = line.split("|")
        if component == "main":
            found.setdefault(label, address)
    mirror = named or found.get("Debian")
    if mirror is None:
        raise BuildError(
            "apt has no Debian mirror on this machine\n  fix: run apt-get update, or name one in "
            "TIDEGATE_DEBIAN_MIRROR"
        )
    return mirror, None if named else found.get("Debian-Security")


def _apt_proxy() -> list[str]:
    """The machine's apt proxy settings, as options for the apt inside the tree."""
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=False).stdout
    options = []
    for line in dump.splitlines():
        name, _, value = line.partition(" ")
        if "::proxy" in name.lower() and name.lower().startswith("acquire::http"):
            options += ["-o", f"{name}={value.strip().strip(';').strip(chr(34))}"]
    return options


def _packages() -> str:
    """What tools/dev installs, as it says itself."""
    listed = subprocess.run([str(ROOT / "tools/dev"), "packages"], capture_output=True, text=True, check=True)
    return listed.stdout


def chroot(tree: Path, what: str, *argv: str) -> None:
    """Runs a command inside the tree, in a mount namespace of its own: /proc is gone when it ends, whatever
    happened. The services that packages would start do not: the tree has a policy-rc.d.
    """
    script = 'mount -t proc proc "$0/proc" && mount --rbind /dev "$0/dev" && exec chroot "$0" "$@"'
    environment = [
        "env",
        "-u",
        "PYTHONPATH",
        "DEBIAN_FRONTEND=noninteractive",
        "LC_ALL=C.UTF-8",
        "HOME=/root",
    ]
    run(
        [
            *_ISOLATED,
            "sh",
            "-c",
            script,
            str(tree),
            *environment,
            *argv,
        ],
        what,
    )


def _build_base(tree: Path, mirror: str, security: str | None) -> None:
    say(f"building a Debian {SUITE} tree (minutes, once; kept in {cache_folder()})")
    debootstrap = [
        "debootstrap",
        "--variant=minbase",
        f"--include={','.join(_BASE_PACKAGES)}",
        SUITE,
        str(tree),
    ]
    run([*_ISOLATED, *debootstrap, mirror], "debootstrap")
    sources = [f"deb {mirror} {suite} main" for suite in (SUITE, f"{SUITE}-updates", f"{SUITE}-backports")]
    if security:
        sources.append(f"deb {security} {SUITE}-security main")
    (tree / "etc/apt/sources.list").write_text("\n".join(sources) + "\n")
    policy = tree / "usr/sbin/policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    # what the machine trusts and how it resolves names, for as long as the tree is built on it
    shutil.copy("/etc/resolv.conf", tree / "etc/resolv.conf")
    for certificate in Path("/usr/local/share/ca-certificates").glob("*.crt"):
        shutil.copy(certificate, tree / "usr/local/share/ca-certificates")
    chroot(tree, "update-ca-certificates", "update-ca-certificates")
    apt = ["apt-get", "-q", "-y", *_apt_proxy()]
    chroot(tree, "apt-get update", *apt, "update")
    for kernel in KERNELS:
        say(f"installing the stock kernel {kernel.release} from {kernel.suite}")
        # backports are taken only where asked for; plainly asked, apt takes the newest security fix
        suite = ["-t", kernel.suite] if kernel.suite != SUITE else []
        names = [f"linux-{part}-cloud-amd64" for part in ("image", "headers")]
        what = f"installing kernel {kernel.release}"
        chroot(tree, what, *apt, "install", "--no-install-recommends", *suite, *names)
    say("installing what tools/dev setup installs")
    carry_tree(tree / GUEST_CHECKOUT)
    chroot(tree, "tools/dev setup-system", f"/{GUEST_CHECKOUT}/tools/dev", "setup-system")
    shutil.rmtree(tree / GUEST_CHECKOUT)
    for folder in (
        "var/cache/apt/archives",
        "var/lib/apt/lists",
        "usr/share/doc",
        "usr/share/man",
        "usr/share/locale",
    ):
        shutil.rmtree(tree / folder, ignore_errors=True)
    (tree / "var/cache/apt/archives/partial").mkdir(parents=True)
    (tree / "var/lib/apt/lists/partial").mkdir(parents=True)


def ensure(*, rebuild: bool = False) -> tuple[str, Path]:
    """The key and the folder of the base tree; the caller holds the cache's lock.

    Raises:
        BuildError: a step of the build did not work.
    """
    cache = cache_folder()
    mirror, security = debian_mirrors()
    key = digest(Path(__file__).read_text(), _packages(), mirror, security)
    final = cache / f"base-{key}"
    if rebuild or not final.exists():
        with scratch(cache, "building") as folder:
            tree = folder / "tree"
            _build_base(tree, mirror, security)
            replace(cache, "base-", tree, final)
    return key, final
