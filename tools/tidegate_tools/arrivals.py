"""How many connections a traced service got, by the cheapest count that tells. No I/O.

A program that the kernel runs when a connection is established counts them, but it costs more than the one
that times accept(). What is established is accepted sooner or later, or waits: while every accept is timed,
arrivals follow from that. So the counting program is needed only until the service is known to accept with
the peer's address. Afterwards the kernel's own count for the network namespace tells whether there is more
than that explains, another listener of the cgroup for one, that does not ask: then it is attached again for a
while.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

ENOUGH: Final = 64
"""Connections, all of them timed, after which a service is known to ask for the address."""
RECHECK_NS: Final = 2_000_000_000
"""How long to count again when something is not explained."""
FIRST_PAUSE_NS: Final = 10_000_000_000
LONGEST_PAUSE_NS: Final = 600_000_000_000
"""Between two such times: it may be somebody else's connections, again and again."""


@dataclass(frozen=True, slots=True)
class Look:
    """One look, in the order of reading: what comes first may lack what the later ones have.

    `opened` is what the kernel counted of passive opens where the service listens.
    """

    at_ns: int
    opened: int
    counted: int  # by the program, since it was first attached
    taken: int  # timed accepts
    waiting: int
    taken_after: int
    counted_after: int


class Arrivals:
    """Fed with looks; `counting` says whether the program is wanted until the next one."""

    def __init__(self, first: Look) -> None:
        self.counting = True
        self.arrived = 0  # connections established since the first look
        self.untimed = 0  # of them those accepted without a time, at least
        self._origin = first
        self._base = first  # when counting began
        self._arrived_then = 0
        self._untimed_then = 0
        self._until_ns: int | None = None  # when a recheck ends; None: as many as are enough
        self._pause_ns = FIRST_PAUSE_NS
        self._recheck_ns = 0  # not before this
        self._unexplained = 0  # known by now not to be of the service
        self._settled = False  # between two looks: the next one tells what is not explained

    def settle(self, taken: int, counted: int) -> bool:
        """Between two looks, `taken` read first: whether these tell already that every accept is timed."""
        base = self._base
        arrived = counted - base.counted_after
        # what waited when counting began may be among those taken
        if self.untimed or arrived < ENOUGH or taken - base.taken - base.waiting < arrived:
            return False
        self.counting = False
        self._settled = True
        return True

    def look(self, look: Look) -> None:
        if self.counting:
            self._while_counting(look)
        else:
            self._while_not(look)

    def _while_counting(self, look: Look) -> None:
        base = self._base
        counted = look.counted_after - base.counted_after
        self.arrived = max(self.arrived, self._arrived_then + counted, self._explained(look))
        # what was read later than the count explains too much rather than too little
        untimed = (
            look.counted
            - base.counted_after
            - (look.taken_after - base.taken)
            - (look.waiting - base.waiting)
        )
        self.untimed = max(self.untimed, self._untimed_then + untimed)
        enough = counted >= ENOUGH or (self._until_ns is not None and look.at_ns >= self._until_ns)
        if self.untimed == 0 and enough:
            self.counting = False
            self._unexplained = max(self._unexplained, self._not_explained(look))

    def _while_not(self, look: Look) -> None:
        self.arrived = max(self.arrived, self._explained(look))
        unexplained = self._not_explained(look)
        if self._settled:
            self._settled = False
            self._unexplained = max(self._unexplained, unexplained)
        if unexplained > self._unexplained and look.at_ns >= self._recheck_ns:
            self._recheck_ns = look.at_ns + self._pause_ns
            self._pause_ns = min(2 * self._pause_ns, LONGEST_PAUSE_NS)
            self.counting = True
            self._base = look
            self._arrived_then, self._untimed_then = self.arrived, self.untimed
            self._until_ns = look.at_ns + RECHECK_NS

    def _explained(self, look: Look) -> int:
        """What was accepted or waits came since the first look, or waited then. Never too many."""
        origin = self._origin
        # the second may be the larger one while connections come by the thousand: accepts meanwhile are in it
        return max(
            look.taken + look.waiting - origin.taken_after - origin.waiting,
            look.taken_after - origin.taken_after - origin.waiting,
        )

    def _not_explained(self, look: Look) -> int:
        return look.opened - self._origin.opened - self._explained(look)
