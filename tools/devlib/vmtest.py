"""tools/dev vm-test: the kernel tests and a short end-to-end set on Debian's own kernels, in QEMU."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from devlib import image, qemu, support
from devlib.base import KERNELS, Kernel
from devlib.common import ROOT, BuildError, cache_folder, carry_tar, end_on_signals, say, scratch

# under emulation everything takes a few times longer; tests multiply what they wait for by it
_TIME_SCALE = 4
_LIMIT_S = 1500.0
_SILENCE_S = 420.0


def default_tests() -> list[str]:
    """What a guest runs unless told otherwise: the kernel tests, and what is listed for it."""
    listed = (ROOT / "tools/devlib/guest-tests.txt").read_text().splitlines()
    return [line.strip() for line in listed if line.strip() and not line.startswith("#")]


def _kernels(name: str) -> list[Kernel]:
    return [kernel for kernel in KERNELS if name in (kernel.release, "all")]


def run_kernel(
    built: image.Image, kernel: Kernel, tests: list[str], silence_s: float, limit_s: float
) -> support.Run:
    """One boot. What it says is printed with the kernel before each line."""
    job = f"TESTS=({shlex.join(tests)})\nTIDEGATE_TIME_SCALE={_TIME_SCALE}\n"
    with scratch(cache_folder(), f"run-{os.getpid()}") as folder:
        tar = folder / "job.tar"
        carry_tar(tar, {".guest-job": job})
        say(f"booting Debian's {kernel.release} kernel ({tar.stat().st_size >> 20} MB carried in)")
        outcome = qemu.boot(
            built,
            kernel,
            tar,
            folder,
            lambda line: print(f"[{kernel.release}] {line}", flush=True),
            limit_s=limit_s,
            silence_s=silence_s,
        )
    return support.judge(kernel.release, outcome)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tools/dev vm-test", description=__doc__)
    names = [kernel.release for kernel in KERNELS]
    parser.add_argument(
        "--kernel",
        choices=[*names, "all"],
        default=names[0],
        help="which stock kernel (default: %(default)s)",
    )
    parser.add_argument("--rebuild", action="store_true", help="build the image anew")
    parser.add_argument("--build-only", action="store_true", help="build the image, boot nothing")
    parser.add_argument(
        "--table", action="store_true", help="write what the kernels can do to docs/kernels.md"
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=_LIMIT_S,
        metavar="S",
        help="a guest that takes longer is ended (default: %(default)s)",
    )
    parser.add_argument(
        "--silence",
        type=float,
        default=_SILENCE_S,
        metavar="S",
        help="one that says nothing for so long is ended (default: %(default)s)",
    )
    parser.add_argument("tests", nargs="*", help="arguments for pytest in place of the usual set (after --)")
    options = parser.parse_args(argv)
    os.nice(10)
    end_on_signals()
    try:
        if reason := qemu.available():
            raise BuildError(f"this machine cannot run guests: {reason}")
        began = time.monotonic()
        built = image.ensure(rebuild=options.rebuild)
        say(f"image ready after {time.monotonic() - began:.0f} s")
        if options.build_only:
            return 0
        runs = [
            run_kernel(built, kernel, options.tests or default_tests(), options.silence, options.limit)
            for kernel in _kernels(options.kernel)
        ]
    except BuildError as error:
        print(f"tools/dev vm-test: {error}", file=sys.stderr)
        return 1
    for run in runs:
        say(f"Linux {run.release or run.name} {run.abilities()}")
        print(f"tools/dev: vm-test {run.line()}", flush=True)
    if options.table:
        support.write(runs)
        say(f"wrote {support.DATA.relative_to(ROOT)} and {support.PAGE.relative_to(ROOT)}")
    return 0 if all(run.passed for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
