"""What a configuration is, once validated: frozen objects, no text left to interpret.

Durations are int nanoseconds (fields ending in `_ns`), sizes are int bytes. `None` means "off" for a
limit or a duration and "auto" where the comment says so. Defaults live in `config.defaults`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path


class Protocol(StrEnum):
    TCP = "tcp"
    HTTP = "http"
    HTTPS = "https"


class QueueAgeSource(StrEnum):
    AUTO = "auto"
    BPF = "bpf"
    TCP_INFO = "tcp_info"
    ACCEPT = "accept"


class Steer(StrEnum):
    P2C = "p2c"
    LEAST_QUEUE = "least_queue"
    HASH = "hash"
    CPU = "cpu"


class StatsdLabels(StrEnum):
    NAME = "name"
    TAGS = "tags"


class Policy(StrEnum):
    DEADLINE = "deadline"
    CODEL = "codel"


class WhenQueueFull(StrEnum):
    DROP_NEW = "drop_new"
    DROP_OLDEST = "drop_oldest"


class OnStale(StrEnum):
    RESET = "reset"
    ANSWER_503 = "503"


class WhenFull(StrEnum):
    QUEUE = "queue"
    REFUSE = "refuse"


class ProxyProtocol(StrEnum):
    OFF = "off"
    V1 = "v1"
    V2 = "v2"
    ANY = "any"  # listeners only


class Splice(StrEnum):
    AUTO = "auto"
    ON = "on"
    OFF = "off"


class Balance(StrEnum):
    ROUND_ROBIN = "round_robin"
    RANDOM = "random"
    LEAST_CONNECTIONS = "least_connections"
    P2C = "p2c"
    HASH = "hash"


class BackendMode(StrEnum):
    """What the operator wants of a backend; how it fares is another matter."""

    READY = "ready"
    DRAIN = "drain"
    MAINTENANCE = "maintenance"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a socket binds or connects.

    `host` is an IP address without brackets, a host name (backends only), or "" for a Unix socket, whose
    path is then in `path` (and `port` is 0).
    """

    host: str
    port: int
    path: str = ""

    @property
    def is_unix(self) -> bool:
        return bool(self.path)

    @property
    def is_ipv6(self) -> bool:
        return ":" in self.host

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if self.is_ipv6 else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Limits:
    """Per client address; 0 means none."""

    connections_per_client: int = 0
    requests_per_second: int = 0
    burst: int = 0


@dataclass(frozen=True, slots=True)
class AccessLog:
    path: str  # a file, or "stdout"
    format: str = "text"  # "text" | "json"


@dataclass(frozen=True, slots=True)
class HeaderEdits:
    set: tuple[tuple[str, str], ...] = ()
    add: tuple[tuple[str, str], ...] = ()
    remove: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PathRule:
    kind: str  # "exact" | "prefix" | "regex"
    value: str


@dataclass(frozen=True, slots=True)
class Redirect:
    to: str  # "https", or an absolute URL or path
    status: int = 301  # 301 | 302 | 307 | 308


@dataclass(frozen=True, slots=True)
class FixedAnswer:
    status: int
    body: str = ""
    content_type: str = "text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Route:
    """One of `cluster`, `redirect`, `deny`, `answer` is set."""

    host: str = ""  # "" any; "a.b"; "*.a.b"
    path: PathRule | None = None
    method: str = ""  # "" any
    strip_prefix: bool = False
    rewrite_host: str = ""
    request_headers: HeaderEdits = HeaderEdits()
    response_headers: HeaderEdits = HeaderEdits()
    cluster: str = ""
    redirect: Redirect | None = None
    deny: int = 0  # status, 0: no
    answer: FixedAnswer | None = None


@dataclass(frozen=True, slots=True)
class Certificate:
    cert: Path
    key: Path


@dataclass(frozen=True, slots=True)
class ListenerTls:
    min_version: str = "1.2"
    unknown_sni: str = "default"
    client_ca: Path | None = None
    client_cert: str = "off"  # "off" | "optional" | "required"


