"""What the spliced sessions of one worker share: its kernel maps, the credit, and who is told what."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from tidegate import logs
from tidegate.config.model import Splice
from tidegate.kernel.splicing import KernelFlow, Splicing
from tidegate.loop.reactor import EPOLLIN, Reactor
from tidegate.metrics.names import EndReason
from tidegate.session.splice import NEVER
from tidegate.session.splice_budget import Budget

if TYPE_CHECKING:
    from tidegate.session.context import Context

# Where there is no credit for newcomers nobody looks again for so long: who copies asks with each piece, and
# to answer takes time for each that is spliced.
FULL_NS = 100_000_000
_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_log = logging.getLogger("tidegate.splice")
_limited = logs.RateLimited(_log, per_second=1)


class Mover(Protocol):
    """Whoever drives what the kernel moves of a session."""

    def on_passed(self, flow: KernelFlow) -> None:
        """The kernel passed something, or has come to the end of a budget."""
        ...

    def end(self, reason: EndReason) -> None:
        """End the session."""
        ...


class Splicer:
    """One per worker."""

    def __init__(
        self, kernel: Splicing, reactor: Reactor, limit: int, total: int, *, trusted: bool = True
    ) -> None:
        """`limit` and `total` as splice_limit and splice_total; not `trusted`: for splice = "on" alone."""
        self.kernel = kernel
        self._budget = Budget(limit, total)
        self.trusted = trusted
        self._reactor = reactor
        self._full_until_ns = 0
        self._flows: dict[int, KernelFlow] = {}  # that have a record, by its index
        self._moving: dict[int, tuple[KernelFlow, Mover]] = {}  # of those, that may be redirected now
        reactor.add(kernel.bell.fileno(), EPOLLIN, self._on_bell)

    def threshold(self, ctx: Context) -> int:
        """How many bytes a stream or body of this listener must have for the kernel to move it."""
        listener = ctx.listener
        if listener.splice is Splice.OFF or (listener.splice is Splice.AUTO and not self.trusted):
            return NEVER
        return listener.splice_after

    @staticmethod
    def possible(*socks: socket.socket) -> bool:
        """Whether these are of a kind that the kernel can move bytes between."""
        return all(sock.family in _FAMILIES for sock in socks)

    # records

    def join(self, front: socket.socket, back: socket.socket, share: int) -> tuple[KernelFlow, KernelFlow]:
        """Both directions of a session, each with a record; CannotSplice."""
        flows = self.kernel.join(front, back, share)
        self._flows.update((flow.index, flow) for flow in flows)
        return flows

    def source(self, sock: socket.socket) -> KernelFlow:
        """A record for one socket; CannotSplice."""
        flow = self.kernel.source(sock)
        self._flows[flow.index] = flow
        return flow

    def release(self, flows: Iterable[KernelFlow]) -> None:
        """Their sources are about to be closed."""
        for flow in flows:
            self._flows.pop(flow.index, None)
            self.kernel.release((flow,))

    def reap(self) -> int:
        """Compare the kernel's maps with the sessions at hand; entries of nobody, which are deleted."""
        strays = self.kernel.cookies() - {flow.cookie for flow in self._flows.values()}
        if strays:
            _limited.event(logging.ERROR, "splice_strays", count=len(strays))
            self.kernel.forget(strays)
        return len(strays)

    # credit

    def set_budget(self, limit: int, total: int) -> None:
        """As splice_limit and splice_total."""
        self._budget.change(limit, total, self._holders())

    def share(self, newcomers: int) -> int:
        """What each direction may hold when so many more begin; 0: they may not.

        `begin` or, when nothing comes of it, `stop` is to follow.
        """
        now = self._reactor.now
        if now < self._full_until_ns:
            return 0
        share = self._budget.admit(self._holders(), newcomers)
        if not share:
            self._full_until_ns = now + FULL_NS
        return share

    def begin(self, flows: Iterable[KernelFlow], mover: Mover) -> None:
        """From now on the kernel may redirect; `mover` is told."""
        for flow in flows:
            self._moving[flow.index] = (flow, mover)

    def stop(self, flows: Iterable[KernelFlow] = ()) -> None:
        """The opposite; what others may hold grows."""
        for flow in flows:
            self._moving.pop(flow.index, None)
        self._budget.settle(self._holders())

    def _holders(self) -> list[KernelFlow]:
        return [flow for flow, _ in self._moving.values()]

    def _on_bell(self, _mask: int) -> None:
        for index in self.kernel.bell.take():
            entry = self._moving.get(index)
            if entry is None:
                continue
            flow, mover = entry
            try:
                mover.on_passed(flow)
            except Exception:  # costs this session, not the bell of all
                _log.error("splice_failed", exc_info=True)
                mover.end(EndReason.INTERNAL_ERROR)
