"""The kernel half of an instance, owned by the supervisor: cgroup, maps, programs, links.

    half = KernelHalf.start("default")      # the process is in the cgroup from here on
    slot = half.allocate_slot()
    half.mark_listener(listener, slot)      # its connections are stamped and counted
    ...fork workers: they call half.worker_close() and keep half.slots and half.ages
    half.close()

Whatever way the supervisor ends, the kernel detaches the programs when the last fd goes.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tidegate.config.model import Steer, WhenFull
from tidegate.kernel import bpf, maps, tcp_info
from tidegate.kernel.cgroup import InstanceCgroup
from tidegate.kernel.links import Attached
from tidegate.kernel.loader import (
    GETSOCKOPT,
    SOCKOPS,
    KernelUnavailable,
    MapNumber,
    Objects,
    Program,
    compile_programs,
)
from tidegate.kernel.records import MAX_SLOTS, RECORDS_VERSION, SlotState, Stamp, StampFlag
from tidegate.kernel.slots import AgeCounts, Ages, Slots
from tidegate.kernel.steering import SteeredGroup

_SO_COOKIE = 57
_CGROUP_PROGRAMS = (SOCKOPS, GETSOCKOPT)


def somaxconn() -> int:
    """The kernel's silent cap on every backlog, of our network namespace."""
    return int(Path("/proc/sys/net/core/somaxconn").read_text())


def socket_cookie(sock: socket.socket) -> int:
    """The kernel's number of a socket, unique until reboot."""
    (cookie,) = struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8))
    return int(cookie)


