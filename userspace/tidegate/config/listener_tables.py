"""The keys of [[listener]]."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Final

from tidegate.config import defaults, listener_parts, route_tables
from tidegate.config.composite import Many, Sub
from tidegate.config.http_kinds import TOKEN, Answers
from tidegate.config.kinds import (
    Choice,
    Duration,
    Flag,
    Network,
    Number,
    Several,
    Size,
    SocketAddress,
    Text,
    name_error,
)
from tidegate.config.model import (
    Limits,
    Listener,
    OnStale,
    Policy,
    Protocol,
    ProxyProtocol,
    Splice,
    WhenFull,
    WhenQueueFull,
)
from tidegate.config.schema import HTTP, HTTPS, REQUIRED, Key, Reload, Section, Table

_LABEL: Final = re.compile(r"[A-Za-z0-9._:@/\[\]-]{1,64}", re.ASCII)

LISTENER: Final = Table(
    "[[listener]]",
    "An address that takes connections, and what becomes of them. Limits and queues count per worker.",
    (
        Key(
            "name",
            Text(
                "name",
                '"web"',
                lambda t: (
                    "" if _LABEL.fullmatch(t) else "a name has 1 to 64 of: letters, digits, . _ : @ / [ ] -"
                ),
            ),
            "",
            "What logs, metrics and tools call it.",
            shown="the address",
        ),
        Key(
            "address",
            SocketAddress(),
            REQUIRED,
            'IP address and port: `"127.0.0.1:8080"`, `"[::1]:8080"`, `"0.0.0.0:80"`.',
            reload=Reload.SOCKET,
        ),
        Key("protocol", Choice.of(Protocol), REQUIRED, "What is spoken on it."),
        Key(
            "cluster",
            Text("name of a cluster", '"app"', name_error),
            "",
            "tcp: where to, required. http: the route of last resort.",
            shown="none",
        ),
        Key(
            "backlog",
            Number(1, 1 << 30),
            defaults.BACKLOG,
            "Connections that wait in the kernel, per worker; the kernel caps it at net.core.somaxconn.",
        ),
        Key(
            "accept_queue",
            Number(1, defaults.MAX_CONNECTIONS),
            defaults.ACCEPT_QUEUE,
            "Connections accepted and waiting for a session, per worker.",
        ),
        Key(
            "max_connections",
            Number(1, defaults.MAX_CONNECTIONS, (("auto", None),)),
            defaults.MAX_CONNECTIONS_PER_WORKER,
            "Sessions, per worker; further connections wait. `auto`: from RLIMIT_NOFILE.",
        ),
        Key(
            "stale_after",
            Duration(),
            defaults.STALE_AFTER_NS,
            "A connection that waited longer than this, kernel queue included, is refused.",
            field="stale_after_ns",
        ),
        Key("policy", Choice.of(Policy), defaults.POLICY, "How staleness is judged."),
        Key(
            "codel_target",
            Duration(),
            defaults.CODEL_TARGET_NS,
            'Standing delay that policy = "codel" allows.',
            field="codel_target_ns",
        ),
        Key(
            "codel_interval",
            Duration(),
            defaults.CODEL_INTERVAL_NS,
            'For how long policy = "codel" lets the delay stand.',
            field="codel_interval_ns",
        ),
        Key(
            "when_queue_full",
            Choice.of(WhenQueueFull),
            defaults.WHEN_QUEUE_FULL,
            "A full accept queue: refuse the newcomer, or the one that waited longest.",
        ),
        Key(
            "abort_on_close",
            Flag(),
            None,
            "A waiting client that sent data and then a FIN counts as gone.",
            shown="`false` on tcp, `true` on http and https",
        ),
        Key(
            "on_stale",
            Choice.of(OnStale),
            defaults.ON_STALE,
            "How stale connections are refused: reset, or (http) 503 with Retry-After if a request came.",
        ),
        Key(
            "request_timeout",
            Duration(),
            defaults.REQUEST_TIMEOUT_NS,
            "From the end of the TCP handshake to a whole request head, in total.",
            field="request_timeout_ns",
            only=HTTP,
        ),
        Key(
            "front_timeout",
            Duration(),
            defaults.FRONT_TIMEOUT_NS,
            "The client has sent and taken nothing for this long.",
            field="front_timeout_ns",
        ),
        Key(
            "keepalive_timeout",
            Duration(),
            defaults.KEEPALIVE_TIMEOUT_NS,
            "Idle between two requests.",
            field="keepalive_timeout_ns",
            only=HTTP,
        ),
        Key(
            "zombie_after",
            Duration(),
            defaults.ZOMBIE_AFTER_NS,
            "A session without any progress for this long is closed by the zombie checker.",
            field="zombie_after_ns",
        ),
        Key("tcp_keepalive", Flag(), defaults.TCP_KEEPALIVE, "SO_KEEPALIVE on connections from clients."),
        Key(
            "when_full",
            Choice.of(WhenFull),
            defaults.WHEN_FULL,
            "No worker can take a connection: let it wait, or refuse it at once (the SYN is dropped).",
        ),
        Key(
            "proxy_protocol",
            Choice.of(ProxyProtocol),
            defaults.PROXY_PROTOCOL,
            "Expect a PROXY protocol header on every connection, from `trusted` networks only: name them.",
        ),
        Key(
            "trusted",
            Several(Network(), "networks", '["10.0.0.0/8"]'),
            (),
            "Networks whose PROXY headers and forwarded headers are believed.",
        ),
        Key(
            "via",
            Text(
                "name",
                '"tidegate"',
                lambda t: "" if TOKEN.fullmatch(t) else "is not a name for Via: one word",
                (("off", ""),),
            ),
            defaults.VIA,
            "The name in the Via header of requests.",
            only=HTTP,
        ),
        Key(
            "request_start",
            Choice(("us", "ms", "off")),
            defaults.REQUEST_START,
            "The unit of X-Request-Start, which tells backends since when a request waits.",
            only=HTTP,
        ),
        Key(
            "queue_age_header",
            Flag(),
            defaults.QUEUE_AGE_HEADER,
            "Send X-Queue-Age-Ms to backends.",
            only=HTTP,
        ),
        Key(
            "limits",
            listener_parts.LIMITS_KIND,
            defaults.LIMITS,
            "Limits per client address, counted in each worker: N workers let through up to N times as much.",
        ),
        Key("answers", Answers(), (), "Files that replace tidegate's own answers, by status.", only=HTTP),
        Key(
            "access_log",
            listener_parts.ACCESS_LOG_KIND,
            None,
            "One line per request.",
            only=HTTP,
        ),
        Key(
            "splice",
            Choice.of(Splice),
            defaults.SPLICE,
            "Let the kernel move the bytes of long streams: where it is known to work, always, or never.",
        ),
        Key(
            "splice_after",
            Size(low=0),
            defaults.SPLICE_AFTER,
            "Bytes that a direction has moved before the kernel takes it over; 0 is at once.",
        ),
        Key(
            "tls",
            listener_parts.TLS_KIND,
            None,
            "TLS towards clients.",
            only=HTTPS,
            shown="the defaults of its keys",
        ),
        Key(
            "certificate",
            listener_parts.CERTIFICATES_KIND,
            (),
            "Certificates; an https listener needs one.",
            field="certificates",
            only=HTTPS,
        ),
        Key("route", Many(route_tables.ROUTES), (), "Where requests go.", field="routes", only=HTTP),
    ),
)


def check(section: Section) -> None:
    """What the keys of a listener must be together. Clusters are looked up later, when all are known."""
    protocol: Protocol | None = section.get("protocol")
    if protocol is not None:
        _check_protocol(section, protocol)
    target, interval = section.get("codel_target"), section.get("codel_interval")
    if target and interval and target >= interval:
        name = "codel_target" if "codel_target" in section.written else "codel_interval"
        section.error(name, "codel_target is not shorter than codel_interval", 'write codel_target = "5ms"')
    proxy: ProxyProtocol | None = section.get("proxy_protocol")
    expected = proxy not in (None, ProxyProtocol.OFF)
    if expected and "trusted" not in section.failed and not section.get("trusted"):
        section.error(
            "trusted" if "trusted" in section.written else "proxy_protocol",
            f'proxy_protocol = "{proxy}" without trusted networks: every client would be reset',
            'write trusted = ["10.0.0.0/8"], the networks of the balancers that send the header',
        )
    _check_routes(section)


def _check_protocol(section: Section, protocol: Protocol) -> None:
    for key in section.table.keys:
        if key.name in section.written and protocol not in key.only:
            whose = " and ".join(sorted(key.only))
            section.error(
                key.name,
                f"{key.name} is for {whose} listeners, and this one is {protocol}",
                f"take out {key.name}",
            )
    if protocol is Protocol.TCP:
        if not section.get("cluster"):
            section.error("cluster", "a tcp listener needs a cluster", 'write cluster = "app"')
        if section.get("on_stale") is OnStale.ANSWER_503:
            section.error(
                "on_stale", 'on_stale = "503": a tcp listener speaks no HTTP', 'write on_stale = "reset"'
            )
        limits: Limits | None = section.get("limits")
        if limits and limits.requests_per_second:
            section.error("limits", "requests_per_second is for http and https listeners", "take it out")
    elif not section.get("cluster") and "route" not in section.written:
        section.error("cluster", f"an {protocol} listener needs a cluster or routes", 'write cluster = "app"')
    if protocol is Protocol.HTTPS and not section.get("certificate"):
        fix = "add [[listener.certificate]] with cert and key"
        section.error("certificate", "an https listener needs a certificate", fix)


def _check_routes(section: Section) -> None:
    seen: dict[tuple[object, ...], int] = {}
    for index, route in enumerate(section.get("route") or ()):
        condition = (route.host, route.path, route.method)
        if condition in seen:
            first = section.spot.reading.lines.at((*section.spot.path, "route", seen[condition]))
            section.spot.at("route", index).error(
                f"the route has the conditions of the one in line {first}, so it would never be taken",
                "take out one of them, or make their host, path or method differ",
            )
            section.failed.add("route")
        seen.setdefault(condition, index)


def _build(section: Section) -> Listener:
    """The listener, with the defaults that depend on other keys."""
    listener = Listener(**section.attributes())
    changes: dict[str, Any] = {}
    if not listener.name:
        changes["name"] = str(listener.address)
    if "abort_on_close" not in section.written:
        is_tcp = listener.protocol is Protocol.TCP
        changes["abort_on_close"] = defaults.ABORT_ON_CLOSE_TCP if is_tcp else defaults.ABORT_ON_CLOSE_HTTP
    if listener.protocol is Protocol.HTTPS and listener.tls is None:
        changes["tls"] = defaults.TLS
    return replace(listener, **changes)


LISTENERS: Final = Many(Sub(LISTENER, _build, check=check))
