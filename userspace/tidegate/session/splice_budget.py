"""How much the spliced directions of a worker may hold in the kernel, all together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Protocol

# Less credit than this is worth less than a copy: no further session is handed over then.
LEAST: Final = 128 * 1024


class Holder(Protocol):
    @property
    def held(self) -> int: ...


class Budget:
    """Equal shares of a total, none above the limit of one direction.

    A share that shrinks does not take back what a direction holds already, so a newcomer is admitted only if
    the sum of what each holds, or may hold from now on, stays within the total.
    """

    def __init__(self, limit: int, total: int) -> None:
        """Bytes: per direction and in all."""
        self.limit = limit
        self.total = total

    def share(self, directions: int) -> int:
        """What each of so many may hold."""
        return min(self.limit, self.total // max(1, directions))

    def admit(self, holders: Iterable[Holder], newcomers: int = 2) -> int:
        """The share of each when so many more join those at hand; 0: they may not."""
        at_hand = list(holders)
        share = self.share(len(at_hand) + newcomers)
        if share < min(LEAST, self.limit):
            return 0
        return share if self._fits(share, at_hand, newcomers) else 0

    def raised(self, holders: Iterable[Holder]) -> int:
        """The share of each when some have left; 0: as it is, for others hold more than theirs."""
        at_hand = list(holders)
        share = self.share(len(at_hand))
        return share if self._fits(share, at_hand, 0) else 0

    def _fits(self, share: int, at_hand: list[Holder], newcomers: int) -> bool:
        if share == self.limit and (len(at_hand) + newcomers) * share <= self.total:
            return True  # none ever held more
        return sum(max(share, holder.held) for holder in at_hand) + newcomers * share <= self.total
