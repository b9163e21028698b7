"""`tidegate doctor`: what this host can do for tidegate, and the command that mends what is missing."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import pwd
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from tidegate import __version__
from tidegate.errors import EXIT_FAILED, OperatorError
from tidegate.kernel import bpf, cgroup, floors, probes
from tidegate.kernel.bpf import ProgType
from tidegate.supervisor import abilities
from tidegate_tools import client

_BACKLOG = 4096  # the default of `backlog`
_FILES = 65536  # two for each session
# r0 = 1; exit
_SMALLEST_PROGRAM = struct.pack("<BBhiBBhi", 0xB7, 0, 0, 1, 0x95, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at. `needed`: without it the BPF half does not start; else its lack only costs."""

    name: str
    ok: bool
    found: str
    needed: bool = True
    fix: str = ""


def _root() -> Check:
    if os.geteuid() == 0:
        return Check("root", True, "running as root")
    return Check("root", False, f"running as uid {os.geteuid()}", fix="sudo tidegate doctor")


def _kernel() -> Check:
    if reason := floors.below_floor():
        return Check("kernel", False, reason, fix="boot a newer kernel; see docs/kernels.md")
    return Check("kernel", True, f"Linux {platform.release()}")


def _bpf() -> Check:
    try:
        fd, _ = bpf.prog_load(ProgType.SOCK_OPS, _SMALLEST_PROGRAM, "tidegate_try")
    except OSError as error:
        fix = (
            "sudo tidegate doctor"
            if os.geteuid()
            else "allow bpf(2): CAP_BPF and CAP_NET_ADMIN in containers"
        )
        return Check("bpf(2)", False, str(error), fix=fix)
    os.close(fd)
    return Check("bpf(2)", True, "loads programs")


def _bcc() -> Check:
    # in another process: it maps LLVM. The system's Python serves where ours cannot see Debian's package
    for python in dict.fromkeys((sys.executable, "/usr/bin/python3")):
        with contextlib.suppress(OSError):
            done = subprocess.run([python, "-c", "from bcc import BPF"], capture_output=True)
            if done.returncode == 0:
                return Check("BCC", True, f"python3-bpfcc, seen by {python}")
    return Check("BCC", False, "no module named bcc with a BPF in it", fix="apt-get install python3-bpfcc")


def _headers() -> Check:
    modules = Path("/lib/modules", platform.release())
    if (modules / "build").is_dir():
        return Check("kernel headers", True, str((modules / "build").resolve()))
    return Check("kernel headers", False, f"no {modules}/build", fix=_mend_headers(modules))


def _mend_headers(modules: Path) -> str:
    """The command for this host: the kernel's own headers, or others linked to where BCC looks."""
    own = f"linux-headers-{platform.release()}"
    if shutil.which("apt-cache"):
        known = subprocess.run(["apt-cache", "show", own], capture_output=True).returncode == 0
        if known:
            return f"apt-get install {own}"
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    found = f"$(ls -d /usr/src/linux-headers-*-{machine} | tail -n 1)"
    common = "$(ls -d /usr/src/linux-headers-*-common | tail -n 1)"
    return (
        f"apt-get install linux-headers-{machine} && mkdir -p {modules} && "
        f"ln -sfn {found} {modules}/build && ln -sfn {common} {modules}/source"
    )


def _cgroup() -> Check:
    try:
        mount = cgroup.mount_point()
    except OperatorError as error:
        return Check("cgroup v2", False, error.message, fix=error.fix)
    return Check("cgroup v2", True, f"mounted at {mount}")


def _jit() -> Check:
    with contextlib.suppress(OSError, ValueError):
        if int(Path("/proc/sys/net/core/bpf_jit_enable").read_text()) == 0:
            return Check(
                "BPF JIT",
                False,
                "off: every program is interpreted",
                needed=False,
                fix="sysctl -w net.core.bpf_jit_enable=1",
            )
    return Check("BPF JIT", True, "on", needed=False)


