"""One guest: booted headless under emulation, its output streamed, ended whatever happens."""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devlib.base import Kernel
from devlib.common import BuildError
from devlib.image import Image

_PR_SET_PDEATHSIG = 1
# panic=-1 ends a guest that panics at once; mitigations cost emulation dear and change nothing that is tested
_COMMAND_LINE = (
    "root=/dev/vda rw console=ttyS0 quiet net.ifnames=0 systemd.show_status=auto panic=-1 mitigations=off"
)
# KVM is not asked for: where it is missing or broken the suite must mean the same as where it is not
_ACCELERATOR = "tcg,thread=multi,tb-size=256"
# QEMU 7.2 corrupts the flags in cmpxchg16b, which the allocator of newer kernels uses: they die in boot.
# Four levels of page tables are walked faster than five.
_CPU = "max,cx16=off,la57=off"
_POLL_S = 0.05
_CONSOLE_LINES = 60


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. `result` is what the guest handed over, None if it never came to that."""

    result: dict[str, Any] | None
    booted_s: float  # until its first line
    total_s: float


class _Tail:
    """Follows a growing file line by line."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self._file = path.open("rb")
        self._rest = b""

    def lines(self) -> list[str]:
        *whole, self._rest = (self._rest + self._file.read()).split(b"\n")
        return [line.decode(errors="replace").rstrip("\r") for line in whole]

    def close(self) -> None:
        self._file.close()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def boot(
    image: Image,
    kernel: Kernel,
    job: Path,
    folder: Path,
    show: Callable[[str], None],
    *,
    limit_s: float,
    silence_s: float,
) -> Outcome:
    """Boots `kernel`, gives it `job` (a tar) as second disk and follows its output until it powers off.

    Everything it writes goes to `folder`, which the caller removes. A guest that takes more than `limit_s`
    or says nothing for `silence_s` is ended, and its console shown.

    Raises:
        BuildError: QEMU is not there or does not start.
    """
    console, out, result = folder / "console.log", folder / "out.log", folder / "result.json"
    argv = [
        *("qemu-system-x86_64", "-accel", _ACCELERATOR, "-cpu", _CPU, "-m", "2048", "-smp", "2"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-nic", "none"),
        *(
            "-kernel",
            str(image.vmlinuz(kernel)),
            "-initrd",
            str(image.initrd(kernel)),
            "-append",
            _COMMAND_LINE,
        ),
        # written to a nameless overlay that is gone with the process
        *("-drive", f"file={image.disk},if=virtio,format=raw,snapshot=on"),
        *("-drive", f"file={job},if=virtio,format=raw,readonly=on"),
        *("-serial", f"file:{console}"),
        *("-device", "virtio-serial-pci"),
        *("-chardev", f"file,id=out,path={out}", "-device", "virtserialport,chardev=out,name=tidegate.out"),
        *("-chardev", f"file,id=result,path={result}"),
        *("-device", "virtserialport,chardev=result,name=tidegate.result"),
        *("-device", "virtio-rng-pci"),
    ]
    tail = _Tail(out)
    started = time.monotonic()
    try:
        qemu = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            preexec_fn=_die_with_parent,
        )
    except FileNotFoundError:
        raise BuildError(
            "qemu-system-x86_64 is not installed\n  fix: apt-get install qemu-system-x86"
        ) from None
    booted = 0.0
    spoke = started
    ended = ""
    try:
        while True:
            running = qemu.poll() is None
            for line in tail.lines():
                spoke = time.monotonic()
                booted = booted or spoke - started
                show(line)
            if not running:
                break
            now = time.monotonic()
            if now - started > limit_s:
                ended = f"the guest was not done after {limit_s:.0f} s and was ended"
            elif now - spoke > silence_s:
                ended = f"the guest said nothing for {silence_s:.0f} s and was ended"
            if ended:
                break
            time.sleep(_POLL_S)
    finally:
        qemu.kill()
        _, errors = qemu.communicate()
        tail.close()
    handed = _read(result)
    if handed is None:
        show(ended or f"the guest went away without a result (QEMU ended with status {qemu.returncode})")
        for line in errors.decode(errors="replace").splitlines()[-5:]:
            show(f"qemu: {line}")
        for line in (
            console.read_text(errors="replace").splitlines()[-_CONSOLE_LINES:] if console.exists() else []
        ):
            show(f"console: {line}")
    return Outcome(handed, booted, time.monotonic() - started)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def available() -> str:
    """Why this machine cannot run guests; "" when it can."""
    try:
        done = subprocess.run(
            ["qemu-system-x86_64", "-accel", "help"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return "qemu-system-x86_64 is not installed"
    if sys.maxsize < 2**32 or "tcg" not in done.stdout:
        return "this QEMU has no software emulation (tcg)"
    return ""
