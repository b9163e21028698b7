"""Balancing policies: which of several usable backends gets the next connection.

A policy is told the usable backends whenever they change (`rebuild`) and then chooses among them
(`choose`), or among an ad hoc part of them (`choose_from`, for retries that exclude what was tried). It is
never asked to choose from nothing. No policy reads a clock or touches a socket.
"""

from __future__ import annotations

import hashlib
import math
import sys
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from random import Random
from typing import Protocol

from tidegate.cluster.backend import BackendState
from tidegate.config.model import Balance

# Weights whose least common multiple stays below this compare exactly; beyond it the error is under 2**-40.
_MAX_COST = 1 << 48

# Slots of the hash table. A slot is the unit that moves when backends change; with n backends each holds
# about SLOTS/n, so their shares differ by about sqrt(n/SLOTS): 1.6 % for 4 backends, 8 % for 100.
HASH_SLOTS = 16384
_SLOT_MASK = HASH_SLOTS - 1
# How many places of a slot's order are remembered; all of them are unusable at once only in an outage.
_REMEMBERED = 8


class BalancePolicy(Protocol):
    def rebuild(self, usable: Sequence[BackendState]) -> None:
        """These, and no others, may be chosen from now on; not empty."""

    def choose(self, key: bytes | None) -> BackendState: ...

    def choose_from(self, some: Sequence[BackendState], key: bytes | None) -> BackendState:
        """Choose among `some`, a non-empty part of the usable ones."""


def smooth_weighted(backends: Sequence[BackendState]) -> BackendState:
    """One step of nginx's smooth weighted round robin (ngx_http_upstream_round_robin.c, since 1.3.1).

    Weights 5, 1, 1 give a a b a c a a rather than a a a a a b c.
    """
    total = 0
    best: BackendState | None = None
    high = 0
    for backend in backends:
        weight = backend.weight
        total += weight
        current = backend.wrr_current = backend.wrr_current + weight
        if best is None or current > high:
            best = backend
            high = current
    assert best is not None
    best.wrr_current = high - total
    return best


def _same_weights(backends: Sequence[BackendState]) -> bool:
    return all(backend.weight == backends[0].weight for backend in backends)


def _set_costs(backends: Sequence[BackendState]) -> None:
    """Make `active * cost` comparable: proportional to active / weight, in integers."""
    common = math.lcm(*(backend.weight for backend in backends))
    if common > _MAX_COST:
        common = _MAX_COST
    for backend in backends:
        backend.cost = common // backend.weight


class RoundRobin:
    """Smooth weighted round robin.

    Each worker starts elsewhere, so that N workers do not all begin at the first.
    """

    __slots__ = ("_cursor", "_even", "_usable")

    def __init__(self, rng: Random) -> None:
        self._usable: list[BackendState] = []
        self._even = True
        self._cursor = rng.randrange(1 << 16)

    def rebuild(self, usable: Sequence[BackendState]) -> None:
        first = not self._usable
        self._usable = list(usable)
        self._even = _same_weights(usable)
        if first and not self._even:
            for _ in range(self._cursor % min(sum(b.weight for b in usable), 1024)):
                smooth_weighted(self._usable)

    def choose(self, key: bytes | None) -> BackendState:
        usable = self._usable
        if not self._even:
            return smooth_weighted(usable)
        cursor = self._cursor + 1
        if cursor >= len(usable):
            cursor = cursor % len(usable)
        self._cursor = cursor
        return usable[cursor]

    def choose_from(self, some: Sequence[BackendState], key: bytes | None) -> BackendState:
        if not self._even:
            return smooth_weighted(some)
        self._cursor += 1
        return some[self._cursor % len(some)]


