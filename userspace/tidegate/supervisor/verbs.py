"""The verbs of the control socket: what each takes and does. docs/control.md is the operator's side."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from tidegate import logs
from tidegate.config.defaults import MAX_WEIGHT
from tidegate.control.protocol import (
    Arg,
    ErrorCode,
    VerbError,
    choice,
    duration,
    flag,
    integer,
    several,
    table,
    text,
)
from tidegate.control.server import Args, Reply, Verb
from tidegate.events import EventKind
from tidegate.supervisor import status
from tidegate.supervisor.queries import Answers
from tidegate.supervisor.verbs_change import ADMISSION_KEYS, RuntimeChanges
from tidegate.supervisor.verbs_events import event_name
from tidegate.supervisor.verbs_worker import client_network, parse_token
from tidegate.supervisor.workers import ACTIVE, WorkerProcess

if TYPE_CHECKING:
    from tidegate.supervisor.supervisor import Supervisor

# Describing them holds a worker's loop for some 10 us each; who wants more narrows the filter.
MAX_SESSIONS: Final = 2_000
ZOMBIES_KEPT: Final = 200


def _token(value: object) -> tuple[int, int]:
    return parse_token(text(value))


def _client(value: object) -> str:
    said = text(value)
    if said != "unix" and client_network(said) is None and not said.rpartition(":")[2].isdigit():
        raise ValueError('is an address, a network or an address with a port: "10.0.0.0/8", "10.1.2.3:4567"')
    return said


_WORKER: Final = Arg("worker", integer(0, 4095), "index of a worker")
_LISTENER: Final = Arg("listener", text, "name of a listener")
_CLUSTER: Final = Arg("cluster", text, "name of a cluster", required=True)
_BACKEND: Final = Arg("backend", text, "address of a backend, as configured", required=True)
_FILTER: Final = (
    _LISTENER,
    Arg("cluster", text, "name of a cluster"),
    Arg("backend", text, "address of a backend"),
    Arg("client", _client, "address, network, or address and port"),
    Arg("older", duration, "begun at least that long ago"),
    Arg("idle", duration, "without progress for that long"),
    _WORKER,
)


class Verbs:
    """Bound to one supervisor."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self.zombies: deque[dict[str, Any]] = deque(maxlen=ZOMBIES_KEPT)
        self.zombies_total = 0

    def table(self) -> dict[str, Verb]:
        supervisor = self._supervisor
        changes = supervisor.changes
        return {
            "help": Verb(self._help, "The verbs, with their arguments."),
            "status": Verb(lambda args, reply: reply.ok(status.document(supervisor)), "Everything at once."),
            "workers": Verb(self._part("workers"), "The workers, as in status."),
            "listeners": Verb(self._part("listeners"), "The listeners, as in status."),
            "clusters": Verb(self._clusters, "The backends, and how each worker sees them."),
            "sessions": Verb(
                self._sessions,
                "Sessions under way, the oldest first.",
                (
                    *_FILTER,
                    Arg("limit", integer(1, MAX_SESSIONS), "how many are listed (100)"),
                    Arg("sort", choice("age", "idle"), "what the first has most of (age)"),
                ),
            ),
            "sessions.kill": Verb(
                self._kill,
                "End sessions: by token, or all that match.",
                (
                    *_FILTER,
                    Arg("token", several(_token), "one token or several, as `sessions` shows them"),
                    Arg("all", flag, "true: really all, where no other argument limits it"),
                ),
                mutates=True,
            ),
            **self._change_verbs(changes),
            "zombies": Verb(
                self._zombies,
                "The last sessions that the zombie checker ended.",
                (Arg("limit", integer(1, ZOMBIES_KEPT), "how many (20)"),),
            ),
            "errors": Verb(
                self._errors,
                "The last messages that were refused, with the offending byte.",
                (Arg("limit", integer(1, 64), "how many (20)"),),
            ),
            "events": Verb(
                self._events,
                "Log events from now on; the connection stays open.",
                (
                    Arg("level", choice(*logs.LEVELS), "the least important level wanted (info)"),
                    Arg("event", several(event_name, len(EventKind)), "only events of these names"),
                ),
            ),
            "reload": Verb(
                lambda args, reply: supervisor.reloads.start(reply),
                "Read the configuration again; what verbs changed is gone.",
                mutates=True,
            ),
            "drain": Verb(
                self._drain, "Let tidegate, or one worker, finish and stop.", (_WORKER,), mutates=True
            ),
            "upgrade": Verb(
                lambda args, reply: supervisor.upgrades.start(reply),
                "Hand over to the tidegate that is installed now.",
                mutates=True,
            ),
        }

    @staticmethod
    def _change_verbs(changes: RuntimeChanges) -> dict[str, Verb]:
        place = (_CLUSTER, _BACKEND)
        weight = Arg("weight", integer(1, MAX_WEIGHT), "its share relative to the others'")
        mode: Callable[[str], Callable[[Args, Reply], None]] = lambda name: (  # noqa: E731
            lambda args, reply: changes.backend_mode(args, name, reply)
        )
        return {
            "backend.add": Verb(changes.backend_add, "Add a backend.", (*place, weight), mutates=True),
            "backend.remove": Verb(
                changes.backend_remove,
                "Remove a backend; what is under way there finishes.",
                place,
                mutates=True,
            ),
            "backend.weight": Verb(
                changes.backend_weight,
                "Change a backend's weight.",
                (*place, Arg("weight", weight.read, weight.doc, required=True)),
                mutates=True,
            ),
            "backend.drain": Verb(
                mode("drain"), "Nothing new goes there; what is under way finishes.", place, mutates=True
            ),
            "backend.maintenance": Verb(
                mode("maintenance"),
                "Nothing new goes there; what is under way is ended.",
                place,
                mutates=True,
            ),
            "backend.ready": Verb(mode("ready"), "Back from drain or maintenance.", place, mutates=True),
            "admission.set": Verb(
                changes.admission,
                "Who is admitted: for one listener, or for all.",
                (
                    _LISTENER,
                    *(Arg(key, lambda value: value, f"as {key} of [[listener]]") for key in ADMISSION_KEYS),
                ),
                mutates=True,
            ),
            "log.level": Verb(
                changes.log_level,
                "The least important level that is logged, by all processes.",
                (Arg("level", choice(*logs.LEVELS), "level", required=True),),
                mutates=True,
            ),
            "state.save": Verb(changes.save, "What verbs changed, for state.load."),
            "state.load": Verb(
                changes.load,
                "Change what a saved state changed.",
                (Arg("state", table, "what state.save answered", required=True),),
                mutates=True,
            ),
        }

    # looking

    def _help(self, args: Args, reply: Reply) -> None:
        reply.ok(
            {
                "verbs": {
                    name: {
                        "doc": verb.doc,
                        "mutates": verb.mutates,
                        "args": {arg.name: {"doc": arg.doc, "required": arg.required} for arg in verb.args},
                    }
                    for name, verb in sorted(self.table().items())
                }
            }
        )

    def _part(self, name: str) -> Callable[[Args, Reply], None]:
        return lambda args, reply: reply.ok({name: status.document(self._supervisor)[name]})

    def _clusters(self, args: Args, reply: Reply) -> None:
        clusters = status.document(self._supervisor)["clusters"]

        def done(answers: Answers) -> None:
            for cluster in clusters:
                for backend in cluster["backends"]:
                    backend["seen"] = [
                        {
                            "worker": index,
                            **{key: one[key] for key in ("address", "state", "active", "check")},
                        }
                        for index, part in sorted(answers.parts.items())
                        for one in part.get("clusters", {}).get(cluster["name"], ())
                        if one["configured"] == backend["address"]
                    ]
            reply.ok({"clusters": clusters, "notes": answers.notes})

        self._supervisor.queries.ask(self._supervisor.workers.all, "clusters", {}, done)

    def _sessions(self, args: Args, reply: Reply) -> None:
        question = self._filter(args)
        limit = question["limit"] = args["limit"] or 100
        key = question["sort"] = args["sort"] or "age"

        def done(answers: Answers) -> None:
            found = [one for part in answers.parts.values() for one in part.get("sessions", ())]
            found.sort(key=lambda one: int(one["since_ns"]))
            for one in found:
                del one["since_ns"]
            matched = sum(int(part.get("matched", 0)) for part in answers.parts.values())
            reply.ok({"matched": matched, "sort": key, "sessions": found[:limit], "notes": answers.notes})

        self._supervisor.queries.ask(self._workers(args), "sessions", question, done)

    def _zombies(self, args: Args, reply: Reply) -> None:
        last = list(self.zombies)[::-1][: args["limit"] or 20]
        reply.ok({"total": self.zombies_total, "zombies": last})

    def _errors(self, args: Args, reply: Reply) -> None:
        limit = args["limit"] or 20
        workers = self._supervisor.workers.all

        def done(answers: Answers) -> None:
            found = [
                one | {"worker": index}
                for index, part in answers.parts.items()
                for one in part.get("errors", ())
            ]
            found.sort(key=lambda one: float(one["time"]), reverse=True)
            total = sum(int(part.get("total", 0)) for part in answers.parts.values())
            heard = {"workers": len(workers), "answered": len(answers.parts)}
            reply.ok({"total": total, **heard, "errors": found[:limit], "notes": answers.notes})

        self._supervisor.queries.ask(workers, "errors", {"limit": limit}, done)

    def _events(self, args: Args, reply: Reply) -> None:
        level = args["level"] or "info"
        self._supervisor.events.watch(
            logs.LEVELS[level],
            frozenset(args["event"] or ()),
            lambda on_close: reply.stream({"streaming": True, "level": level}, on_close),
        )

    def on_zombies(self, message: dict[str, Any]) -> None:
        """A worker's zombie checker ended some."""
        zombies = message.get("zombies", [])
        self.zombies.extend(zombies)
        self.zombies_total += len(zombies) + int(message.get("untold", 0))

    # ending sessions and workers

    def _kill(self, args: Args, reply: Reply) -> None:
        question = self._filter(args)
        given = [name for name, value in args.items() if value is not None and name not in ("all", "worker")]
        if not given and not args["all"]:
            raise VerbError(ErrorCode.BAD_ARGUMENT, "say which: a token, a filter, or all=true")
        workers = self._workers(args)
        tokens = args["token"]
        if tokens is not None:
            pids = {pid for pid, _ in tokens}
            workers = [one for one in workers if one.running and one.pid in pids]
            if len(pids) > 1:  # a token means nothing to another process
                raise VerbError(ErrorCode.BAD_ARGUMENT, "the tokens of one request are of one worker")
            if not workers:
                raise VerbError(ErrorCode.NOT_FOUND, "the worker of that token is gone, and its sessions too")
            question["tokens"] = [token for _, token in tokens]

        def done(answers: Answers) -> None:
            killed = sum(int(part.get("killed", 0)) for part in answers.parts.values())
            if tokens is not None and not killed and not answers.notes:
                reply.error(ErrorCode.NOT_FOUND, "no such session: it ended by itself")
                return
            reply.ok({"killed": killed, "notes": answers.notes})

        self._supervisor.queries.ask(workers, "kill", question, done)

    def _filter(self, args: Args) -> dict[str, Any]:
        """The filter for the workers; refuses names that are not there rather than matching nothing."""
        config = self._supervisor.config
        listener, cluster = args["listener"], args["cluster"]
        if listener is not None and all(one.name != listener for one in config.listeners):
            raise VerbError(ErrorCode.NOT_FOUND, f"there is no listener {listener!r}")
        if cluster is not None and all(one.name != cluster for one in config.clusters):
            raise VerbError(ErrorCode.NOT_FOUND, f"there is no cluster {cluster!r}")
        return {
            "listener": listener,
            "cluster": cluster,
            "backend": args["backend"],
            "client": args["client"],
            "older_ns": args["older"],
            "idle_ns": args["idle"],
        }

    def _workers(self, args: Args) -> list[WorkerProcess]:
        return self._supervisor.workers.all if args["worker"] is None else [self._worker(args["worker"])]

    def _worker(self, index: int) -> WorkerProcess:
        workers = self._supervisor.workers.all
        if index >= len(workers):
            raise VerbError(ErrorCode.NO_SUCH_WORKER, f"workers are numbered 0 to {len(workers) - 1}")
        return workers[index]

    def _drain(self, args: Args, reply: Reply) -> None:
        supervisor = self._supervisor
        timeout_ns = supervisor.config.drain_timeout_ns
        if args["worker"] is None:
            if supervisor.draining:  # asked again: nothing changes, least of all for sessions under way
                left_s = math.ceil(supervisor.ends_in_ns / 1e9)
                reply.ok({"message": f"draining already; ends within {left_s} s"})
                return
            reply.ok({"message": f"draining; ends within {timeout_ns / 1e9:g} s"})
            supervisor.drain()
            return
        process = self._worker(args["worker"])
        if process.state != ACTIVE:
            raise VerbError(ErrorCode.NOT_ACTIVE, f"worker {process.index} is {process.state}")
        supervisor.workers.drain(process, timeout_ns)
        supervisor.workers.broadcast({"type": "look"})
        reply.ok(
            {"message": f"worker {process.index} is draining; a new one takes its place when it has finished"}
        )