def _somaxconn() -> Check:
    limit = int(Path("/proc/sys/net/core/somaxconn").read_text())
    found = f"{limit}: the kernel's silent cap on every backlog"
    fix = f"sysctl -w net.core.somaxconn={_BACKLOG}" if limit < _BACKLOG else ""
    return Check("somaxconn", limit >= _BACKLOG, found, needed=False, fix=fix)


def _files() -> Check:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ok = hard == resource.RLIM_INFINITY or hard >= _FILES
    found = f"{'unlimited' if hard == resource.RLIM_INFINITY else hard} open files: a session takes two"
    fix = "" if ok else f"ulimit -Hn {_FILES}, or LimitNOFILE={_FILES} in the systemd unit"
    return Check("open files", ok, found, needed=False, fix=fix)


def _worker_user() -> Check:
    for name in ("tidegate", "nobody"):
        with contextlib.suppress(KeyError):
            pwd.getpwnam(name)
            return Check("workers' user", True, name, needed=False)
    found = "neither tidegate nor nobody exists"
    return Check("workers' user", False, found, needed=False, fix="useradd --system tidegate")


_CHECKS: tuple[Callable[[], Check], ...] = (
    *(_kernel, _root, _bpf, _bcc, _headers, _cgroup),
    *(_jit, _somaxconn, _files, _worker_user),
)


@dataclass(frozen=True, slots=True)
class Report:
    """All that was seen."""

    checks: list[Check]
    features: list[probes.Result]

    @property
    def lacking(self) -> str:
        """The names of what is needed and missing."""
        return ", ".join(check.name for check in self.checks if check.needed and not check.ok)

    @property
    def ok(self) -> bool:
        """Nothing needed is missing, and the kernel has what kernels of its age must have."""
        release = platform.release()
        return not self.lacking and all(
            result.works for result in self.features if probes.required(result.feature, release)
        )

    def as_json(self) -> dict[str, object]:
        release = platform.release()
        return {
            "version": __version__,
            "kernel": release,
            "ok": self.ok,
            "checks": [asdict(check) for check in self.checks],
            "features": [
                {
                    **asdict(result),
                    "required": probes.required(result.feature, release),
                    "what": probes.ABOUT[probes.Feature(result.feature)].what,
                    "without": probes.ABOUT[probes.Feature(result.feature)].without,
                }
                for result in self.features
            ],
        }


def examine() -> Report:
    """Looks at everything; a second or two, for the programs are compiled and tried."""
    report = Report([check() for check in _CHECKS], [])
    found = abilities.none_of_it(f"not tried: {report.lacking}") if report.lacking else abilities.run_alone()
    report.features.extend(found)
    return report


def _say(report: Report) -> None:
    click.echo(f"tidegate {__version__} on Linux {platform.release()}, Python {platform.python_version()}")
    for check in report.checks:
        word = "ok" if check.ok else "MISSING" if check.needed else "advice"
        click.echo(f"{word:8} {check.name}: {check.found}")
        if check.fix:
            click.echo(f"{'':8}   fix: {check.fix}")
    if lacking := report.lacking:
        click.echo(f"\nThe kernel's features were not tried, for want of: {lacking}")
        return
    click.echo("\nWhat this kernel does, each tried just now:")
    for result in report.features:
        about = probes.ABOUT[probes.Feature(result.feature)]
        click.echo(f"{'yes' if result.works else 'no':8} {result.feature}: {about.what}")
        if not result.works:
            click.echo(f"{'':8}   seen: {result.reason}")
            click.echo(f"{'':8}   so: {about.without}")


@click.command(
    epilog="""\b
Exit status: 0 when the BPF half can run here, 1 when something it needs is
missing. Without it tidegate runs on ages estimated from TCP_INFO.
"""
)
@client.json_option
def command(as_json: bool) -> None:
    """Say what this host can do for tidegate, and how to mend what is missing.

    Looks at the kernel, at what compiles the BPF programs and at limits, then tries every kernel feature on
    sockets of its own on 127.0.0.1. Changes nothing and leaves nothing behind. Run it as root.
    """
    report = examine()
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
    else:
        _say(report)
    if not report.ok:
        sys.exit(EXIT_FAILED)
