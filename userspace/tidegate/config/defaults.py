"""Every default and every bound of the configuration, once. Durations in ns, sizes in bytes."""

from __future__ import annotations

from typing import Final

from tidegate.config.model import (
    BackendMode,
    BackendTls,
    Balance,
    Eject,
    Limits,
    ListenerTls,
    Log,
    OnStale,
    Policy,
    Pool,
    ProxyProtocol,
    QueueAgeSource,
    Splice,
    Steer,
    WhenFull,
    WhenQueueFull,
)

US: Final = 1_000
MS: Final = 1_000_000
S: Final = 1_000_000_000
MINUTE: Final = 60 * S
KIB: Final = 1024
MIB: Final = 1024 * KIB

# --- bounds

MAX_FILE: Final = 4 * MIB
"""Size of a configuration file: beyond it something else was named by mistake."""
MAX_WORKERS: Final = 64
"""As MAX_WORKERS of bpf/records.h: the reuseport array has that many places per listener."""
MAX_LISTENERS: Final = 256
"""As MAX_LISTENERS of bpf/records.h."""
MAX_SLOTS: Final = 4096
"""As MAX_SLOTS of bpf/records.h: listeners x workers."""
MAX_DURATION_NS: Final = 365 * 86_400 * S
"""A year: longer ones are typing errors, and sums of deadlines stay far from 2^63."""
MIN_DURATION_NS: Final = MS
"""The timer wheel ticks in milliseconds."""
MAX_WEIGHT: Final = 1000
MAX_RETRIES: Final = 10
MAX_CONNECTIONS: Final = 10_000_000
MAX_SIZE: Final = 1 << 40
MAX_ANSWER_FILE: Final = 64 * KIB
"""Own answers are kept in every worker's memory and sent in one piece."""

# --- the process

WORKERS: Final[int | None] = None
"""auto: as many as the CPUs that the process may use."""
PIN_WORKERS: Final = False
CONTROL: Final = "/run/tidegate/control.sock"
CONTROL_USERS: Final[tuple[int, ...]] = ()
QUEUE_AGE: Final = QueueAgeSource.AUTO
STEER: Final = Steer.P2C
HANG_AFTER_NS: Final = 200 * MS
"""The heartbeat is written every quarter of it, so one missed scheduling tick does not look like a hang."""
KILL_HUNG_AFTER_NS: Final = 30 * S
DRAIN_TIMEOUT_NS: Final = 30 * S
USER: Final = "auto"
METRICS: Final = None
"""off"""
LOG: Final = Log()
ZOMBIE_INTERVAL_NS: Final = 30 * S
MAX_SESSION_AGE_NS: Final = None
"""off"""
CGROUP: Final = "auto"
"""Derived from the path of the control socket: two instances on a host have two of those."""
SPLICE_LIMIT: Final = 4 * MIB
SPLICE_TOTAL: Final = 256 * MIB

# --- listeners

BACKLOG: Final = 4096
"""The kernel caps it at net.core.somaxconn, whose own default is 4096."""
ACCEPT_QUEUE: Final = 1024
MAX_CONNECTIONS_PER_WORKER: Final = None
"""auto: from RLIMIT_NOFILE."""
STALE_AFTER_NS: Final = S
POLICY: Final = Policy.DEADLINE
CODEL_TARGET_NS: Final = 5 * MS
"""RFC 8289, section 4.4."""
CODEL_INTERVAL_NS: Final = 100 * MS
"""RFC 8289, section 4.4."""
WHEN_QUEUE_FULL: Final = WhenQueueFull.DROP_NEW
ABORT_ON_CLOSE_TCP: Final = False
"""A client that sends and half-closes (`nc -N`) waits for its answer."""
ABORT_ON_CLOSE_HTTP: Final = True
"""As nginx has it: a FIN on HTTP is a browser's tab closing, nearly always."""
ON_STALE: Final = OnStale.RESET
REQUEST_TIMEOUT_NS: Final = 10 * S
FRONT_TIMEOUT_NS: Final = 60 * S
KEEPALIVE_TIMEOUT_NS: Final = 60 * S
ZOMBIE_AFTER_NS: Final = 10 * MINUTE
TCP_KEEPALIVE: Final = True
WHEN_FULL: Final = WhenFull.QUEUE
PROXY_PROTOCOL: Final = ProxyProtocol.OFF
VIA: Final = "tidegate"
REQUEST_START: Final = "us"
QUEUE_AGE_HEADER: Final = False
LIMITS: Final = Limits()
ACCESS_LOG_FORMAT: Final = "text"
TLS: Final = ListenerTls()
SPLICE: Final = Splice.AUTO
SPLICE_AFTER: Final = 256 * KIB
"""Below it a session is over before the kernel could have helped."""
REDIRECT_STATUS: Final = 301
ANSWER_CONTENT_TYPE: Final = "text/plain; charset=utf-8"

# --- clusters

BACKEND_MODE: Final = BackendMode.READY
WEIGHT: Final = 1
BALANCE: Final = Balance.P2C
"""Power of two choices: nearly as even as the least loaded of all, and no herd when many workers choose."""
MAX_IN_FLIGHT: Final = None
"""off. Becomes "auto" when the limit that finds itself is built."""
MAX_WAITING: Final = 1024
CONNECT_TIMEOUT_NS: Final = 3 * S
"""One lost SYN is repeated after 1 s, a second after 3 s (RFC 6298): room for one loss."""
BACK_TIMEOUT_NS: Final = 30 * S
RETRIES: Final = 2
STICKY_COOKIE: Final = "TIDEGATE"
EJECT: Final = Eject(failures=5, for_ns=10 * S)
"""The values inside `eject = { ... }`; without that key nothing is ejected."""
SEND_PROXY: Final = ProxyProtocol.OFF
HEALTH_PATH: Final = ""
"""A TCP connect is the check."""
HEALTH_INTERVAL_NS: Final = 5 * S
HEALTH_TIMEOUT_NS: Final = 2 * S
HEALTH_RISE: Final = 2
HEALTH_FALL: Final = 3
BACKEND_TLS: Final = BackendTls()
POOL: Final = Pool(max_idle=64, idle_timeout_ns=4 * S, max_per_backend=0)
"""Idle for 4 s at most: Node.js and uvicorn close theirs after 5 s, and the proxy should be first."""
