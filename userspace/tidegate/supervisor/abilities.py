"""All that this host's kernel can do for tidegate, for `doctor` and the tests: the probes, and splicing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict

from tidegate.kernel import probes
from tidegate.kernel.half import KernelHalf
from tidegate.kernel.loader import KernelUnavailable
from tidegate.kernel.probes import Feature, Result
from tidegate.supervisor import splice

_ALONE_TIMEOUT_S = 120.0


def none_of_it(reason: str) -> list[Result]:
    """The results where the BPF half does not start at all."""
    return [Result(feature, False, reason) for feature in Feature]


def run_here() -> list[Result]:
    """Starts a kernel half for the probes in this process, which it leaves as it was."""
    try:
        half = KernelHalf.start(f"probe-{os.getpid()}")
    except KernelUnavailable as error:
        return none_of_it(error.message)
    try:
        reason = splice.unfit(half.objects())
        return [*probes.run(half), Result(Feature.SPLICE, not reason, reason)]
    finally:
        half.close()


def run_alone() -> list[Result]:
    """The same in a process of its own, so that neither cgroup nor sockets of ours are touched; 1 to 2 s."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tidegate.supervisor.abilities"],
            capture_output=True,
            text=True,
            timeout=_ALONE_TIMEOUT_S,
        )
        return [Result(**found) for found in json.loads(done.stdout)]
    except subprocess.TimeoutExpired:
        return none_of_it(f"the probes did not end within {_ALONE_TIMEOUT_S:.0f} s")
    except (ValueError, TypeError):
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        return none_of_it(f"the probes failed: {last}")


def main() -> None:
    """Prints the results as JSON: what `run_alone` reads."""
    json.dump([asdict(result) for result in run_here()], sys.stdout)


if __name__ == "__main__":
    main()
