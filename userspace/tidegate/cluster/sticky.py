"""Sticky sessions: a cookie names the backend that a client was first given.

The value is an opaque id, the same in every worker, after every restart and on every tidegate with the same
cluster name and backend address. It is a keyed hash, so it does not show the address; whoever knows the
addresses in question can still find out which one an id stands for, unless a `secret` is given. An id that
is unknown, or whose backend cannot be picked now, falls back to balancing, and the client gets a new
cookie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection

from tidegate.cluster.backend import BackendState
from tidegate.cluster.balance import ClusterState

# 64 bits: among 1,000 backends two share an id with a probability of 3e-14.
_ID_BYTES = 8


def sticky_id(cluster: str, backend: str, secret: bytes = b"") -> bytes:
    """The cookie value of a backend, 16 hex digits. `backend` is its address in configuration form."""
    text = f"{cluster}\0{backend}".encode()
    digest = hashlib.blake2b(text, digest_size=_ID_BYTES, key=secret[:64], person=b"tidegate sticky")
    return digest.hexdigest().encode()


class Sticky:
    """Cookie value <-> backend for one cluster, kept up to date with it."""

    __slots__ = ("_by_id", "_cluster", "_ids", "_secret")

    def __init__(self, cluster: ClusterState, secret: bytes = b"") -> None:
        self._cluster = cluster
        self._secret = secret
        self._by_id: dict[bytes, BackendState] = {}
        self._ids: dict[BackendState, bytes] = {}
        self._sync()
        cluster.on_change.append(self._sync)

    def value(self, backend: BackendState) -> bytes:
        """What the cookie says for this backend."""
        known = self._ids.get(backend)
        return known if known is not None else self._make(backend)

    def find(self, value: bytes, now_ns: int) -> BackendState | None:
        """The backend the cookie names, if it can be picked now."""
        backend = self._by_id.get(value)
        return backend if backend is not None and self._cluster.pickable(backend, now_ns) else None

    def pick(
        self,
        value: bytes | None,
        now_ns: int,
        exclude: Collection[BackendState] = (),
        key: bytes | None = None,
    ) -> tuple[BackendState | None, bool]:
        """The backend for a request with this cookie (None: without), and whether to send a (new) cookie."""
        if value is not None:
            backend = self.find(value, now_ns)
            if backend is not None and backend not in exclude:
                return backend, False
        backend = self._cluster.pick(exclude, key, now_ns)
        return backend, backend is not None

    def _make(self, backend: BackendState) -> bytes:
        return sticky_id(self._cluster.config.name, backend.name, self._secret)

    def _sync(self) -> None:
        self._ids = {backend: self._make(backend) for backend in self._cluster.backends}
        self._by_id = {value: backend for backend, value in self._ids.items()}