class WeightedRandom:
    """Each backend with a probability proportional to its weight."""

    __slots__ = ("_random", "_sums", "_total", "_usable")

    def __init__(self, rng: Random) -> None:
        self._random = rng.random
        self._usable: list[BackendState] = []
        self._sums: list[int] = []
        self._total = 0

    def rebuild(self, usable: Sequence[BackendState]) -> None:
        self._usable = list(usable)
        self._sums = list(accumulate(backend.weight for backend in usable))
        self._total = self._sums[-1]

    def choose(self, key: bytes | None) -> BackendState:
        return self._usable[bisect_right(self._sums, int(self._random() * self._total))]

    def choose_from(self, some: Sequence[BackendState], key: bytes | None) -> BackendState:
        sums = list(accumulate(backend.weight for backend in some))
        return some[bisect_right(sums, int(self._random() * sums[-1]))]


class LeastConnections:
    """The smallest active / weight; ties go round (by weight when the weights differ, as nginx's
    least_conn does).
    """

    __slots__ = ("_cursor", "_even", "_ring", "_usable")

    def __init__(self, rng: Random) -> None:
        self._usable: list[BackendState] = []
        self._ring: list[BackendState] = []  # twice over: any rotation is one slice
        self._even = True
        self._cursor = rng.randrange(1 << 16)

    def rebuild(self, usable: Sequence[BackendState]) -> None:
        self._usable = list(usable)
        self._ring = [*usable, *usable]
        self._even = _same_weights(usable)
        _set_costs(usable)

    def choose(self, key: bytes | None) -> BackendState:
        count = len(self._usable)
        cursor = self._cursor = (self._cursor + 1) % count
        if not self._even:
            return self._by_weight(self._usable)
        rotation = self._ring[cursor : cursor + count]
        best = rotation[0]
        low = best.active
        if not low:
            return best
        for backend in rotation:
            if backend.active < low:
                low = backend.active
                best = backend
        return best

    def choose_from(self, some: Sequence[BackendState], key: bytes | None) -> BackendState:
        if not self._even:
            return self._by_weight(some)
        self._cursor += 1
        start = self._cursor % len(some)
        return min([*some[start:], *some[:start]], key=lambda backend: backend.active)

    @staticmethod
    def _by_weight(some: Sequence[BackendState]) -> BackendState:
        low = -1
        ties: list[BackendState] = []
        for backend in some:
            load = backend.active * backend.cost
            if load < low or low < 0:
                low = load
                ties = [backend]
            elif load == low:
                ties.append(backend)
        return ties[0] if len(ties) == 1 else smooth_weighted(ties)


class TwoChoices:
    """The less loaded of two random backends (Mitzenmacher 2001, "The Power of Two Choices in Randomized
    Load Balancing").

    Candidates are drawn by weight and compared by active / weight: idle, the shares are those of the
    weights, and under load nobody herds onto the one backend that looked empty to every worker.
    """

    __slots__ = ("_count", "_even", "_random", "_sums", "_total", "_usable")

    def __init__(self, rng: Random) -> None:
        self._random = rng.random
        self._usable: list[BackendState] = []
        self._count = 0
        self._even = True
        self._sums: list[int] = []
        self._total = 0

    def rebuild(self, usable: Sequence[BackendState]) -> None:
        self._usable = list(usable)
        self._count = len(usable)
        self._even = _same_weights(usable)
        self._sums = list(accumulate(backend.weight for backend in usable))
        self._total = self._sums[-1]
        _set_costs(usable)

    def choose(self, key: bytes | None) -> BackendState:
        usable = self._usable
        count = self._count
        if count == 1:
            return usable[0]
        random = self._random
        if self._even:
            first = int(random() * count)
            second = int(random() * (count - 1))
            if second >= first:
                second += 1
            one = usable[first]
            other = usable[second]
            return other if other.active < one.active else one
        return self._weighted(usable, self._sums, self._total)

    def choose_from(self, some: Sequence[BackendState], key: bytes | None) -> BackendState:
        if len(some) == 1:
            return some[0]
        sums = list(accumulate(backend.weight for backend in some))
        return self._weighted(some, sums, sums[-1])

    def _weighted(self, some: Sequence[BackendState], sums: Sequence[int], total: int) -> BackendState:
        first = bisect_right(sums, int(self._random() * total))
        one = some[first]
        # The second by weight among the others: a draw from the total less the first's own stretch.
        point = int(self._random() * (total - one.weight))
        if point >= sums[first] - one.weight:
            point += one.weight
        other = some[bisect_right(sums, point)]
        return other if other.active * other.cost < one.active * one.cost else one


