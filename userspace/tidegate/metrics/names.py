"""The one list of what tidegate counts: metrics, label values, why connections are dropped, why sessions end.

Names follow the Prometheus conventions (https://prometheus.io/docs/practices/naming/), but times are kept in
nanoseconds, so a name here says `_ns` where the exposition says `_seconds` (`exposed_name`).
A counter's value only ever grows, over worker restarts too; a gauge is what is true now.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b
from typing import Final, Self

from tidegate.metrics.histogram import HISTOGRAM_WORDS

EXPOSED_PREFIX: Final = "tidegate_"


class Documented(StrEnum):
    """Members are strings with a one-line `doc`."""

    doc: str

    def __new__(cls, value: str, doc: str) -> Self:
        member = str.__new__(cls, value)
        member._value_ = value
        member.doc = doc
        return member


class DropReason(Documented):
    """Why an accepted connection never became a session."""

    STALE = "stale", "It had waited longer than stale_after, in the kernel and in the accept queue together."
    CLIENT_GONE = (
        "client_gone",
        "Its client reset it while it waited, or closed without a byte (with abort_on_close: closed at all).",
    )
    QUEUE_FULL = (
        "queue_full",
        "The accept queue was full: the new connection or the oldest one, as when_queue_full says.",
    )
    FD_EXHAUSTED = (
        "fd_exhausted",
        "No file descriptor was left to serve it: it was accepted with the spare one and refused.",
    )
    SHUTDOWN = (
        "shutdown",
        "It still waited when the worker's drain_timeout was over, or at an immediate stop.",
    )
    WORKER_DIED = "worker_died", "It waited in the accept queue of a worker that died."


class EndReason(Documented):
    """Why a session ended."""

    DONE = "done", "Both sides closed and everything they sent was delivered."
    CLIENT_GONE = (
        "client_gone",
        "The client left before a backend was connected: a reset, or a close where that means leaving.",
    )
    CLIENT_RESET = "client_reset", "The client reset the connection, or took no more data."
    BACKEND_RESET = "backend_reset", "The backend reset the connection, or took no more data."
    FRONT_TIMEOUT = "front_timeout", "Nothing moved for front_timeout and the backend owed nothing."
    BACK_TIMEOUT = "back_timeout", "The backend owed an answer, or took no data, for back_timeout."
    CONNECT_FAILED = (
        "connect_failed",
        "Every attempt to connect was refused, unreachable or took longer than connect_timeout.",
    )
    NO_BACKEND = "no_backend", "The cluster had no backend to try."
    FD_EXHAUSTED = "fd_exhausted", "No file descriptor was left for the connection to the backend."
    IDLE = "idle", "An HTTP client sent no further request within keepalive_timeout."
    REQUEST_TIMEOUT = "request_timeout", "No whole HTTP request head came within request_timeout."
    BAD_REQUEST = "bad_request", "The HTTP request was malformed or over a limit, and was refused."
    BAD_PROXY_HEADER = (
        "bad_proxy_header",
        "The PROXY header was missing or wrong, or its sender is not in `trusted`.",
    )
    BACKEND_CLOSED = "backend_closed", "The backend closed before or inside its HTTP response."
    BAD_RESPONSE = "bad_response", "The backend's HTTP response was malformed or over a limit."
    OVERLOADED = "overloaded", "No place at the cluster came free in time, or too many waited for one."
    LIMITED = "limited", "The client was over its limit of connections or requests."
    ZOMBIE = "zombie", "The zombie checker found no progress for longer than zombie_after."
    MAX_AGE = "max_age", "The zombie checker found it older than max_session_age."
    SHUTDOWN = "shutdown", "It was cut when the worker's drain_timeout was over, or at an immediate stop."
    KILLED = "killed", "The operator ended it over the control socket."
    INTERNAL_ERROR = "internal_error", "A fault of tidegate itself, logged with its traceback."
    WORKER_DIED = "worker_died", "Its worker died."


class StatusClass(Documented):
    """What a request was answered with."""

    NONE = "none", "Nothing: it was cut before a status was sent."
    UPGRADED = "upgraded", "Status 101, the connection was upgraded to another protocol."
    SUCCESS = "success", "A status of 200 to 299."
    REDIRECTION = "redirection", "A status of 300 to 399, 304 included."
    CLIENT_ERROR = "client_error", "A status of 400 to 499."
    SERVER_ERROR = "server_error", "A status of 500 to 599, the backend's or tidegate's."


class AcceptError(Documented):
    """What accept(2) failed with."""

    TRANSIENT = (
        "transient",
        "That one connection had died already (ECONNABORTED, EPROTO, ...); the next may be fine.",
    )
    FD_EXHAUSTED = (
        "fd_exhausted",
        "The process or the host is out of descriptors or memory (EMFILE, ENFILE, ENOBUFS, ENOMEM).",
    )


class SteerVerdict(Documented):
    """What the steering program decided for a new connection."""

    FIT = "fit", "A worker that is alive, active and has room."
    ALL_HUNG = "all_hung", "Every candidate looked hung: heartbeats were ignored."
    ALL_FULL = "all_full", "Every live worker was full: queued all the same."
    REFUSED = "refused", "Every live worker was full: dropped, as when_full says."
    FALLBACK = "fallback", "There was nothing to select, or the selection failed: the kernel's hash chose."
    MIGRATED = "migrated", "Of the above, those that moved a waiting connection from a listener that closed."


class DeathCause(Documented):
    """How a worker ended that was not told to."""

    EXITED = "exited", "It exited with a status of its own, an unexpected exception for example."
    SIGNALED = "signaled", "A signal killed it, the kernel's OOM killer's for example."
    HUNG = "hung", "The supervisor killed it: no heartbeat for kill_hung_after."


class ReloadResult(Documented):
    """What became of a reload."""

    APPLIED = "applied", "The new configuration is in force."
    REFUSED = "refused", "The file had errors: the old configuration stays in force."


class Scope(StrEnum):
    """What a row of counters belongs to. Each worker has its own; PROCESS is the supervisor's alone."""

    PROCESS = "process"
    WORKER = "worker"
    LISTENER = "listener"
    BACKEND = "backend"

    @property
    def label_names(self) -> tuple[str, ...]:
        """The labels that name a row, besides its worker."""
        return _ROW_LABELS[self]


