"""What a worker keeps for its clusters and logs besides sessions: pools, health checks, names, log files."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

from tidegate import logs
from tidegate.cluster.balance import ClusterState
from tidegate.cluster.health_io import Checker
from tidegate.cluster.resolve_io import Resolver
from tidegate.config.model import Config, Listener, OnStale, Protocol
from tidegate.config.resolve import Identity
from tidegate.loop.reactor import Reactor
from tidegate.session import tcp_guard
from tidegate.session.accesslog import LogFile, prepare
from tidegate.session.context import Context
from tidegate.session.http_shared import HttpCluster, HttpSide
from tidegate.session.http_stale import answer_stale

# Names are asked for before the first connection comes; a name server that is silent holds nothing up longer.
PRIME_S = 3.0

_log = logging.getLogger("tidegate.worker")


class Traffic:
    """Kept in step with the configuration by `apply`, after the clusters' own states were."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._rng = Random()
        self.resolver = Resolver(reactor, self._rng)
        self._watched: dict[str, tuple[ClusterState, Checker]] = {}
        self._http: dict[str, HttpCluster] = {}
        self._logs: dict[str, LogFile] = {}
        self._running = False

    def apply(self, config: Config, states: dict[str, ClusterState]) -> None:
        """Take over a configuration; `states` has exactly its clusters."""
        served = {
            name
            for listener in config.listeners
            if listener.protocol is not Protocol.TCP
            for name in (listener.cluster, *(route.cluster for route in listener.routes))
            if name
        }
        for name in [name for name, (state, _) in self._watched.items() if states.get(name) is not state]:
            state, checker = self._watched.pop(name)
            checker.stop()
            self.resolver.unwatch(state)
        for name, state in states.items():
            if name not in self._watched:
                checker = Checker(self._reactor, state)
                self._watched[name] = (state, checker)
                self.resolver.watch(state)
                if self._running:
                    checker.start()
        for name in [name for name, one in self._http.items() if name not in served]:
            self._http.pop(name).close()
        for name in served:
            http = self._http.get(name)
            if http is not None and http.state is states[name]:
                http.reconfigure()
            else:
                if http is not None:
                    http.close()
                self._http[name] = HttpCluster(states[name], self._reactor)
        paths = {one.access_log.path for one in config.listeners if one.access_log is not None}
        for path in [path for path in self._logs if path not in paths]:
            self._logs.pop(path).close()
        for path in paths:
            if path not in self._logs:
                self._logs[path] = LogFile(path, self._reactor)

    def begin(self) -> None:
        """The loop is about to run: resolve names, start the checks."""
        self._running = True
        missing = self.resolver.prime(PRIME_S)
        if missing:
            logs.event(_log, logging.WARNING, "names_unresolved", hosts=sorted(missing))
        for _state, checker in self._watched.values():
            checker.start()

    def equip(self, ctx: Context, listener: Listener, cluster: ClusterState | None) -> None:
        """Give a listener's context what its sessions share. Raises OperatorErrors."""
        if listener.protocol is Protocol.TCP:
            ctx.tcp = tcp_guard.side(listener, cluster, ctx.tcp)
            return
        log = self._logs[listener.access_log.path] if listener.access_log is not None else None
        answers = tuple((status, path) for status, path in listener.answers if _readable(path))
        http = ctx.http = HttpSide(replace(listener, answers=answers), self._http, ctx.http, log)
        answers_stale = listener.on_stale is OnStale.ANSWER_503
        ctx.answer_stale = partial(answer_stale, http) if answers_stale else None

    def reopen(self) -> None:
        """SIGUSR1: log files were renamed."""
        for log in self._logs.values():
            log.flush()
            log.reopen()

    def finish(self) -> None:
        """The worker ends: what is buffered is written."""
        for log in self._logs.values():
            log.close()
        self.resolver.close()


def _readable(path: Path) -> bool:
    """The supervisor could read it at load; a worker without its privileges perhaps cannot."""
    try:
        with path.open("rb"):
            return True
    except OSError as error:
        logs.event(
            _log,
            logging.ERROR,
            "answer_file_unreadable",
            path=str(path),
            error=error.strerror,
            fix="let the workers' user read it; the plain answer is sent instead",
        )
        return False


def prepare_logs(config: Config, user: Identity | None) -> None:
    """As root: make the access logs' files what workers without privileges can open."""
    if user is None:
        return
    for listener in config.listeners:
        if listener.access_log is None:
            continue
        try:
            prepare(listener.access_log.path, user.uid, user.gid)
        except OSError as error:
            path = listener.access_log.path
            logs.event(_log, logging.ERROR, "access_log_not_made", path=path, error=error.strerror)
