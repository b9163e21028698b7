"""Programs attached by BPF links: when the last holder of the link's fd dies, the kernel detaches."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tidegate.kernel import bpf
from tidegate.kernel.bpf import AttachType


@dataclass(slots=True)
class Attached:
    """A loaded program and the link that holds it to a cgroup."""

    name: str
    prog_fd: int
    link_fd: int

    @classmethod
    def to_cgroup(cls, name: str, prog_fd: int, cgroup_fd: int, attach: AttachType) -> Attached:
        """Takes over `prog_fd`. OSError (EPERM: another program refuses company, EINVAL: too old)."""
        return cls(name, prog_fd, bpf.link_create(prog_fd, cgroup_fd, attach))

    def replace(self, prog_fd: int) -> None:
        """Puts another program in its place, with no moment in between. Takes over `prog_fd`."""
        bpf.link_update(self.link_fd, prog_fd)
        os.close(self.prog_fd)
        self.prog_fd = prog_fd

    def close(self) -> None:
        """Closes our fds; detaches if nobody else holds the link."""
        for fd in (self.link_fd, self.prog_fd):
            if fd >= 0:
                os.close(fd)
        self.link_fd = self.prog_fd = -1
