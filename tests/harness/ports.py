"""Free TCP ports that an outgoing connection cannot take in the meantime."""

from __future__ import annotations

import random
import socket
from pathlib import Path

from harness.waiting import wait_until

_LISTEN = "0A"  # TCP_LISTEN in /proc/net/tcp
_choice = random.SystemRandom()


def _below_ephemeral() -> tuple[int, int]:
    """The range to choose from: under the one the kernel takes source ports from."""
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    return (10_000, low - 1) if low > 12_000 else (low, 65_000)


def free_port(host: str = "127.0.0.1") -> int:
    """A port nothing is bound to on `host`.

    A port given by bind(0) lies in the ephemeral range and may be the source port of somebody's outgoing
    connection by the time a server binds it, so one from below that range is tried instead.

    Raises:
        OSError: 200 tries all failed.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    low, high = _below_ephemeral()
    last: OSError | None = None
    for _ in range(200):
        port = _choice.randint(low, high)
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((host, port))
            except OSError as error:
                last = error
                continue
        return port
    raise last or OSError("no free port")


def listening(port: int) -> bool:
    """Whether a socket listens on `port`, seen without connecting (a probe would reach the backend)."""
    needle = f":{port:04X} "
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split(maxsplit=4)
            if fields[3] == _LISTEN and needle in fields[1] + " ":
                return True
    return False


def wait_listening(port: int, timeout_s: float = 10.0) -> None:
    wait_until(lambda: listening(port), timeout_s, f"port {port} to listen")
