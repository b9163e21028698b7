"""Passive health: what failures of real traffic do to a backend. No clock, no I/O: `now` comes from the
caller.

Two things, as in the field. A failed *connect* makes the backend back off at once, for a random time that
doubles with each further one. `eject` (configured) takes a backend out after so many consecutive failures
of any kind, answers that never came included, each ejection longer than the last (Envoy's outlier
detection: base time x the number of times). After either the backend is on probation: one attempt at a time
until one succeeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from tidegate.cluster.backend import BackendState
from tidegate.config.model import Eject

# First back-off is at most this; a refused connect costs a round trip, so a second of rest is cheap and
# enough.
BACKOFF_BASE_NS = 1_000_000_000
# 1 s doubled six times: a backend that comes back after an hour is found within about a minute.
BACKOFF_MAX_TRIES = 6
# Envoy's max_ejection_time: a grown ejection never outlasts it (a longer configured one stands as it is).
MAX_EJECTION_NS = 300_000_000_000
# At most half of a cluster may be ejected (a single one always may): beyond that the fault is likely ours
# or the clients', and the load of the ejected would break the rest.
MAX_EJECTED_SHARE = 0.5


def backoff_ns(tries: int, rng: Random) -> int:
    """How long to leave a backend alone after `tries` (>= 1) consecutive failed connects.

    Random in the upper half of 1, 2, 4 ... 64 s, so that the workers do not all knock at the same moment.
    """
    ceiling = BACKOFF_BASE_NS << min(tries - 1, BACKOFF_MAX_TRIES)
    return ceiling // 2 + int(rng.random() * (ceiling // 2))


def may_eject(backend: BackendState, members: Sequence[BackendState], now_ns: int) -> bool:
    """Whether ejecting it keeps to the share and leaves another backend that works."""
    ejected = 0
    total = 0
    others = False
    for other in members:
        if other.draining:
            continue
        total += 1
        if other is backend:
            continue
        if other.ejected_until_ns > now_ns:
            ejected += 1
        elif other.usable(now_ns):
            others = True
    return others and ejected + 1 <= max(1, int(total * MAX_EJECTED_SHARE))


def note_failure(
    backend: BackendState, eject: Eject | None, members: Sequence[BackendState], now_ns: int
) -> bool:
    """Count one failure of any kind; True when it led to an ejection (`ejected_until_ns` is then set)."""
    backend.failures += 1
    backend.failures_total += 1
    if eject is None or backend.ejected_until_ns > now_ns:
        return False
    # The count is not reset by an ejection but by a success: one more failure after it ejects again.
    if backend.failures < eject.failures or not may_eject(backend, members, now_ns):
        return False
    quiet_ns = now_ns - backend.ejected_until_ns if backend.ejected_until_ns else 0
    # Every `for` spent in service forgives one earlier ejection.
    backend.ejected_times = max(0, backend.ejected_times - quiet_ns // eject.for_ns) + 1
    length = min(eject.for_ns * backend.ejected_times, max(MAX_EJECTION_NS, eject.for_ns))
    backend.ejected_until_ns = now_ns + length
    backend.ejections_total += 1
    backend.probation = True
    return True


def note_connect_failure(backend: BackendState, now_ns: int, rng: Random) -> None:
    """Count a failed connect and start or lengthen the back-off."""
    backend.connect_failures_total += 1
    # Connects that were under way together fail together: one outage must not climb the ladder by all of
    # them.
    if backend.retry_at_ns <= now_ns:
        backend.tries += 1
        backend.retry_at_ns = now_ns + backoff_ns(backend.tries, rng)
        backend.probing_until_ns = 0
    backend.probation = True


def note_success(backend: BackendState) -> bool:
    """It works: forget the back-off and the probation. True when that changes who may be picked.

    An ejection under way runs its time: what succeeds during it was asked before.
    """
    backend.failures = 0
    if not backend.probation:
        return False
    backend.tries = 0
    backend.retry_at_ns = 0
    backend.probing_until_ns = 0
    backend.probation = False
    return True
