"""The attempts of one session or request to reach a backend: which next, and when. No I/O, no timers.

Each attempt has `connect_timeout` to itself (as HAProxy's and nginx's have), so a session that uses all its
attempts takes at most (retries + 1) x connect_timeout plus the delays between them. A first retry goes to
another backend at once; later ones, and any that must go to a backend tried before, wait a random, growing
time, so that a cluster that is restarting is not hammered.

    backend = plan.next(now)            # None: no backend at all
    deadline = plan.deadline_ns(now)    # for this connect
    ...                                 # failed: cluster.connect_failed(backend, now), then
    delay = plan.failed(now)            # None: give up; 0: plan.next(now) at once; else after that many ns
"""

from __future__ import annotations

from tidegate.cluster.backend import BackendState
from tidegate.cluster.balance import ClusterState

# First delay is at most this; it doubles. A listener that is being restarted is back within a few of these.
RETRY_DELAY_NS = 100_000_000
# HAProxy's turn-around delay before the same server is tried again, and nobody wants to wait longer for a
# second try.
MAX_RETRY_DELAY_NS = 1_000_000_000


class RetryPlan:
    """Which backend next, and when. One per session; `tried` grows with every attempt."""

    __slots__ = ("_cluster", "_connect_timeout_ns", "_key", "_retries", "attempts", "tried")

    def __init__(self, cluster: ClusterState, key: bytes | None = None) -> None:
        self._cluster = cluster
        self._key = key
        # Taken now: a reload meanwhile does not change the rules for a session under way.
        self._retries = cluster.config.retries
        self._connect_timeout_ns = cluster.config.connect_timeout_ns
        self.attempts = 0
        self.tried: list[BackendState] = []

    @property
    def retries(self) -> int:
        """Attempts made after the first."""
        return max(0, self.attempts - 1)

    def next(self, now_ns: int, prefer: BackendState | None = None) -> BackendState | None:
        """The backend for the next attempt, None when nothing can be picked.

        `prefer` (a sticky cookie's) if it may be picked and was not tried; else one not tried yet; else any.
        """
        if self.attempts > self._retries:
            return None
        cluster = self._cluster
        backend: BackendState | None
        if prefer is not None and prefer not in self.tried and cluster.pickable(prefer, now_ns):
            backend = prefer
        elif self.tried:
            backend = cluster.pick(self.tried, self._key, now_ns) or cluster.pick((), self._key, now_ns)
        else:
            backend = cluster.pick((), self._key, now_ns)
        if backend is not None:
            self.attempts += 1
            self.tried.append(backend)
        return backend

    def deadline_ns(self, now_ns: int) -> int:
        """When the attempt that begins now has taken too long."""
        return now_ns + self._connect_timeout_ns

    def failed(self, now_ns: int) -> int | None:
        """After a failed attempt: ns to wait before `next` (0: at once), or None when it was the last one."""
        if self.attempts > self._retries:
            return None
        if self.attempts == 1 and self._cluster.has_other(self.tried, now_ns):
            return 0
        ceiling = min(
            RETRY_DELAY_NS << min(self.attempts - 1, 16), MAX_RETRY_DELAY_NS, self._connect_timeout_ns
        )
        return ceiling // 2 + int(self._cluster.rng.random() * (ceiling // 2))
