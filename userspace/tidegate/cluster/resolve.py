"""Host names of backends, without I/O: which to ask about when, and what the answers change.

Names are looked up by a helper process (`resolve_io`), because getaddrinfo blocks. A failed look-up keeps
the last good answer: DNS being away is no reason to drop backends that work.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

# getaddrinfo does not tell the TTL. Ten seconds is what HAProxy holds a valid answer for, under the usual
# TTLs of service discovery (5 to 60 s), and one question per name and worker that a local cache answers.
REFRESH_NS = 10_000_000_000
# The first repetition after a failure; it doubles up to REFRESH_NS.
RETRY_NS = 1_000_000_000
# resolv.conf's default is 5 s x 2 attempts per server; an answer later than this finds the question given up.
LOOKUP_TIMEOUT_NS = 15_000_000_000
# More addresses than this for one name are a mistake or an attack; the first ones in sorted order are kept.
MAX_ADDRESSES = 64


@dataclass(slots=True)
class _Name:
    host: str
    due_ns: int
    asked: int = 0  # id of the question under way; 0: none
    failures: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """`addresses` is empty exactly when `error` says why."""

    host: str
    addresses: tuple[str, ...]
    error: str = ""


class Lookups:
    """The names that are wanted and the questions under way."""

    __slots__ = ("_by_id", "_last_id", "_names", "_rng")

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._names: dict[str, _Name] = {}
        self._by_id: dict[int, _Name] = {}
        self._last_id = 0

    @property
    def hosts(self) -> frozenset[str]:
        return frozenset(self._names)

    def want(self, hosts: Iterable[str], now_ns: int) -> None:
        """These names and no others, from now on; new ones are due at once."""
        wanted = set(hosts)
        for host in wanted - self._names.keys():
            self._names[host] = _Name(host, now_ns)
        for host in self._names.keys() - wanted:
            self._by_id.pop(self._names.pop(host).asked, None)

    def due(self, now_ns: int) -> list[tuple[int, str]]:
        """(id, host) of the questions to ask now. One that is still open is thereby given up."""
        questions = []
        for name in self._names.values():
            if name.due_ns > now_ns:
                continue
            if name.asked:
                self._failed(name, now_ns)
                continue
            self._last_id += 1
            name.asked = self._last_id
            self._by_id[name.asked] = name
            name.due_ns = now_ns + LOOKUP_TIMEOUT_NS
            questions.append((name.asked, name.host))
        return questions

    def next_due_ns(self) -> int | None:
        return min((name.due_ns for name in self._names.values()), default=None)

    def receive(self, line: bytes, now_ns: int) -> Answer | None:
        """One line from the helper; None when nobody waits for it any more, or it makes no sense."""
        try:
            message = json.loads(line)
            name = self._by_id.get(message["id"])
            error = str(message.get("error", ""))
            found = {ipaddress.ip_address(text) for text in message.get("addresses", ())}
        except (ValueError, TypeError, KeyError, AttributeError):
            return None
        if name is None:
            return None
        if not found:
            self._failed(name, now_ns)
            return Answer(name.host, (), error or "no addresses")
        del self._by_id[name.asked]
        name.asked = 0
        name.failures = 0
        name.due_ns = now_ns + int(REFRESH_NS * (0.9 + 0.2 * self._rng.random()))
        ordered = sorted(found, key=lambda ip: (ip.version, int(ip)))
        return Answer(name.host, tuple(map(str, ordered[:MAX_ADDRESSES])))

    def helper_died(self, now_ns: int) -> None:
        """Every open question has failed."""
        for name in list(self._by_id.values()):
            self._failed(name, now_ns)

    def _failed(self, name: _Name, now_ns: int) -> None:
        self._by_id.pop(name.asked, None)
        name.asked = 0
        wait_ns = min(RETRY_NS << min(name.failures, 16), REFRESH_NS)
        name.failures += 1
        name.due_ns = now_ns + wait_ns // 2 + int(self._rng.random() * (wait_ns // 2))


def question(number: int, host: str) -> bytes:
    """One line for the helper."""
    return json.dumps({"id": number, "host": host}).encode() + b"\n"