@dataclass(frozen=True, slots=True)
class Listener:
    name: str  # defaults to the address
    address: Address
    protocol: Protocol
    cluster: str  # "" when routes alone decide
    backlog: int
    accept_queue: int
    max_connections: int | None  # None: "auto"
    stale_after_ns: int
    policy: Policy
    codel_target_ns: int
    codel_interval_ns: int
    when_queue_full: WhenQueueFull
    abort_on_close: bool
    on_stale: OnStale
    request_timeout_ns: int
    front_timeout_ns: int
    keepalive_timeout_ns: int
    zombie_after_ns: int
    tcp_keepalive: bool  # SO_KEEPALIVE on client sockets
    when_full: WhenFull
    proxy_protocol: ProxyProtocol
    trusted: tuple[IPv4Network | IPv6Network, ...]
    via: str  # "" = off
    request_start: str  # "us" | "ms" | "off": the form of X-Request-Start
    queue_age_header: bool  # X-Queue-Age-Ms to backends
    limits: Limits
    answers: tuple[tuple[int, Path], ...]
    access_log: AccessLog | None
    tls: ListenerTls | None
    certificates: tuple[Certificate, ...]
    splice: Splice
    splice_after: int  # bytes
    routes: tuple[Route, ...] = ()


@dataclass(frozen=True, slots=True)
class Backend:
    address: Address
    weight: int = 1
    mode: BackendMode = BackendMode.READY


@dataclass(frozen=True, slots=True)
class Eject:
    failures: int
    for_ns: int


@dataclass(frozen=True, slots=True)
class Health:
    path: str  # "" = TCP connect check
    interval_ns: int
    timeout_ns: int
    rise: int
    fall: int
    expect: tuple[int, ...]  # statuses; () = any 2xx


@dataclass(frozen=True, slots=True)
class BackendTls:
    verify: bool = True
    server_name: str = ""
    ca: Path | None = None


@dataclass(frozen=True, slots=True)
class Pool:
    """Idle keep-alive connections to backends, per worker."""

    max_idle: int
    idle_timeout_ns: int
    max_per_backend: int  # open connections; 0: none


@dataclass(frozen=True, slots=True)
class Cluster:
    name: str
    backends: tuple[Backend, ...]
    balance: Balance
    max_in_flight: int | None  # None: "off"; 0: "auto"
    max_waiting: int  # requests that may wait for a place when max_in_flight is reached, per worker
    connect_timeout_ns: int
    back_timeout_ns: int
    retries: int
    tcp_keepalive: bool
    sticky_cookie: str  # "" = off
    eject: Eject | None
    send_proxy: ProxyProtocol  # OFF, V1, V2
    health: Health | None
    tls: BackendTls | None
    pool: Pool


@dataclass(frozen=True, slots=True)
class Log:
    level: str = "info"
    format: str = "text"  # "text" (key=value) | "json"


@dataclass(frozen=True, slots=True)
class Config:
    workers: int | None  # None: "auto"
    pin_workers: bool
    control: str  # path of the control socket
    control_users: tuple[int, ...]  # uids that may use it, besides root and tidegate's own
    queue_age: QueueAgeSource
    steer: Steer
    hang_after_ns: int
    kill_hung_after_ns: int
    drain_timeout_ns: int
    user: str  # "auto" | "" (keep the caller) | a name
    metrics: Address | None  # None: "off"
    statsd: Address | None  # None: "off"
    statsd_interval_ns: int
    statsd_labels: StatsdLabels
    log: Log
    zombie_interval_ns: int
    max_session_age_ns: int | None  # None: "off"
    cgroup: str  # instance name: <cgroup2 mount>/tidegate/<instance>
    splice_limit: int  # bytes in flight in the kernel, per direction
    splice_total: int  # bytes in flight in the kernel, per worker
    listeners: tuple[Listener, ...]
    clusters: tuple[Cluster, ...]
    source: str = field(default="", compare=False)  # the file it came from

    def cluster(self, name: str) -> Cluster:
        """The cluster of that name; the loader has checked that every name used exists."""
        for cluster in self.clusters:
            if cluster.name == name:
                return cluster
        raise KeyError(name)
