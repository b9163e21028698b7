"""How much the spliced directions of a worker may hold in the kernel, all together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

# Less credit than this is worth less than a copy: no further session is handed over then.
LEAST: Final = 128 * 1024


class Holder(Protocol):
    """A direction, as far as its credit goes. Bytes.

    `held` is what it held when something moved last; `in_flight` is what it holds now, and costs a syscall.
    """

    @property
    def held(self) -> int: ...
    def set_limit(self, limit: int) -> None: ...
    def in_flight(self) -> int: ...


class Budget:
    """Equal shares of a total, none above the limit of one direction.

    A share that shrinks does not take back what a direction holds already, so a newcomer is admitted only if
    the sum of what each holds, or may hold from now on, stays within the total.
    """

    def __init__(self, limit: int, total: int) -> None:
        """Bytes: per direction and in all."""
        self.limit = limit
        self.total = total
        self._granted = limit

    def change(self, limit: int, total: int, holders: Sequence[Holder]) -> None:
        """Other limits for those at hand too: less at once, more as `settle`."""
        self.limit = limit
        self.total = total
        self.settle(holders)

    def admit(self, holders: Sequence[Holder], newcomers: int) -> int:
        """The share of each when so many more join those at hand, who have it now; 0: they may not join."""
        share, before = self._share(len(holders) + newcomers), self._granted
        if share < min(LEAST, self.limit):
            return 0
        # first: the kernel goes on meanwhile, and nobody may pass the share while the sum is taken
        self._grant(holders, share)
        if self._sum(holders, share) + newcomers * share <= self.total:
            return share
        self._grant(holders, before)
        return 0

    def settle(self, holders: Sequence[Holder]) -> None:
        """Some left, or did not come after all: the others get more, if nobody holds too much for that."""
        share = self._share(len(holders))
        if share < self._granted or self._sum(holders, share) <= self.total:
            self._grant(holders, share)

    def _share(self, directions: int) -> int:
        return min(self.limit, self.total // max(1, directions))

    @staticmethod
    def _sum(holders: Sequence[Holder], share: int) -> int:
        # who fell silent since may have nothing left of it
        return sum(share if holder.held <= share else max(share, holder.in_flight()) for holder in holders)

    def _grant(self, holders: Sequence[Holder], share: int) -> None:
        self._granted = share
        for holder in holders:
            holder.set_limit(share)