class KernelHalf:
    """See the module. Not thread-safe; the supervisor has one thread."""

    def __init__(
        self, cgroup: InstanceCgroup, map_fds: Mapping[MapNumber, int], objects: Objects | None
    ) -> None:
        self.cgroup = cgroup
        self.map_fds = dict(map_fds)
        self.attached: dict[str, Attached] = {}
        self.slots = Slots(self.map_fds[MapNumber.SLOTS])
        self.ages = Ages(self.map_fds[MapNumber.AGES])
        self._objects = objects
        self.groups: dict[int, SteeredGroup] = {}
        self._next_slot = 0

    @classmethod
    def start(cls, instance: str, *, mount: Path | None = None) -> KernelHalf:
        """Compiles, creates the cgroup, joins it, loads and attaches; about one second.

        KernelUnavailable with the reason and the mend; nothing is left behind then.
        """
        if os.geteuid() != 0:
            raise KernelUnavailable("the kernel half needs root", "run tidegate as root (workers drop it)")
        objects = compile_programs()
        # kernels before 5.11 count maps against it
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        with contextlib.ExitStack() as undo:
            cgroup = InstanceCgroup.create(instance, mount)
            undo.callback(cgroup.remove)
            map_fds: dict[MapNumber, int] = {}
            for number in maps.INSTANCE_MAPS:
                try:
                    map_fds[number] = bpf_fd = maps.create(number)
                except OSError as error:
                    raise KernelUnavailable(
                        f"the kernel refuses a map ({number.name.lower()}): {error.strerror}",
                        "tidegate doctor says what this kernel lacks",
                    ) from error
                undo.callback(os.close, bpf_fd)
            half = cls(cgroup, map_fds, objects)
            undo.callback(half._close_attached)
            half._attach(objects)
            cgroup.join()
            undo.pop_all()
        return half

    def _attach(self, objects: Objects) -> None:
        for program in _CGROUP_PROGRAMS:
            fd = objects.load(program, self.map_fds)
            try:
                self.attached[program.name] = Attached.to_cgroup(
                    program.name, fd, self.cgroup.fd, program.attach
                )
            except OSError as error:
                os.close(fd)
                raise KernelUnavailable(
                    f"cannot attach {program.name}.c to {self.cgroup.path}: {error.strerror}",
                    "Linux 5.14 or newer with CONFIG_CGROUP_BPF is needed; another program on a cgroup "
                    "above may refuse company (bpftool cgroup tree)",
                ) from error

    def _close_attached(self) -> None:
        for attached in self.attached.values():
            attached.close()
        self.attached.clear()

    # -- listeners -------------------------------------------------------------------------------

    def allocate_slot(self) -> int:
        """A free slot, zeroed. Round robin, so that a slot just freed is not the next one used."""
        for step in range(MAX_SLOTS):
            slot = (self._next_slot + step) % MAX_SLOTS
            if self.slots.state(slot) == SlotState.FREE:
                self._next_slot = slot + 1
                self.reset_slot(slot)
                self.slots.set_state(slot, SlotState.DRAINING)
                return slot
        raise KernelUnavailable(f"all {MAX_SLOTS} slots are in use", "fewer listeners or fewer workers")

    def mark_listener(self, sock: socket.socket, slot: int, backlog: int) -> None:
        """Ties a listening socket, opened within our cgroup, to a slot: its connections are stamped.

        Makes the slot active, with a fresh heartbeat. `backlog` is what listen() was given.
        """
        stamp = Stamp(flags=StampFlag.LISTENER, slot=slot)
        key = struct.pack("=i", sock.fileno())
        bpf.map_update(self.map_fds[MapNumber.STAMPS], key, bytes(stamp))
        cookie = struct.pack("=Q", socket_cookie(sock))
        bpf.map_update(self.map_fds[MapNumber.LISTENERS], cookie, struct.pack("=I", slot))
        self.slots.set_backlog(slot, min(backlog, somaxconn()))
        self.slots.heartbeat(slot, time.monotonic_ns())
        self.slots.set_state(slot, SlotState.ACTIVE)

    def unmark_listener(self, sock: socket.socket) -> None:
        """Forgets a listener that is about to be closed. Its slot stays until reset_slot()."""
        with contextlib.suppress(FileNotFoundError):
            bpf.map_delete(self.map_fds[MapNumber.LISTENERS], struct.pack("=Q", socket_cookie(sock)))

    def steer_listener(
        self,
        index: int,
        members: Sequence[tuple[socket.socket, int]],
        *,
        policy: Steer,
        when_full: WhenFull,
        hang_after_ns: int,
    ) -> SteeredGroup:
        """Steers the reuseport group of marked listeners, given as (socket, slot).

        `index` is the caller's number of the listener, by which a hand-over finds the group again.
        KernelUnavailable where the kernel refuses: the group keeps the kernel's own hash then.
        """
        group = SteeredGroup.load(self.objects(), self.map_fds)
        try:
            group.configure(policy, when_full, hang_after_ns)
            for sock, slot in members:
                group.add(sock, slot)
            group.attach(members[0][0])
        except OSError as error:
            group.close()
            raise KernelUnavailable(
                f"cannot steer listener {index}: {error.strerror}", "tidegate doctor"
            ) from error
        self.groups[index] = group
        return group

    def unsteer_listener(self, index: int) -> None:
        """Forgets a group whose listener is removed. Idempotent."""
        group = self.groups.pop(index, None)
        if group is not None:
            group.close()

    def reset_slot(self, slot: int) -> None:
        """Zeroes and frees a slot. Only when its listener is closed and its worker knows no more of it."""
        self.slots.reset(slot)
        self.ages.reset(slot)

    def resync(self, slot: int, listener: socket.socket, attempts: int = 5) -> int | None:
        """Makes the slot's `waiting` what the kernel's accept queue says; the correction made.

        For arrivals that nobody will read: their worker died between accept() and the reading. The
        queue is read between two equal readings of the counts, twice with the same result, so that
        what is under way is not taken for a loss. None when it never stood still.
        """
        seen: int | None = None
        for _ in range(attempts):
            before = self.slots.read(slot)
            queued, _most = tcp_info.accept_backlog(listener)
            after = self.slots.read(slot)
            if (before.arrived, before.taken) == (after.arrived, after.taken):
                lost = after.arrived - after.taken - queued
                if lost == seen:
                    self.slots.set_lost(slot, lost)
                    return lost - after.lost
                seen = lost
            time.sleep(0.001)
        return None

    def age_histogram(self, slot: int) -> AgeCounts:
        return self.ages.read(slot)

    # -- what others need to know -----------------------------------------------------------------

    def map_ids(self) -> dict[str, int]:
        """Kernel ids of the instance's maps, by the names of `status`."""
        return {number.name.lower(): bpf.map_info(fd).id for number, fd in self.map_fds.items()}

    def program_fds(self) -> dict[str, int]:
        """Fds of the loaded programs by name, for run statistics."""
        programs = {name: attached.prog_fd for name, attached in self.attached.items()}
        return programs | {f"steer.{index}": group.prog_fd for index, group in self.groups.items()}

    # -- hand-over ---------------------------------------------------------------------------------

    def export(self) -> tuple[dict[str, Any], list[int]]:
        """What a successor needs: a JSON-able manifest and the fds it speaks of, in its order."""
        names: list[str] = []
        fds: list[int] = []

        def give(name: str, fd: int) -> None:
            names.append(name)
            fds.append(fd)

        give("cgroup", self.cgroup.fd)
        for number, fd in self.map_fds.items():
            give(f"map.{number.name}", fd)
        for name, attached in self.attached.items():
            give(f"prog.{name}", attached.prog_fd)
            give(f"link.{name}", attached.link_fd)
        for index, group in self.groups.items():
            for name, fd in group.fds().items():
                give(f"{name}.{index}", fd)
        manifest = {
            "records_version": RECORDS_VERSION,
            "cgroup": str(self.cgroup.path),
            "cgroup_origin": str(self.cgroup.origin),
            "next_slot": self._next_slot,
            "groups": list(self.groups),
            "fds": names,
        }
        return manifest, fds

    @classmethod
    def adopt(cls, manifest: Mapping[str, Any], fds: Sequence[int]) -> KernelHalf:
        """Takes a predecessor's kernel half over; the fds are ours from here on, come what may.

        The caller must be in its cgroup. The predecessor's programs serve on until refresh_programs().
        KernelUnavailable when the layout of the shared records differs: then only a restart helps.
        """
        theirs = manifest.get("records_version")
        if theirs != RECORDS_VERSION:
            for fd in fds:
                os.close(fd)
            raise KernelUnavailable(
                f"the running tidegate shares records of version {theirs} with the kernel, "
                f"this one version {RECORDS_VERSION}: it cannot take over",
                "restart tidegate instead of upgrading it in place",
            )
        by_name = dict(zip(manifest["fds"], fds, strict=True))
        cgroup = InstanceCgroup(
            Path(manifest["cgroup"]), Path(manifest["cgroup_origin"]), by_name.pop("cgroup")
        )
        map_fds = {number: by_name.pop(f"map.{number.name}") for number in maps.INSTANCE_MAPS}
        half = cls(cgroup, map_fds, None)
        half._next_slot = int(manifest["next_slot"])
        for program in _CGROUP_PROGRAMS:
            prog_fd, link_fd = by_name.pop(f"prog.{program.name}"), by_name.pop(f"link.{program.name}")
            half.attached[program.name] = Attached(program.name, prog_fd, link_fd)
        for index in manifest["groups"]:
            group_fds = {name: by_name.pop(f"{name}.{index}") for name in ("group", "socks", "prog")}
            half.groups[int(index)] = SteeredGroup.adopt(group_fds)
        return half

    def refresh_programs(self) -> None:
        """Replaces the programs by this version's, over the same maps and links.

        KernelUnavailable leaves the old ones in place.
        """
        objects = self.objects()
        loaded: list[tuple[Program, int]] = []
        try:
            for program in _CGROUP_PROGRAMS:
                loaded.append((program, objects.load(program, self.map_fds)))
        except KernelUnavailable:
            for _, fd in loaded:
                os.close(fd)
            raise
        for program, fd in loaded:
            self.attached[program.name].replace(fd)

    def objects(self) -> Objects:
        """The compiled programs; compiles them when this process has not yet."""
        if self._objects is None:
            self._objects = compile_programs()
        return self._objects

    # -- ends --------------------------------------------------------------------------------------

    def worker_close(self) -> None:
        """In a forked worker: closes all that could harm others. The slots and ages stay mapped."""
        self._close_fds()
        self.cgroup.close_fd()

    def release(self) -> None:
        """After a hand-over: lets go of the fds; the successor holds what is attached."""
        self.worker_close()

    def close(self) -> bool:
        """Detaches, moves the process back to where it was, removes the cgroup. False if that stays."""
        self._close_fds()
        return self.cgroup.remove()

    def _close_fds(self) -> None:
        self._close_attached()
        for group in self.groups.values():
            group.close()
        for fd in self.map_fds.values():
            os.close(fd)
        self.map_fds.clear()
