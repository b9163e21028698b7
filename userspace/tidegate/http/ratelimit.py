"""Per-client limits: a token bucket of requests and a count of connections, in bounded tables.

Sans-I/O: the caller passes the clock. Buckets are kept as one number each, the time at which the bucket
would be full again (the virtual scheduling form of GCRA, ITU-T I.371): no refill pass, no float drift.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

from tidegate.http.limits import MAX_CLIENTS

_SECOND_NS: Final = 1_000_000_000


class RequestRate:
    """`rate` requests per second and client, `burst` at once.

    The table forgets buckets that are full again first, then the least recently used: under an attack from
    more addresses than it holds, limits loosen and memory does not grow.
    """

    __slots__ = ("_burst_ns", "_capacity", "_full_at", "_interval_ns")

    def __init__(self, rate: int, burst: int, capacity: int = MAX_CLIENTS) -> None:
        """`rate`: requests per second, above 0. `burst`: at least 1 is used; 0 means one second's worth."""
        if rate <= 0:
            raise ValueError("rate must be positive")
        self._interval_ns = _SECOND_NS // rate or 1
        self._burst_ns = (burst or rate) * self._interval_ns
        self._capacity = capacity
        self._full_at: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, client: Hashable, now_ns: int) -> int:
        """0 if a request is within the limit, else nanoseconds until one would be (Retry-After)."""
        table = self._full_at
        full_at = table.pop(client, 0)
        if full_at < now_ns:
            full_at = now_ns
        full_at += self._interval_ns
        wait = full_at - now_ns - self._burst_ns
        if wait > 0:
            full_at -= self._interval_ns
        if len(table) >= self._capacity:
            self._evict(now_ns)
        table[client] = full_at
        return wait if wait > 0 else 0

    def _evict(self, now_ns: int) -> None:
        """Make room for one; looks at few entries, so that a full table costs no pass over it."""
        table = self._full_at
        # Insertion order is use order: the first is the least recently used.
        oldest = []
        for client in table:
            oldest.append(client)
            if len(oldest) == 8:
                break
        full = [client for client in oldest if table[client] <= now_ns]
        for client in full or oldest[:1]:
            del table[client]


class ConnectionCount:
    """At most `limit` connections per client and worker; bounded by the connections there are."""

    __slots__ = ("_counts", "_limit")

    def __init__(self, limit: int) -> None:
        if limit <= 0:
            raise ValueError("limit must be positive")
        self._limit = limit
        self._counts: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def enter(self, client: Hashable) -> bool:
        """Count one more; False, uncounted, when the client has its fill. Each True wants one leave()."""
        count = self._counts.get(client, 0)
        if count >= self._limit:
            return False
        self._counts[client] = count + 1
        return True

    def leave(self, client: Hashable) -> None:
        count = self._counts[client]
        if count == 1:
            del self._counts[client]
        else:
            self._counts[client] = count - 1


def retry_after_s(wait_ns: int) -> int:
    """Whole seconds for Retry-After, never too few."""
    return max(-(-wait_ns // _SECOND_NS), 1)
