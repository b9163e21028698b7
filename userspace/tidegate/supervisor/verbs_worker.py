"""The worker's half of the verbs: its sessions, its view of backends, its refused messages, its events."""

from __future__ import annotations

import heapq
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Any, Final

from tidegate import logs
from tidegate.loop.reactor import Reactor
from tidegate.metrics.names import EndReason
from tidegate.session.context import Session, show_token
from tidegate.session.refusals import RING
from tidegate.supervisor.queries import to_sealed

if TYPE_CHECKING:
    from tidegate.supervisor.worker import Worker

# A walk over many sessions gives way to traffic after this long.
SLICE_NS: Final = 1_000_000
# Zombies of one walk that are told in full; the rest is counted.
ZOMBIES_TOLD: Final = 32
# Answers up to this size go in the message itself.
INLINE: Final = 32 * 1024
EVENTS_PER_SECOND: Final = 50


@dataclass(frozen=True, slots=True)
class Filter:
    """Which sessions are meant; what is not given matches all."""

    tokens: frozenset[int] | None = None
    listener: str | None = None
    cluster: str | None = None
    backend: str | None = None
    client: str | None = None  # "10.0.0.0/8", "10.1.2.3", "10.1.2.3:4567", "[::1]:80", "unix"
    older_ns: int | None = None
    idle_ns: int | None = None

    @classmethod
    def of(cls, args: dict[str, Any]) -> Filter:
        tokens = args.get("tokens")
        known = {name: args.get(name) for name in ("listener", "cluster", "backend", "client")}
        return cls(
            tokens=None if tokens is None else frozenset(tokens),
            older_ns=args.get("older_ns"),
            idle_ns=args.get("idle_ns"),
            **known,
        )

    def matcher(self) -> Callable[[int, Session, int], bool]:
        """(token, session, now) -> whether it is meant. Cheap conditions first."""
        network = client_network(self.client)

        def matches(token: int, session: Session, now: int) -> bool:
            ctx = session.ctx
            if self.tokens is not None and token not in self.tokens:
                return False
            if self.older_ns is not None and now - session.started_ns < self.older_ns:
                return False
            if self.idle_ns is not None and now - session.last_progress_ns < self.idle_ns:
                return False
            if self.listener is not None and ctx.listener.name != self.listener:
                return False
            if self.cluster is None and self.backend is None and self.client is None:
                return True
            said = session.describe()
            if self.cluster is not None and _cluster_of(said, session) != self.cluster:
                return False
            if self.backend is not None and said.get("backend") != self.backend:
                return False
            return self.client is None or _is_client(str(said.get("client", "")), self.client, network)

        return matches


def _cluster_of(said: dict[str, Any], session: Session) -> str:
    cluster = session.ctx.cluster
    return str(said.get("cluster", cluster.config.name if cluster is not None else ""))


def client_network(client: str | None) -> IPv4Network | IPv6Network | None:
    """The network that a client filter names; None when it names a peer with its port, or "unix"."""
    if client is None:
        return None
    try:
        return ip_network(client.strip("[]"), strict=False)
    except ValueError:
        return None


def _is_client(peer: str, wanted: str, network: IPv4Network | IPv6Network | None) -> bool:
    if network is None:
        return peer == wanted
    host = peer.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        return ip_address(host) in network
    except ValueError:
        return False


class Walk:
    """Visits every session, some in each turn of the loop."""

    def __init__(
        self,
        reactor: Reactor,
        sessions: Iterator[tuple[int, Session]],
        visit: Callable[[int, Session, int], None],
        done: Callable[[], None],
    ) -> None:
        self._reactor = reactor
        self._sessions = sessions
        self._visit = visit
        self._done = done

    def go(self) -> None:
        now = time.monotonic_ns()
        limit = now + SLICE_NS
        for count, (token, session) in enumerate(self._sessions, 1):
            self._visit(token, session, now)
            if count & 31 == 0 and time.monotonic_ns() > limit:
                self._reactor.call_after_batch(self.go)
                return
        self._done()


