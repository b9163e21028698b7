"""Whether workers may let the kernel move bytes, decided once at start-up and told in log and `status`."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

from tidegate import logs
from tidegate.config.model import Config, QueueAgeSource, Splice
from tidegate.errors import OperatorError
from tidegate.kernel import floors
from tidegate.kernel.half import KernelHalf
from tidegate.kernel.loader import SPLICE, Objects, compile_programs
from tidegate.kernel.splicing import Splicing
from tidegate.session import splice_check

_log = logging.getLogger("tidegate.splice")


@dataclass(frozen=True, slots=True)
class SpliceChoice:
    """`objects` None: everything is copied. Not `trusted`: only where a listener says splice = "on"."""

    objects: Objects | None
    trusted: bool
    reason: str  # why not, "" when all is well

    @property
    def by(self) -> str:
        """For `status`: who moves the bytes of long streams."""
        return "kernel" if self.objects is not None and self.trusted else "copy"

    def create(self) -> Splicing | None:
        """In a worker that still is root: its maps."""
        if self.objects is None:
            return None
        try:
            return Splicing.create(self.objects)
        except OperatorError as error:
            logs.event(_log, logging.ERROR, "splice_failed", reason=error.message, fix=error.fix)
            return None


def doubts() -> str:
    """Why this kernel should not be trusted with it; "" when it may be tried."""
    release = os.uname().release
    if floors.version(release) < floors.SPLICE_FLOOR:
        oldest = ".".join(map(str, floors.SPLICE_FLOOR))
        return f"Linux {release} is older than {oldest}: sockmap loses or repeats bytes there"
    return ""


def unfit(objects: Objects) -> str:
    """The start-up test by itself, for `doctor`: why streams are not spliced here, "" when they are."""
    try:
        return doubts() or splice_check.run(objects)
    except OperatorError as error:
        return error.message


def choose(config: Config, half: KernelHalf | None) -> SpliceChoice:
    """Tries it on sockets of our own (under 200 ms) when some listener would use it."""
    wanted = {listener.splice for listener in config.listeners}
    insisted = Splice.ON in wanted
    if wanted == {Splice.OFF}:
        return SpliceChoice(None, False, 'splice = "off" on every listener')
    if half is None and not insisted:
        why = (
            'queue_age = "tcp_info" keeps BPF out'
            if config.queue_age is QueueAgeSource.TCP_INFO
            else "the kernel half is not loaded"
        )
        return SpliceChoice(None, False, why)
    reason = doubts()
    objects: Objects | None = None
    try:
        if not reason or insisted:
            objects = half.objects() if half is not None else compile_programs((SPLICE,))
            reason = reason or splice_check.run(objects)
    except OperatorError as error:
        objects, reason = None, error.message
    if reason:
        insisted = insisted and objects is not None
        event = "splice_untrusted" if insisted else "splice_unavailable"
        logs.event(_log, logging.WARNING, event, reason=reason)
        return SpliceChoice(objects if insisted else None, False, reason)
    return SpliceChoice(objects, True, "")
