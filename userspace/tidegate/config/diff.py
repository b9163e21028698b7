"""What a reload has to do: the difference of two configurations in the operator's words.

Listeners are matched by address first, for the address is the socket and a socket that stays must not be
touched; what is left is matched by name. Files (certificates, answers) are compared by their names only:
their contents are read again by whoever holds them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from tidegate.config import cluster_tables, listener_tables, process_tables
from tidegate.config.model import Backend, Cluster, Config, Listener
from tidegate.config.schema import Reload, Table


@dataclass(frozen=True, slots=True)
class ListenerChange:
    """A listener that stays. `keys` are those that differ, by their names in the file."""

    old: Listener
    new: Listener
    keys: tuple[str, ...]

    @property
    def new_socket(self) -> bool:
        """Whether it needs other sockets; else the old ones stay, with what waits in them."""
        return any(_reload_of(listener_tables.LISTENER, key) is Reload.SOCKET for key in self.keys)

    @property
    def new_backlog(self) -> bool:
        """Whether listen(2) has to be called again on the sockets that stay, which changes their backlog."""
        return "backlog" in self.keys and not self.new_socket


@dataclass(frozen=True, slots=True)
class ClusterChange:
    """A cluster that stays. Backends are the same when their addresses are."""

    old: Cluster
    new: Cluster
    keys: tuple[str, ...]

    @property
    def backends_added(self) -> tuple[Backend, ...]:
        known = {backend.address for backend in self.old.backends}
        return tuple(backend for backend in self.new.backends if backend.address not in known)

    @property
    def backends_removed(self) -> tuple[Backend, ...]:
        known = {backend.address for backend in self.new.backends}
        return tuple(backend for backend in self.old.backends if backend.address not in known)


@dataclass(frozen=True, slots=True)
class Changes:
    """Everything that differs. `process` keys take effect live, `restart` keys only with a new process."""

    listeners_added: tuple[Listener, ...] = ()
    listeners_removed: tuple[Listener, ...] = ()
    listeners_changed: tuple[ListenerChange, ...] = ()
    clusters_added: tuple[Cluster, ...] = ()
    clusters_removed: tuple[Cluster, ...] = ()
    clusters_changed: tuple[ClusterChange, ...] = ()
    process: tuple[str, ...] = ()
    restart: tuple[str, ...] = ()

    @property
    def any(self) -> bool:
        return any(getattr(self, field.name) for field in fields(self))

    @property
    def kept(self) -> list[str]:
        """One phrase per key that has changed in the file alone."""
        return [f"{key} keeps its old value until a restart" for key in self.restart]

    def describe(self) -> list[str]:
        """One phrase per change that takes effect, for the log and for the answer to `tidegate reload`."""
        said = [f"listener {item.name} added" for item in self.listeners_added]
        said += [f"listener {item.name} removed" for item in self.listeners_removed]
        for change in self.listeners_changed:
            said.append(f"listener {change.new.name}: {', '.join(change.keys)}")
        said += [f"cluster {cluster.name} added" for cluster in self.clusters_added]
        said += [f"cluster {cluster.name} removed" for cluster in self.clusters_removed]
        for cluster_change in self.clusters_changed:
            said.append(f"cluster {cluster_change.new.name}: {', '.join(cluster_change.keys)}")
        said += [f"{key} changed" for key in self.process]
        return said


def changes(old: Config, new: Config) -> Changes:
    """What it takes to come from `old` to `new`."""
    pairs, removed, added = _match_listeners(old.listeners, new.listeners)
    listeners = [ListenerChange(a, b, _differing(listener_tables.LISTENER, a, b)) for a, b in pairs]
    before = {cluster.name: cluster for cluster in old.clusters}
    after = {cluster.name: cluster for cluster in new.clusters}
    clusters = [
        ClusterChange(
            before[name], after[name], _differing(cluster_tables.CLUSTER, before[name], after[name])
        )
        for name in after
        if name in before
    ]
    own = [key for key in _differing(process_tables.PROCESS, old, new) if key not in ("listener", "cluster")]
    restart = [key for key in own if _reload_of(process_tables.PROCESS, key) is Reload.RESTART]
    return Changes(
        listeners_added=tuple(added),
        listeners_removed=tuple(removed),
        listeners_changed=tuple(change for change in listeners if change.keys),
        clusters_added=tuple(cluster for name, cluster in after.items() if name not in before),
        clusters_removed=tuple(cluster for name, cluster in before.items() if name not in after),
        clusters_changed=tuple(change for change in clusters if change.keys),
        process=tuple(key for key in own if key not in restart),
        restart=tuple(restart),
    )


def _match_listeners(
    old: tuple[Listener, ...], new: tuple[Listener, ...]
) -> tuple[list[tuple[Listener, Listener]], list[Listener], list[Listener]]:
    """Pairs that stay, then what goes, then what comes."""
    gone = {listener.address: listener for listener in old}
    matched: dict[int, Listener] = {}
    for index, listener in enumerate(new):
        if listener.address in gone:
            matched[index] = gone.pop(listener.address)
    by_name = {listener.name: listener for listener in gone.values()}
    for index, listener in enumerate(new):
        if index not in matched and listener.name in by_name:
            matched[index] = by_name.pop(listener.name)
    pairs = [(matched[index], listener) for index, listener in enumerate(new) if index in matched]
    added = [listener for index, listener in enumerate(new) if index not in matched]
    return pairs, list(by_name.values()), added


def _differing(table: Table, old: object, new: object) -> tuple[str, ...]:
    return tuple(key.name for key in table.keys if getattr(old, key.attribute) != getattr(new, key.attribute))


def _reload_of(table: Table, name: str) -> Reload:
    key = table.key(name)
    assert key is not None  # the names come from the table
    return key.reload
