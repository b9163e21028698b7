"""A cluster as one worker sees it: its backends, who may be picked, and the policy that picks.

Who may be picked, in this order; the first that is not empty counts, also when everything in it is excluded:
  1. backends that are up, not ejected, not backing off and not draining;
  2. fail-open: backends the health check calls up, back-off and ejections disregarded;
  3. fail-open: all that are not draining. An attempt that may fail is better than a refusal that must, and
     a health check that fails everywhere is more often a broken check than a cluster that died at once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable
from enum import StrEnum
from random import Random

from tidegate import logs
from tidegate.cluster.backend import BackendState, is_name
from tidegate.cluster.ejection import note_connect_failure, note_failure, note_success
from tidegate.cluster.policies import ConsistentHash, make_policy
from tidegate.config import model

# Later than any CLOCK_MONOTONIC reading: "nothing to look at again".
_NEVER = 1 << 63
# A probing attempt that has not reported back by then is taken for lost and another one is let through.
PROBE_NS = 1_000_000_000
# Of each event, per cluster and worker: a cluster that flaps must not fill a disk.
LOG_LINES_PER_SECOND = 5

_logger = logging.getLogger("tidegate.cluster")


class ClusterEvent(StrEnum):
    """What is told to the `on_event` callback, or, without one, logged."""

    BACKEND_DOWN = "backend_down"  # by health check
    BACKEND_UP = "backend_up"
    BACKEND_FAILING = "backend_failing"  # first failed connect after working
    BACKEND_RECOVERED = "backend_recovered"  # works again after failing or ejection
    BACKEND_EJECTED = "backend_ejected"
    BACKEND_ADDED = "backend_added"
    BACKEND_DRAINING = "backend_draining"
    FAIL_OPEN = "cluster_fail_open"  # nobody is usable: any backend is tried
    FAIL_OPEN_OVER = "cluster_recovered"


BAD_NEWS = frozenset(
    {
        ClusterEvent.BACKEND_DOWN,
        ClusterEvent.BACKEND_FAILING,
        ClusterEvent.BACKEND_EJECTED,
        ClusterEvent.FAIL_OPEN,
    }
)

OnEvent = Callable[[ClusterEvent, BackendState | None], None]
MemberKey = tuple[model.Address, model.Address]


class ClusterState:
    """One worker's state of one cluster. Not thread-safe; `now` returns CLOCK_MONOTONIC ns.

    A host-name backend has one `BackendState` per address it resolved to (each with the backend's weight);
    until `set_addresses` names some it has none.
    """

    __slots__ = (
        "_choose",
        "_leaving",
        "_log",
        "_members",
        "_now",
        "_policy",
        "_recheck_ns",
        "_resolved",
        "_unasked",
        "_usable",
        "backends",
        "config",
        "fail_open",
        "on_change",
        "on_event",
        "rng",
    )

    def __init__(
        self,
        config: model.Cluster,
        rng: Random | None = None,
        now: Callable[[], int] = time.monotonic_ns,
        on_event: OnEvent | None = None,
    ) -> None:
        self.config = config
        self.backends: list[BackendState] = []  # all but the draining, in configuration order
        self.fail_open = False
        self.on_event = on_event
        self.on_change: list[Callable[[], None]] = []  # called after backends came, went or changed
        self._log = logs.RateLimited(_logger, LOG_LINES_PER_SECOND, now)
        self.rng = rng if rng is not None else Random()
        self._now = now
        self._policy = make_policy(config.balance, self.rng)
        self._choose = self._policy.choose
        self._members: dict[MemberKey, BackendState] = {}
        self._leaving: dict[MemberKey, BackendState] = {}
        self._resolved: dict[model.Address, tuple[model.Address, ...]] = {}
        self._usable: list[BackendState] = []
        self._recheck_ns = 0  # when `_usable` must be worked out again; 0 = at the next pick
        self._unasked = set(self.names())  # of the first configuration, not resolved yet
        self._sync(self._origins())

    # -- picking -----------------------------------------------------------------------------------

    def pick(
        self, exclude: Collection[BackendState] = (), key: bytes | None = None, now_ns: int | None = None
    ) -> BackendState | None:
        """A backend for one connection or request, or None when there is none outside `exclude`.

        `key` is what "hash" hashes (the client's address, say); other policies ignore it, and without it
        "hash" falls back to two random choices. Nothing is reserved: call `acquired` before the next pick.
        """
        if now_ns is None:
            now_ns = self._now()
        if now_ns >= self._recheck_ns:
            self._refresh(now_ns)
        if not self._usable:
            return None
        if exclude:
            some = [backend for backend in self._usable if backend not in exclude]
            if not some:
                return None
            backend = self._policy.choose_from(some, key)
        else:
            backend = self._choose(key)
        if backend.probation and not self.fail_open:
            backend.probing_until_ns = now_ns + PROBE_NS
            self._recheck_ns = 0
        return backend

    def has_other(self, exclude: Collection[BackendState], now_ns: int) -> bool:
        """Whether `pick` would find someone outside `exclude`; changes nothing."""
        if now_ns >= self._recheck_ns:
            self._refresh(now_ns)
        return any(backend not in exclude for backend in self._usable)

    def pickable(self, backend: BackendState, now_ns: int) -> bool:
        """Whether `pick` could return this very backend now."""
        if now_ns >= self._recheck_ns:
            self._refresh(now_ns)
        return backend in self._usable

    def acquired(self, backend: BackendState) -> None:
        """A session or request now uses it; paired with exactly one `released`."""
        backend.active += 1

    def released(self, backend: BackendState) -> None:
        """The session or request has ended, whatever way. Raises ValueError without a matching `acquired`."""
        if backend.active < 1:
            raise ValueError(f"{backend.name} released more often than acquired")
        backend.active -= 1
        if backend.draining and not backend.active:
            self._forget(backend)

    def connect_started(self, backend: BackendState) -> None:
        """A connect is under way; paired with exactly one `connect_ended`.

        A gauge only: balancing uses `active`.
        """
        backend.connecting += 1

    def connect_ended(self, backend: BackendState, established: bool) -> None:
        """The connect is over: established, failed, or given up because the client left."""
        if backend.connecting < 1:
            raise ValueError(f"{backend.name} ended more connects than it began")
        backend.connecting -= 1
        if established:
            backend.connections_total += 1

    # -- what traffic tells ------------------------------------------------------------------------

    def connect_failed(self, backend: BackendState, now_ns: int | None = None) -> None:
        """A connect was refused, unreachable or timed out. Does not release: call `released` as always."""
        if now_ns is None:
            now_ns = self._now()
        first = not backend.probation
        self._failure(backend, now_ns)
        note_connect_failure(backend, now_ns, self.rng)
        self._recheck_ns = 0
        if first:
            self._tell(ClusterEvent.BACKEND_FAILING, backend)

    def failed(self, backend: BackendState, now_ns: int | None = None) -> None:
        """Connected, but no good answer (timeout, reset, garbage): counts towards `eject` only."""
        self._failure(backend, self._now() if now_ns is None else now_ns)

    def succeeded(self, backend: BackendState, now_ns: int | None = None) -> None:
        """It did its work: tcp, the connect was established; http, a whole response head came."""
        if note_success(backend):
            self._recheck_ns = 0
            self._tell(ClusterEvent.BACKEND_RECOVERED, backend)

    def _failure(self, backend: BackendState, now_ns: int) -> None:
        if note_failure(backend, self.config.eject, self.backends, now_ns):
            self._recheck_ns = 0
            self._tell(ClusterEvent.BACKEND_EJECTED, backend)

    # -- what others tell --------------------------------------------------------------------------

    def set_health(self, backend: BackendState, up: bool) -> None:
        """The active health check's verdict.

        Coming up forgets passive failures: the check has just seen it work.
        """
        if backend.up == up:
            return
        backend.up = up
        if up:
            note_success(backend)
            backend.ejected_until_ns = 0
        self._recheck_ns = 0
        self._tell(ClusterEvent.BACKEND_UP if up else ClusterEvent.BACKEND_DOWN, backend)

    def set_addresses(self, origin: model.Address, addresses: Iterable[model.Address]) -> None:
        """What a host-name backend resolves to now; an empty answer keeps the last good one."""
        fresh = tuple(sorted(set(addresses), key=str))
        if fresh and fresh != self._resolved.get(origin):
            self._resolved[origin] = fresh
            # The first answer to a name that was there from the beginning adds nobody.
            self._sync({origin} if origin in self._unasked else ())
            self._unasked.discard(origin)

    def names(self) -> list[model.Address]:
        """The configured host-name backends: what a resolver has to look up."""
        return [backend.address for backend in self.config.backends if is_name(backend.address)]

    def reconfigure(self, config: model.Cluster) -> None:
        """Take over a new configuration: who stays keeps its state, the new are added, the removed drain."""
        if config.balance is not self.config.balance:
            self._policy = make_policy(config.balance, self.rng)
            self._choose = self._policy.choose
        if config.health is None and self.config.health is not None:
            for backend in self.backends:
                backend.up = True  # nobody is left who could say otherwise
        if config.eject is None:
            for backend in self.backends:
                backend.ejected_until_ns = 0
        known = self._origins()  # back from drain or maintenance is not new
        self.config = config
        named = set(self.names())
        self._resolved = {origin: found for origin, found in self._resolved.items() if origin in named}
        self._unasked &= named
        self._sync(known)

    def draining(self) -> list[BackendState]:
        """Removed backends that still carry something."""
        return list(self._leaving.values())

    @property
    def active(self) -> int:
        """Sessions or requests on this cluster, draining backends included."""
        return sum(b.active for b in self.backends) + sum(b.active for b in self._leaving.values())

    # -- inside ------------------------------------------------------------------------------------

    def _wanted(self) -> Iterable[tuple[MemberKey, int, int]]:
        for index, backend in enumerate(self.config.backends):
            if backend.mode is not model.BackendMode.READY:
                continue
            origin = backend.address
            found = self._resolved.get(origin, ()) if is_name(origin) else (origin,)
            for address in found:
                yield (origin, address), backend.weight, index

    def _origins(self) -> set[model.Address]:
        return {backend.address for backend in self.config.backends}

    def _sync(self, silent: Collection[model.Address]) -> None:
        """Make the members what configuration and resolver say, keeping the state of those that stay.

        `silent`: what these configured addresses stand for is not told as added.
        """
        before = self._members
        self._members = {}
        for key, weight, index in self._wanted():
            backend = before.pop(key, None) or self._leaving.pop(key, None)
            if backend is None:
                origin, address = key
                backend = BackendState(address, weight, index, origin)
                if origin not in silent:
                    self._tell(ClusterEvent.BACKEND_ADDED, backend)
            backend.weight = weight
            backend.index = index
            backend.draining = False
            self._members[key] = backend
        for key, backend in before.items():
            backend.draining = True
            self._tell(ClusterEvent.BACKEND_DRAINING, backend)
            if backend.active:
                self._leaving[key] = backend
        self.backends = list(self._members.values())
        if isinstance(self._policy, ConsistentHash):
            self._policy.members(self.backends)
        self._recheck_ns = 0
        for changed in list(self.on_change):
            changed()

    def _forget(self, backend: BackendState) -> None:
        self._leaving.pop((backend.origin, backend.address), None)

    def _refresh(self, now_ns: int) -> None:
        usable = [backend for backend in self.backends if backend.usable(now_ns)]
        fail_open = not usable and bool(self.backends)
        if fail_open:
            usable = [backend for backend in self.backends if backend.up] or list(self.backends)
        self._usable = usable
        self._recheck_ns = min(
            (until for backend in self.backends if backend.up and (until := backend.out_until_ns()) > now_ns),
            default=_NEVER,
        )
        if usable:
            self._policy.rebuild(usable)
        if fail_open != self.fail_open:
            self.fail_open = fail_open
            self._tell(ClusterEvent.FAIL_OPEN if fail_open else ClusterEvent.FAIL_OPEN_OVER, None)

    def _tell(self, event: ClusterEvent, backend: BackendState | None) -> None:
        if self.on_event is not None:
            self.on_event(event, backend)
            return
        self._log.event(
            logging.WARNING if event in BAD_NEWS else logging.INFO,
            event.value,
            cluster=self.config.name,
            backend=backend.name if backend is not None else None,
            check=(backend.last_check or None) if backend is not None else None,
        )
