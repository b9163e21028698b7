"""The keys of [cluster.NAME] and of the tables inside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from tidegate.config import defaults
from tidegate.config.composite import Named, Sub
from tidegate.config.errors import BadValueError
from tidegate.config.http_kinds import TOKEN, UrlPath
from tidegate.config.kinds import (
    Choice,
    Duration,
    File,
    Flag,
    Number,
    Several,
    SocketAddress,
    Text,
    name_error,
)
from tidegate.config.model import (
    Backend,
    BackendMode,
    BackendTls,
    Balance,
    Cluster,
    Eject,
    Health,
    Pool,
    ProxyProtocol,
)
from tidegate.config.schema import REQUIRED, Key, Kind, Section, Spot, Table
from tidegate.config.units import host_name_error

BACKEND: Final = Table(
    "cluster.NAME.backends",
    "A backend that needs more than its address.",
    (
        Key("address", SocketAddress(backend=True), REQUIRED, "Where it listens."),
        Key(
            "weight",
            Number(1, defaults.MAX_WEIGHT),
            defaults.WEIGHT,
            "Its share of the traffic relative to the other backends' weights.",
        ),
        Key(
            "mode",
            Choice.of(BackendMode),
            defaults.BACKEND_MODE,
            "`drain`: nothing new goes there, what is under way finishes; `maintenance`: the same, and the "
            "verb of that name ends what is under way.",
        ),
    ),
)
STICKY: Final = Table(
    "cluster.NAME.sticky",
    "Keep a client on one backend by a cookie.",
    (
        Key(
            "cookie",
            Text(
                "name of a cookie",
                '"TIDEGATE"',
                lambda t: "" if TOKEN.fullmatch(t) else "is not a cookie's name",
            ),
            defaults.STICKY_COOKIE,
            "The cookie that names the backend.",
        ),
    ),
)
EJECT: Final = Table(
    "cluster.NAME.eject",
    "Leave a backend out for a while after failures in a row.",
    (
        Key("failures", Number(1, 1_000_000), defaults.EJECT.failures, "Failures in a row that eject it."),
        Key("for", Duration(), defaults.EJECT.for_ns, "For how long.", field="for_ns"),
    ),
)
HEALTH: Final = Table(
    "cluster.NAME.health",
    "Ask backends on a timer whether they are well.",
    (
        Key(
            "path",
            UrlPath(),
            defaults.HEALTH_PATH,
            "Path of the GET request that asks; without it a TCP connect is the check.",
            shown="a TCP connect",
        ),
        Key(
            "interval",
            Duration(),
            defaults.HEALTH_INTERVAL_NS,
            "Time between two checks.",
            field="interval_ns",
        ),
        Key(
            "timeout",
            Duration(),
            defaults.HEALTH_TIMEOUT_NS,
            "A check that takes longer failed.",
            field="timeout_ns",
        ),
        Key("rise", Number(1, 1000), defaults.HEALTH_RISE, "Good checks in a row that bring a backend back."),
        Key("fall", Number(1, 1000), defaults.HEALTH_FALL, "Failed checks in a row that take it out."),
        Key(
            "expect",
            Several(Number(100, 599), "statuses", "[200]"),
            (),
            "Statuses that are good.",
            shown="any 2xx",
        ),
    ),
)
TLS: Final = Table(
    "cluster.NAME.tls",
    "Speak TLS to the backends.",
    (
        Key(
            "verify",
            Flag(),
            defaults.BACKEND_TLS.verify,
            "Refuse a backend whose certificate does not check out.",
        ),
        Key(
            "server_name",
            Text(
                "host name", '"app.internal"', lambda t: f"the name {w}" if (w := host_name_error(t)) else ""
            ),
            defaults.BACKEND_TLS.server_name,
            "The name sent (SNI) and looked for in the certificate.",
            shown="the host of the backend's address",
        ),
        Key("ca", File(), None, "Certificates of the authorities to trust, PEM.", shown="the system's"),
    ),
)
POOL: Final = Table(
    "cluster.NAME.pool",
    "Idle HTTP connections kept for the next request, per worker.",
    (
        Key("max_idle", Number(0, 1_000_000), defaults.POOL.max_idle, "How many are kept; 0 keeps none."),
        Key(
            "idle_timeout",
            Duration(),
            defaults.POOL.idle_timeout_ns,
            "An idle one is closed after this long; best shorter than the backend's own.",
            field="idle_timeout_ns",
        ),
        Key(
            "max_per_backend",
            Number(0, 1_000_000),
            defaults.POOL.max_per_backend,
            "Open connections to one backend, busy ones included; 0 for no limit.",
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class BackendKind(Kind):
    """A backend as an address, or as a table with a weight."""

    @property
    def label(self) -> str:
        return "backend"

    @property
    def tables(self) -> list[Table]:
        return [BACKEND]

    def read(self, value: object, spot: Spot) -> Any:
        if isinstance(value, str):
            return Backend(SocketAddress(backend=True).read(value, spot), defaults.WEIGHT)
        if isinstance(value, dict):
            return _BACKEND.read(value, spot)
        raise BadValueError("an address in quotes or a table is needed", write='"127.0.0.1:9000"')

    def show(self, value: Any) -> str:
        return str(value)


_BACKEND: Final = Sub(BACKEND, lambda section: Backend(**section.attributes()))

CLUSTER: Final = Table(
    "[cluster.NAME]",
    "Backends that do the same work, and how one is chosen. Listeners and routes refer to it by NAME.",
    (
        Key(
            "backends",
            Several(BackendKind(), 'addresses or `{ address = "...", weight = 2 }`', '["127.0.0.1:9000"]'),
            REQUIRED,
            '`"127.0.0.1:9000"`, `"[::1]:9000"`, `"unix:/run/app.sock"`, `"app.internal:9000"`.',
        ),
        Key(
            "balance",
            Choice.of(Balance),
            defaults.BALANCE,
            "How the backend of a session or request is chosen.",
        ),
        Key(
            "max_in_flight",
            Number(1, defaults.MAX_CONNECTIONS, (("auto", 0), ("off", None))),
            defaults.MAX_IN_FLIGHT,
            "Requests under way at the cluster at a time, per worker; others wait. `auto` finds the number "
            "by itself. Only for http.",
        ),
        Key(
            "max_waiting",
            Number(0, defaults.MAX_CONNECTIONS),
            defaults.MAX_WAITING,
            "Requests that may wait for a place when `max_in_flight` is reached, per worker.",
        ),
        Key(
            "connect_timeout",
            Duration(),
            defaults.CONNECT_TIMEOUT_NS,
            "For one attempt to connect to a backend.",
            field="connect_timeout_ns",
        ),
        Key(
            "back_timeout",
            Duration(),
            defaults.BACK_TIMEOUT_NS,
            "The backend has sent and taken nothing for this long.",
            field="back_timeout_ns",
        ),
        Key(
            "retries",
            Number(0, defaults.MAX_RETRIES),
            defaults.RETRIES,
            "Attempts after the first one, on other backends.",
        ),
        Key("tcp_keepalive", Flag(), defaults.TCP_KEEPALIVE, "SO_KEEPALIVE on connections to backends."),
        Key(
            "sticky",
            Sub(
                STICKY,
                lambda section: section.get("cookie"),
                '{ cookie = "TIDEGATE" }',
                off=True,
                off_value="",
            ),
            "",
            "Keep each client on one backend.",
            field="sticky_cookie",
        ),
        Key(
            "eject",
            Sub(
                EJECT,
                lambda section: Eject(**section.attributes()),
                '{ failures = 5, for = "10s" }',
                off=True,
            ),
            None,
            "Leave out backends that keep failing.",
        ),
        Key(
            "send_proxy",
            Choice.of(ProxyProtocol, ProxyProtocol.ANY),
            defaults.SEND_PROXY,
            "Begin each connection to a backend with a PROXY protocol header that names the client.",
        ),
        Key(
            "health",
            Sub(
                HEALTH,
                lambda section: Health(**section.attributes()),
                '{ path = "/healthz" }',
                lambda section: _check_health(section),
                off=True,
            ),
            None,
            "Check the backends actively.",
        ),
        Key(
            "tls",
            Sub(TLS, lambda section: BackendTls(**section.attributes()), "{ verify = true }", off=True),
            None,
            "Speak TLS to the backends.",
        ),
        Key(
            "pool",
            Sub(POOL, lambda section: Pool(**section.attributes()), "{ max_idle = 64 }"),
            defaults.POOL,
            "Idle connections kept for reuse; used by http listeners.",
        ),
    ),
)


def check(section: Section) -> None:
    """What the keys of a cluster must be together."""
    if section.get("backends") == ():
        section.error("backends", "backends is empty", 'write backends = ["127.0.0.1:9000"]')
    first: set[str] = set()
    for index, backend in enumerate(section.get("backends") or ()):
        address = str(backend.address)
        if address in first:
            section.spot.at("backends", index).error(
                f"backend {address} is listed twice",
                "to give it a larger share, write { address = ..., weight = 2 }",
            )
            section.failed.add("backends")
        first.add(address)


def _check_health(section: Section) -> None:
    if section.get("expect") and "path" not in section.written:
        section.error("expect", "expect is for HTTP checks, and there is no path", 'write path = "/healthz"')


def _build(section: Section) -> Cluster:
    return Cluster(name=str(section.spot.path[-1]), **section.attributes())


CLUSTERS: Final = Named(Sub(CLUSTER, _build, check=check), name_error)