class WorkerAnswers:
    """Answers the supervisor's questions."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._forwarder: EventForwarder | None = None
        self._zombies: list[dict[str, Any]] = []
        self._zombies_untold = 0

    def asked(self, message: dict[str, Any]) -> None:
        if time.monotonic_ns() > message["expires_ns"]:
            # nobody waits any more; a kill in particular must not come minutes after it was asked for
            self._answer(message["id"], {})
            return
        number, args = message["id"], message["args"]
        match message["what"]:
            case "sessions":
                self._sessions(number, args)
            case "kill":
                self._kill(number, args)
            case "clusters":
                self._answer(number, {"clusters": self._clusters()})
            case "errors":
                last = [one.describe() for one in RING.last(args["limit"])]
                self._answer(number, {"total": RING.total, "errors": last})

    def _sessions(self, number: int, args: dict[str, Any]) -> None:
        worker = self._worker
        matches = Filter.of(args).matcher()
        limit = args["limit"]
        by_idle = args["sort"] == "idle"
        found: list[tuple[int, int]] = []  # a heap whose top is the least wanted
        matched = 0

        def visit(token: int, session: Session, now: int) -> None:
            nonlocal matched
            if not matches(token, session, now):
                return
            matched += 1
            since = session.last_progress_ns if by_idle else session.started_ns
            heapq.heappush(found, (-since, token))
            if len(found) > limit:
                heapq.heappop(found)

        def describe(token: int, session: Session, now: int) -> None:
            since = session.last_progress_ns if by_idle else session.started_ns
            one = session.describe()
            one |= {"token": show_token(token), "worker": worker.index, "since_ns": since}
            told.append(json.dumps(one))

        def done() -> None:
            chosen = iter([token for _, token in sorted(found, reverse=True)])
            living = ((token, session) for token in chosen if (session := worker.slab.get(token)) is not None)
            # made into text one by one: thousands of them at once would hold the loop
            Walk(worker.reactor, living, describe, finished).go()

        def finished() -> None:
            self._answer_text(number, f'{{"matched":{matched},"sessions":[{",".join(told)}]}}')

        told: list[str] = []
        Walk(worker.reactor, iter(worker.slab), visit, done).go()

    def _kill(self, number: int, args: dict[str, Any]) -> None:
        worker = self._worker
        matches = Filter.of(args).matcher()
        killed = 0

        def visit(token: int, session: Session, now: int) -> None:
            nonlocal killed
            if matches(token, session, now):
                session.end(EndReason.KILLED)
                killed += 1

        Walk(worker.reactor, iter(worker.slab), visit, lambda: self._answer(number, {"killed": killed})).go()

    def _clusters(self) -> dict[str, Any]:
        now = time.monotonic_ns()
        return {
            name: [
                {
                    "address": backend.name,
                    "configured": str(backend.origin),
                    "state": backend.state(now),
                    "active": backend.active,
                    "check": backend.last_check,
                }
                for backend in (*cluster.backends, *cluster.draining())
            ]
            for name, cluster in self._worker.clusters.items()
        }

    def _answer(self, number: int, answer: dict[str, Any]) -> None:
        self._answer_text(number, json.dumps(answer))

    def _answer_text(self, number: int, text: str) -> None:
        channel = self._worker.setup.channel
        message = {"type": "answer", "id": number}
        if len(text) <= INLINE:
            channel.send(message | {"answer": json.loads(text)})
            return
        try:
            fd = to_sealed(text)
        except OSError:  # no fd left
            channel.send(message | {"answer": None})
            return
        channel.send(message, [fd])
        os.close(fd)

    # zombies

    def zombie(self, session: Session, reason: EndReason) -> None:
        """Remember one that the checker is about to end; `tell_zombies` passes them on."""
        if len(self._zombies) < ZOMBIES_TOLD:
            one = session.describe() | {"reason": reason.value, "time": round(time.time(), 3)}
            one["token"] = show_token(session.token)
            one["worker"] = self._worker.index
            self._zombies.append(one)
        else:
            self._zombies_untold += 1

    def tell_zombies(self) -> None:
        if self._zombies:
            told, self._zombies = self._zombies, []
            untold, self._zombies_untold = self._zombies_untold, 0
            self._worker.setup.channel.send({"type": "zombies", "zombies": told, "untold": untold})

    # events

    def forward_events(self, level: int) -> None:
        """Send log records from `level` up to the supervisor as they come; 0 ends it."""
        root = logging.getLogger(logs.ROOT)
        if self._forwarder is not None:
            root.removeHandler(self._forwarder)
            self._forwarder = None
        if level:
            self._forwarder = EventForwarder(self._worker.setup.channel.send, level)
            root.addHandler(self._forwarder)


class EventForwarder(logging.Handler):
    """Log records as messages; what is more than so many a second is counted."""

    def __init__(self, send: Callable[[dict[str, Any]], bool], level: int) -> None:
        super().__init__(level)
        self.setFormatter(logs.JsonFormatter())
        self._send = send
        self._second = 0
        self._sent = 0
        self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        second = int(record.created)
        if second != self._second:
            self._second, self._sent = second, 0
        if self._sent >= EVENTS_PER_SECOND:
            self._lost += 1
            return
        self._sent += 1
        event = json.loads(self.format(record))
        if self._lost:
            event["lost_before"], self._lost = self._lost, 0
        if not self._send({"type": "event", "level": record.levelno, "event": event}):
            self._lost += 1


def parse_token(text: str) -> tuple[int, int]:
    """(pid, token). Raises ValueError."""
    pid, colon, token = text.partition(":")
    if not colon or not pid.isascii() or not pid.isdigit() or len(pid) > 10 or len(token) > 16:
        raise ValueError('is a token as `sessions` shows it, "1234:100000000"')
    return int(pid), int(token, 16)