_ROW_LABELS: Final[Mapping[Scope, tuple[str, ...]]] = {
    Scope.PROCESS: (),
    Scope.WORKER: (),
    Scope.LISTENER: ("listener",),
    Scope.BACKEND: ("cluster", "backend"),
}


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric; with a `label`, one series for each of its `values`."""

    name: str
    scope: Scope
    kind: Kind
    help: str
    label: str = ""
    values: tuple[str, ...] = ()
    exposed_as: str = ""  # where its own name without _total is that of another: one family in OpenMetrics

    @property
    def words(self) -> int:
        """64-bit words that it takes in a row."""
        return (HISTOGRAM_WORDS if self.kind is Kind.HISTOGRAM else 1) * max(1, len(self.values))

    @property
    def nanoseconds(self) -> bool:
        """Whether its values are times in ns."""
        return self.name.removesuffix("_total").endswith("_ns")

    @property
    def exposed_name(self) -> str:
        """Its name in the Prometheus exposition, where times are seconds."""
        if self.exposed_as:
            return EXPOSED_PREFIX + self.exposed_as
        stem = self.name.removesuffix("_total")
        total = self.name[len(stem) :]
        return EXPOSED_PREFIX + (stem.removesuffix("_ns") + "_seconds" if self.nanoseconds else stem) + total


def _values(reasons: type[Documented]) -> tuple[str, ...]:
    return tuple(reason.value for reason in reasons)


_L, _W, _P, _B = Scope.LISTENER, Scope.WORKER, Scope.PROCESS, Scope.BACKEND
_COUNTER, _GAUGE, _HISTOGRAM = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM

METRICS: Final[tuple[Metric, ...]] = (
    Metric(
        "queue_age_ns", _L, _HISTOGRAM, "Time connections waited in the kernel's accept queue, at accept."
    ),
    Metric(
        "accepted_total", _L, _COUNTER, "Connections taken from the kernel, those refused at once included."
    ),
    Metric(
        "dropped_total",
        _L,
        _COUNTER,
        "Accepted connections that never became a session.",
        "reason",
        _values(DropReason),
    ),
    Metric("accept_errors_total", _L, _COUNTER, "Failed calls of accept.", "kind", _values(AcceptError)),
    Metric("thefts_total", _L, _COUNTER, "Of accepted_total, those taken from the queue of another worker."),
    Metric("queued", _L, _GAUGE, "Connections accepted and waiting for a session."),
    Metric("accept_queue_wait_ns", _L, _HISTOGRAM, "Time from accept to the begin of the session."),
    Metric("sessions", _L, _GAUGE, "Sessions under way.", exposed_as="current_sessions"),
    Metric("sessions_total", _L, _COUNTER, "Sessions begun."),
    Metric("ended_total", _L, _COUNTER, "Sessions ended.", "reason", _values(EndReason)),
    Metric("zombies_total", _L, _COUNTER, "Sessions that the zombie checker had to end."),
    Metric("received_bytes_total", _L, _COUNTER, "Bytes relayed from clients to backends."),
    Metric("sent_bytes_total", _L, _COUNTER, "Bytes relayed from backends to clients."),
    Metric("spliced_total", _L, _COUNTER, "Sessions whose bytes the kernel moved for a while."),
    Metric(
        "spliced_bytes_total", _L, _COUNTER, "Of the bytes relayed, those that the kernel moved by itself."
    ),
    Metric("connect_attempts_total", _L, _COUNTER, "Attempts to connect to a backend."),
    Metric("connect_failures_total", _L, _COUNTER, "Attempts to connect to a backend that failed."),
    Metric("connect_retries_total", _L, _COUNTER, "Attempts after the first one of a session."),
    Metric(
        "connect_duration_ns", _L, _HISTOGRAM, "Time that successful attempts to connect to a backend took."
    ),
    Metric(
        "requests_total",
        _L,
        _COUNTER,
        "HTTP requests, by the class of the status they were answered with.",
        "status",
        _values(StatusClass),
    ),
    Metric(
        "request_failures_total",
        _L,
        _COUNTER,
        "HTTP requests that did not end well, by why.",
        "reason",
        _values(EndReason),
    ),
    Metric("request_duration_ns", _L, _HISTOGRAM, "Time from an HTTP request's head to its response's end."),
    Metric("own_answers_total", _L, _COUNTER, "HTTP responses that tidegate gave itself."),
    Metric(
        "reused_connections_total", _L, _COUNTER, "HTTP requests sent on a kept-alive backend connection."
    ),
    Metric(
        "request_retries_total", _L, _COUNTER, "HTTP requests sent once more, to this or another backend."
    ),
    Metric("upgrades_total", _L, _COUNTER, "HTTP connections upgraded to another protocol."),
    Metric("log_lines_dropped_total", _L, _COUNTER, "Access log lines that the log could not take in time."),
    Metric(
        "steer_verdicts_total",
        _L,
        _COUNTER,
        "Decisions of the steering program for new connections.",
        "verdict",
        _values(SteerVerdict),
    ),
    Metric("loop_iterations_total", _W, _COUNTER, "Turns of the event loop."),
    Metric("loop_busy_ns_total", _W, _COUNTER, "Time the event loop spent outside of waiting for events."),
    Metric(
        "worker_restarts_total",
        _W,
        _COUNTER,
        "Times the worker died and was replaced.",
        "cause",
        _values(DeathCause),
    ),
    Metric("workers", _P, _GAUGE, "Workers that accept connections."),
    Metric("reloads_total", _P, _COUNTER, "Reloads asked for.", "result", _values(ReloadResult)),
    Metric("backend_current_connections", _B, _GAUGE, "Connections to the backend, open or being opened."),
    Metric("backend_usable_workers", _B, _GAUGE, "Workers that would give the backend new work."),
    Metric("backend_connections_total", _B, _COUNTER, "Connections made to the backend."),
    Metric("backend_connect_failures_total", _B, _COUNTER, "Attempts to connect to the backend that failed."),
)

# every closed list of label values, by the metric that carries it
VALUE_DOCS: Final[Mapping[str, type[Documented]]] = {
    "dropped_total": DropReason,
    "ended_total": EndReason,
    "requests_total": StatusClass,
    "request_failures_total": EndReason,
    "accept_errors_total": AcceptError,
    "steer_verdicts_total": SteerVerdict,
    "worker_restarts_total": DeathCause,
    "reloads_total": ReloadResult,
}


class Layout:
    """Where each metric of one scope stands in a row: word indexes, looked up once, at import."""

    def __init__(self, scope: Scope, metrics: Iterable[Metric]) -> None:
        self.scope = scope
        self.metrics = tuple(metrics)
        self.words = 0
        self._indexes: dict[tuple[str, str], int] = {}
        for metric in self.metrics:
            for value in metric.values or ("",):
                if (metric.name, value) in self._indexes:
                    raise ValueError(f"{metric.name} {value!r} is listed twice")
                self._indexes[metric.name, value] = self.words
                self.words += metric.words // max(1, len(metric.values))

    def index(self, name: str, value: str = "") -> int:
        """Word index of a metric, or of one of its label values; of a histogram, the first of its words.

        Raises KeyError for a name or value that is not in the list.
        """
        return self._indexes[name, value]


_LAYOUTS: Final = {scope: Layout(scope, (m for m in METRICS if m.scope is scope)) for scope in Scope}
PROCESS: Final = _LAYOUTS[Scope.PROCESS]
WORKER: Final = _LAYOUTS[Scope.WORKER]
LISTENER: Final = _LAYOUTS[Scope.LISTENER]
BACKEND: Final = _LAYOUTS[Scope.BACKEND]


def layout(scope: Scope) -> Layout:
    return _LAYOUTS[scope]


def fingerprint() -> int:
    """A 64-bit digest of all layouts: two processes that agree on it read the same words alike."""
    text = ";".join(f"{m.scope} {m.kind} {m.name} {m.label} {','.join(m.values)}" for m in METRICS)
    digest = blake2b(f"{HISTOGRAM_WORDS};{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