class ConsistentHash:
    """Weighted rendezvous hashing over a fixed table of slots: the same key finds the same backend in every
    worker.

    A key falls into a slot; a slot ranks all backends by score = weight / -ln(u), u a number in (0, 1)
    drawn from the hash of backend and slot (rendezvous: Thaler and Ravishankar 1998; the weighted score:
    Schindelhauer and Schomaker 2005; ranking table rows instead of keys: GitHub's GLB director). Removing a
    backend moves only the keys it had, adding one takes only what it wins, a change of weight moves only
    towards the one that gained. Ranks are worked out when a slot is first asked for; an unusable backend is
    skipped along the rank, so that its going down and up disturbs nobody else's keys.
    """

    __slots__ = ("_draws", "_fallback", "_members", "_orders", "_usable_set")

    def __init__(self, rng: Random) -> None:
        self._fallback = TwoChoices(rng)
        self._draws: dict[str, array[int]] = {}  # backend name -> one 32-bit draw per slot
        self._members: list[BackendState] = []
        self._orders: dict[int, list[BackendState]] = {}
        self._usable_set: frozenset[BackendState] = frozenset()

    def members(self, backends: Sequence[BackendState]) -> None:
        """All backends of the cluster, usable or not: ranks are among these."""
        known = self._draws
        self._draws = {b.name: known.get(b.name) or _draws(b.name) for b in backends}
        self._members = list(backends)
        self._orders = {}

    def rebuild(self, usable: Sequence[BackendState]) -> None:
        self._usable_set = frozenset(usable)
        self._fallback.rebuild(usable)

    def choose(self, key: bytes | None) -> BackendState:
        if key is None:
            return self._fallback.choose(None)
        return self._first(_slot(key), self._usable_set)

    def choose_from(self, some: Sequence[BackendState], key: bytes | None) -> BackendState:
        if key is None:
            return self._fallback.choose_from(some, None)
        return self._first(_slot(key), frozenset(some))

    def _first(self, slot: int, allowed: frozenset[BackendState]) -> BackendState:
        order = self._orders.get(slot)
        if order is None:
            order = self._orders[slot] = self._rank(slot)[:_REMEMBERED]
        for backend in order:
            if backend in allowed:
                return backend
        return next(backend for backend in self._rank(slot) if backend in allowed)

    def _rank(self, slot: int) -> list[BackendState]:
        draws = self._draws

        def rank(backend: BackendState) -> float:
            # -ln(u) / weight is an exponential of rate weight: the smallest wins with probability weight /
            # total.
            return -math.log((draws[backend.name][slot] + 0.5) / 4294967296.0) / backend.weight

        return sorted(self._members, key=rank)


def _slot(key: bytes) -> int:
    # Not hash(): it is salted per process, and every worker, now and after a restart, must agree.
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") & _SLOT_MASK


def _draws(name: str) -> array[int]:
    """HASH_SLOTS numbers below 2**32 that depend on the name alone, not on the machine's byte order."""
    draws = array("I", hashlib.shake_128(name.encode()).digest(HASH_SLOTS * 4))
    if sys.byteorder == "big":
        draws.byteswap()
    return draws


def make_policy(balance: Balance, rng: Random) -> BalancePolicy:
    """The policy of that name; `rng` gives it its starting point and its draws."""
    return _POLICIES[balance](rng)


_POLICIES: dict[Balance, Callable[[Random], BalancePolicy]] = {
    Balance.ROUND_ROBIN: RoundRobin,
    Balance.RANDOM: WeightedRandom,
    Balance.LEAST_CONNECTIONS: LeastConnections,
    Balance.P2C: TwoChoices,
    Balance.HASH: ConsistentHash,
}
