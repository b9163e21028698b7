"""Changes at runtime: a new configuration derived from the one in force, applied as a reload applies one.

So every worker gets it, replacements forked later inherit it, and a reload, which starts from the file
again, undoes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tidegate import logs
from tidegate.config import cluster_tables, listener_tables, pending, process_tables
from tidegate.config.composite import read_value
from tidegate.config.diff import changes
from tidegate.config.lines import scan
from tidegate.config.model import Backend, BackendMode, Cluster, Config, Listener
from tidegate.config.schema import Kind, Reading, Spot
from tidegate.control.protocol import ErrorCode, VerbError
from tidegate.control.server import Args, Reply
from tidegate.errors import OperatorError
from tidegate.loop.timers import Timer
from tidegate.supervisor.queries import Answers

if TYPE_CHECKING:
    from tidegate.supervisor.supervisor import Supervisor

ADMISSION_KEYS: Final = ("stale_after", "policy", "max_connections", "accept_queue", "when_queue_full")
STATE_VERSION: Final = 1
# A worker that has not applied a change by then hangs; it will when it wakes.
ACK_LIMIT_NS: Final = 1_500_000_000

# configurations from configurations


def read_key(kind: Kind, name: str, value: object, raw: dict[str, Any]) -> Any:
    """A value by the rules of the configuration file; `raw` is a document that holds it in its place.

    Raises VerbError with the words the file's reader would use.
    """
    reading = Reading("control", Path("/"), scan(""))
    spot = Spot(reading)
    read = read_value(kind, value, spot.at(name))
    if reading.errors:
        raise VerbError(ErrorCode.BAD_ARGUMENT, _said(reading))
    pending.check(raw, spot)
    if reading.errors:
        raise VerbError(ErrorCode.NOT_BUILT, _said(reading))
    return read


def _said(reading: Reading) -> str:
    error = reading.errors[0]
    return f"{error.message}: {error.fix}" if error.fix else error.message


def find_cluster(config: Config, name: str) -> Cluster:
    """Raises VerbError(not_found)."""
    for cluster in config.clusters:
        if cluster.name == name:
            return cluster
    raise VerbError(ErrorCode.NOT_FOUND, f"there is no cluster {name!r}")


def find_backend(cluster: Cluster, address: str) -> Backend:
    """Raises VerbError(not_found)."""
    for backend in cluster.backends:
        if str(backend.address) == address:
            return backend
    known = ", ".join(str(backend.address) for backend in cluster.backends)
    raise VerbError(
        ErrorCode.NOT_FOUND, f"cluster {cluster.name} has no backend {address!r} (it has: {known})"
    )


def with_cluster(config: Config, cluster: Cluster) -> Config:
    return replace(
        config, clusters=tuple(cluster if one.name == cluster.name else one for one in config.clusters)
    )


def with_backend(config: Config, cluster: str, address: str, **change: Any) -> Config:
    """One backend changed. Raises VerbError(not_found)."""
    owner = find_cluster(config, cluster)
    old = find_backend(owner, address)
    new = replace(old, **change)
    return with_cluster(
        config, replace(owner, backends=tuple(new if one is old else one for one in owner.backends))
    )


def add_backend(config: Config, cluster: str, address: str, weight: int | None) -> Config:
    """Raises VerbError: not_found, bad_argument, not_built, conflict."""
    owner = find_cluster(config, cluster)
    value = address if weight is None else {"address": address, "weight": weight}
    backend = read_key(
        cluster_tables.BackendKind(), "backend", value, {"cluster": {cluster: {"backends": [value]}}}
    )
    if any(one.address == backend.address for one in owner.backends):
        raise VerbError(ErrorCode.CONFLICT, f"cluster {cluster} has the backend {address} already")
    return with_cluster(config, replace(owner, backends=(*owner.backends, backend)))


def remove_backend(config: Config, cluster: str, address: str) -> Config:
    """Raises VerbError: not_found, conflict."""
    owner = find_cluster(config, cluster)
    gone = find_backend(owner, address)
    if len(owner.backends) == 1:
        raise VerbError(
            ErrorCode.CONFLICT, f"{address} is the last backend of {cluster}: drain it, or add another first"
        )
    return with_cluster(
        config, replace(owner, backends=tuple(one for one in owner.backends if one is not gone))
    )


def with_admission(config: Config, listener: str | None, values: dict[str, object]) -> Config:
    """`values` by the names of [[listener]]'s keys; of all listeners when none is named. Raises VerbError."""
    if listener is not None and all(one.name != listener for one in config.listeners):
        raise VerbError(ErrorCode.NOT_FOUND, f"there is no listener {listener!r}")
    attributes = {}
    for name, value in values.items():
        key = listener_tables.LISTENER.key(name)
        if key is None or name not in ADMISSION_KEYS:
            raise VerbError(
                ErrorCode.BAD_ARGUMENT, f"{name} cannot be set (known: {', '.join(ADMISSION_KEYS)})"
            )
        attributes[key.attribute] = read_key(key.kind, name, value, {"listener": [{name: value}]})
    return replace(
        config,
        listeners=tuple(
            replace(one, **attributes) if listener in (None, one.name) else one for one in config.listeners
        ),
    )


