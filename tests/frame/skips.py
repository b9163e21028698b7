"""Who was skipped and for want of what; when that is a failure of the run, and why. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

HOST = "needs "
"""Begins the reason of a skip for something that the machine could have: root, BCC, a program."""
KERNEL = "kernel lacks "
"""Begins the reason of a skip for a feature that this kernel has not, by tidegate's own probes."""

ELSEWHERE = "not part of this repository: "
"""Begins the reason of a skip for data that stands beside some checkouts and cannot be asked of a clone."""


@dataclass(slots=True)
class Skips:
    """The skips of one session."""

    by_reason: Counter[str] = field(default_factory=Counter)
    bpf: Counter[str] = field(default_factory=Counter)  # of tests marked bpf

    def add(self, reason: str, *, bpf: bool) -> None:
        reason = reason.removeprefix("Skipped: ")
        self.by_reason[reason] += 1
        if bpf:
            self.bpf[reason] += 1

    def faults(self, *, can_load_bpf: bool, ci: bool) -> list[str]:
        """Why the session has failed although no test did; empty when it has not.

        A kernel that lacks a feature is never a fault: the support table says what each kernel has. A
        machine that can load BPF must run every BPF test, and CI must run every test that the repository is
        enough for.
        """
        found = []
        bpf = sum(count for reason, count in self.bpf.items() if not reason.startswith(KERNEL))
        if can_load_bpf and bpf:
            found.append(f"{bpf} bpf tests were skipped although this machine loads BPF programs")
        allowed = (KERNEL, ELSEWHERE)
        every = sum(count for reason, count in self.by_reason.items() if not reason.startswith(allowed))
        if ci and every:
            found.append(f"{every} tests were skipped, and CI=true allows none but for what the kernel lacks")
        return found

    def lines(self) -> list[str]:
        """One line per missing feature, the most missed first."""
        return [f"{count:4} skipped: {reason}" for reason, count in self.by_reason.most_common()]
