"""One backend as one worker sees it: where it is, what it carries now, and how it has behaved.

Each worker keeps its own view. The fields are plain ints and bools so that a caller may mirror them into
shared metrics words; only `ClusterState` changes them (`connecting` and the totals included).
"""

from __future__ import annotations

import ipaddress
import socket

from tidegate.config.model import Address

SockAddr = str | bytes | tuple[str, int] | tuple[str, int, int, int]


def is_name(address: Address) -> bool:
    """True when the address is a host name that somebody has to resolve before a socket can connect to it."""
    if address.is_unix:
        return False
    try:
        ipaddress.ip_address(address.host)
    except ValueError:
        return True
    return False


def socket_address(address: Address) -> tuple[socket.AddressFamily, SockAddr]:
    """Family and argument for `socket.connect`, made once so that connecting never parses or resolves.

    Raises ValueError for a host name and OSError for an IPv6 scope whose interface does not exist.
    """
    if address.is_unix:
        # "@name" is the abstract namespace, as ss(8) and systemd write it.
        path = address.path
        return socket.AF_UNIX, (b"\0" + path[1:].encode() if path.startswith("@") else path)
    ip = ipaddress.ip_address(address.host)
    if ip.version == 4:
        return socket.AF_INET, (str(ip), address.port)
    host, _, scope = address.host.partition("%")
    scope_id = 0 if not scope else int(scope) if scope.isdigit() else socket.if_nametoindex(scope)
    return socket.AF_INET6, (host, address.port, 0, scope_id)


class BackendState:
    """A backend's address and one worker's state of it. All times are CLOCK_MONOTONIC ns, 0 = not set."""

    __slots__ = (
        "active",
        "address",
        "connect_failures_total",
        "connecting",
        "connections_total",
        "cost",
        "draining",
        "ejected_times",
        "ejected_until_ns",
        "ejections_total",
        "failures",
        "failures_total",
        "family",
        "index",
        "last_check",
        "name",
        "origin",
        "probation",
        "probing_until_ns",
        "retry_at_ns",
        "sockaddr",
        "tries",
        "up",
        "weight",
        "wrr_current",
    )

    def __init__(
        self, address: Address, weight: int = 1, index: int = 0, origin: Address | None = None
    ) -> None:
        self.address = address
        self.origin = origin if origin is not None else address  # as configured: the host name, if it was one
        self.name = str(address)
        self.weight = weight
        self.index = index  # of the configured backend within its cluster
        self.family, self.sockaddr = socket_address(address)

        self.active = 0  # sessions or requests that hold it, those still connecting included
        self.connecting = 0  # connects under way
        self.up = True  # the active health check's word; True while there is none
        self.last_check = ""  # the last active check's result, a `health.CheckResult`
        self.draining = False  # takes nothing new; forgotten once active is 0

        self.failures = 0  # consecutive, of any kind
        self.tries = 0  # consecutive failed connects: the exponent of the back-off
        self.retry_at_ns = 0  # backing off until then
        self.ejected_until_ns = 0
        self.ejected_times = 0  # multiplier of the next ejection's length
        self.probation = False  # failed, and not seen to work since: gets one attempt at a time
        self.probing_until_ns = 0  # such an attempt is under way

        self.connections_total = 0  # connects that were established
        self.connect_failures_total = 0
        self.failures_total = 0  # every failure counted, connects included
        self.ejections_total = 0

        self.wrr_current = 0  # smooth weighted round robin's running weight
        self.cost = 1  # what one connection weighs in comparisons; set by the policy

    @property
    def is_ipv6(self) -> bool:
        return self.family == socket.AF_INET6

    @property
    def is_unix(self) -> bool:
        return self.family == socket.AF_UNIX

    def out_until_ns(self) -> int:
        """When back-off, ejection and an attempt on probation are over."""
        return max(self.retry_at_ns, self.ejected_until_ns, self.probing_until_ns)

    def usable(self, now_ns: int) -> bool:
        """May be given new work without failing open."""
        return self.up and not self.draining and self.out_until_ns() <= now_ns

    def state(self, now_ns: int) -> str:
        """One word for `status` and logs."""
        if self.draining:
            return "draining"
        if not self.up:
            return "down"
        if self.ejected_until_ns > now_ns:
            return "ejected"
        return "failing" if self.probation else "up"

    def __repr__(self) -> str:
        return f"<backend {self.name} active={self.active} weight={self.weight}>"