def save(base: Config, now: Config) -> dict[str, Any]:
    """What differs from the file in words that `load` reads: JSON-able."""
    state: dict[str, Any] = {"version": STATE_VERSION, "listeners": {}, "clusters": {}}
    if now.log.level != base.log.level:
        state["log_level"] = now.log.level
    before = {listener.name: listener for listener in base.listeners}
    for listener in now.listeners:
        old = before.get(listener.name, listener)
        differing = {name: _show(listener, name) for name in ADMISSION_KEYS if _differs(old, listener, name)}
        if differing:
            state["listeners"][listener.name] = differing
    known = {cluster.name: cluster for cluster in base.clusters}
    for cluster in now.clusters:
        if cluster.name in known and known[cluster.name].backends != cluster.backends:
            state["clusters"][cluster.name] = [
                {"address": str(one.address), "weight": one.weight, "mode": one.mode.value}
                for one in cluster.backends
            ]
    return state


def load(config: Config, state: dict[str, Any]) -> Config:
    """`config` with everything that a saved state names. Raises VerbError; all of it or nothing."""
    if state.get("version") != STATE_VERSION:
        raise VerbError(ErrorCode.BAD_ARGUMENT, f"state is not a saved state of version {STATE_VERSION}")
    unknown = set(state) - {"version", "log_level", "listeners", "clusters"}
    listeners, clusters = state.get("listeners", {}), state.get("clusters", {})
    if unknown or not isinstance(listeners, dict) or not isinstance(clusters, dict):
        raise VerbError(ErrorCode.BAD_ARGUMENT, "state is not what state.save answers")
    if "log_level" in state:
        config = with_log_level(config, state["log_level"])
    for name, values in listeners.items():
        if not isinstance(values, dict):
            raise VerbError(ErrorCode.BAD_ARGUMENT, f"state.listeners.{name} is an object")
        config = with_admission(config, name, values)
    for name, backends in clusters.items():
        owner = find_cluster(config, name)
        if not isinstance(backends, list) or not backends:
            raise VerbError(ErrorCode.BAD_ARGUMENT, f"state.clusters.{name} is a list of backends")
        kind = cluster_tables.BackendKind()
        read = [read_key(kind, "backend", one, {"cluster": {name: {"backends": [one]}}}) for one in backends]
        if len({one.address for one in read}) != len(read):
            raise VerbError(ErrorCode.CONFLICT, f"state.clusters.{name} names a backend twice")
        config = with_cluster(config, replace(owner, backends=tuple(read)))
    return config


def with_log_level(config: Config, level: object) -> Config:
    key = process_tables.LOG.key("level")
    assert key is not None
    return replace(config, log=replace(config.log, level=read_key(key.kind, "level", level, {})))


def _differs(old: Listener, new: Listener, name: str) -> bool:
    key = listener_tables.LISTENER.key(name)
    assert key is not None
    return bool(getattr(old, key.attribute) != getattr(new, key.attribute))


def _show(listener: Listener, name: str) -> Any:
    """A key's value as JSON that the same key reads."""
    key = listener_tables.LISTENER.key(name)
    assert key is not None
    value = getattr(listener, key.attribute)
    shown = key.kind.show(value)
    return value if isinstance(value, int) and shown == str(value) else shown.strip('"')


# putting them in force


@dataclass(slots=True, eq=False)
class _Waiting:
    """A change that some workers have not applied yet."""

    generation: int
    done: Callable[[list[str]], None]
    timer: Timer


