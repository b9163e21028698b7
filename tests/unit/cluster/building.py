"""Configuration objects for the cluster tests, with everything that a test does not care about filled in."""

from __future__ import annotations

from typing import Any

from tidegate.config import model

SECOND = 1_000_000_000


def address(text: str) -> model.Address:
    if text.startswith("unix:"):
        return model.Address("", 0, text[5:])
    host, _, port = text.rpartition(":")
    return model.Address(host.strip("[]"), int(port))


def backends(*weights: int) -> tuple[model.Backend, ...]:
    return tuple(model.Backend(address(f"127.0.0.1:{9000 + i}"), weight) for i, weight in enumerate(weights))


def cluster(*weights: int, **changes: Any) -> model.Cluster:
    values: dict[str, Any] = {
        "name": "app",
        "backends": backends(*weights),
        "balance": model.Balance.ROUND_ROBIN,
        "max_in_flight": None,
        "max_waiting": 100,
        "connect_timeout_ns": 3 * SECOND,
        "back_timeout_ns": 30 * SECOND,
        "retries": 2,
        "tcp_keepalive": True,
        "sticky_cookie": "",
        "eject": None,
        "send_proxy": model.ProxyProtocol.OFF,
        "health": None,
        "tls": None,
        "pool": model.Pool(max_idle=8, idle_timeout_ns=30 * SECOND, max_per_backend=0),
    }
    values.update(changes)
    return model.Cluster(**values)


class Clock:
    """A clock that the test moves."""

    def __init__(self, now: int = 1_000 * SECOND) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now

    def advance(self, seconds: float) -> int:
        self.now += int(seconds * SECOND)
        return self.now