class RuntimeChanges:
    """The verbs that change something, and what they changed since the file was read."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._base = supervisor.config
        self._waiting: list[_Waiting] = []

    def based_on(self, config: Config) -> None:
        """The file was read again: nothing differs from it."""
        self._base = config

    def describe(self) -> list[str]:
        """What differs from the file, a phrase each."""
        return changes(self._base, self._supervisor.config).describe()

    # verbs

    def backend_add(self, args: Args, reply: Reply) -> None:
        new = add_backend(self._config, args["cluster"], args["backend"], args["weight"])
        self._change(new, reply, f"{args['backend']} added to {args['cluster']}")

    def backend_remove(self, args: Args, reply: Reply) -> None:
        new = remove_backend(self._config, args["cluster"], args["backend"])
        self._change(new, reply, f"{args['backend']} removed from {args['cluster']}")

    def backend_weight(self, args: Args, reply: Reply) -> None:
        key = cluster_tables.BACKEND.key("weight")
        assert key is not None
        weight = read_key(key.kind, "weight", args["weight"], {})
        new = with_backend(self._config, args["cluster"], args["backend"], weight=weight)
        self._change(new, reply, f"{args['backend']} has weight {weight}")

    def backend_mode(self, args: Args, name: str, reply: Reply) -> None:
        mode = BackendMode(name)
        new = with_backend(self._config, args["cluster"], args["backend"], mode=mode)
        message = f"{args['backend']} is set to {name}"
        if mode is BackendMode.MAINTENANCE:
            self._apply(new, lambda notes: self._end_sessions(args, reply, message, notes))
        else:
            self._change(new, reply, message)

    def admission(self, args: Args, reply: Reply) -> None:
        values = {name: args[name] for name in ADMISSION_KEYS if args[name] is not None}
        if not values:
            raise VerbError(ErrorCode.BAD_ARGUMENT, f"say what: {', '.join(ADMISSION_KEYS)}")
        said = ", ".join(f"{name} = {value}" for name, value in values.items())
        new = with_admission(self._config, args["listener"], values)
        self._change(new, reply, f"{args['listener'] or 'every listener'}: {said}")

    def log_level(self, args: Args, reply: Reply) -> None:
        self._change(with_log_level(self._config, args["level"]), reply, f"log level {args['level']}")

    def save(self, args: Args, reply: Reply) -> None:
        reply.ok({"state": save(self._base, self._config)})

    def load(self, args: Args, reply: Reply) -> None:
        state = args["state"]
        new = load(self._config, state.get("state", state))  # the whole answer of state.save, or its state
        said = changes(self._config, new).describe()
        self._change(new, reply, "; ".join(said) or "nothing changed")

    # how

    @property
    def _config(self) -> Config:
        supervisor = self._supervisor
        if supervisor.draining or supervisor.upgrades.handed_over:
            raise VerbError(ErrorCode.ENDING, "this tidegate is ending: nothing is changed any more")
        if supervisor.upgrades.under_way:
            raise VerbError(ErrorCode.BUSY, "an upgrade is under way: the successor reads the file")
        return supervisor.config

    def _change(self, new: Config, reply: Reply, message: str) -> None:
        self._apply(new, lambda notes: reply.ok({"message": message, "notes": notes}))

    def _apply(self, new: Config, done: Callable[[list[str]], None]) -> None:
        """Put it in force; `done(notes)` when every worker has it, or the limit is over."""
        supervisor = self._supervisor
        old, supervisor.config = supervisor.config, new
        try:
            supervisor.allocate_rows()
        except OperatorError:
            supervisor.config = old
            raise
        by_address = {listener.address: listener for listener in new.listeners}
        for group in supervisor.groups.groups:
            group.listener = by_address[group.listener.address]
        if new.log != old.log:
            logs.setup(new.log.level, new.log.format)
        supervisor.reloads.retire_rows(old, new)
        supervisor.generation += 1
        supervisor.reloads.tell_workers(new, [])
        timer = Timer(lambda now: self._give_up(waiting))
        waiting = _Waiting(supervisor.generation, done, timer)
        self._waiting.append(waiting)
        supervisor.reactor.timers.arm(timer, time.monotonic_ns() + ACK_LIMIT_NS)
        self.acknowledged()

    def acknowledged(self) -> None:
        """A worker applied a configuration, or died: its replacement has the newest."""
        for waiting in list(self._waiting):
            if not self._behind(waiting):
                self._finish(waiting, [])

    def _behind(self, waiting: _Waiting) -> list[int]:
        return [
            one.index
            for one in self._supervisor.workers.all
            if one.running and one.generation < waiting.generation
        ]

    def _give_up(self, waiting: _Waiting) -> None:
        self._finish(
            waiting,
            [f"worker {index} hangs: it will apply it when it wakes" for index in self._behind(waiting)],
        )

    def _finish(self, waiting: _Waiting, notes: list[str]) -> None:
        self._waiting.remove(waiting)
        self._supervisor.reactor.timers.cancel(waiting.timer)
        waiting.done(notes)

    def _end_sessions(self, args: Args, reply: Reply, message: str, notes: list[str]) -> None:
        """Maintenance: what is under way at the backend ends too."""

        def done(answers: Answers) -> None:
            killed = sum(int(part.get("killed", 0)) for part in answers.parts.values())
            said = {"message": f"{message}; {killed} sessions ended", "killed": killed}
            reply.ok(said | {"notes": [*notes, *answers.notes]})

        question = {"cluster": args["cluster"], "backend": args["backend"]}
        try:
            self._supervisor.queries.ask(self._supervisor.workers.all, "kill", question, done)
        except VerbError as error:
            reply.error(error.code, f"{message}, but sessions were not ended: {error.message}")
