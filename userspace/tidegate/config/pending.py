"""Features that the configuration names and this version does not have yet.

A file that uses one is refused by name: a value that is silently ignored is worse than one that is refused.
When a feature is built, its line here goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from tidegate.config import units
from tidegate.config.errors import BadValueError, Path, show_path, show_value
from tidegate.config.schema import Spot

_ANY: Final = "*"
_USE_TCP: Final = 'use protocol = "tcp": it passes HTTP and TLS through as they are'


@dataclass(frozen=True, slots=True)
class Pending:
    """A key ("*" in its path is any name or index), which of its values are not built, what to do instead.

    `example` is such a value: the reference shows it, and the tests try it.
    """

    path: tuple[str, ...]
    uses: Callable[[object], bool]
    example: object
    instead: str = ""


def _written(_value: object) -> bool:
    return True


def _on(value: object) -> bool:
    return value != "off"


def _is(*values: object) -> Callable[[object], bool]:
    return lambda value: value in values


def _host_name(value: object) -> bool:
    address = value.get("address") if isinstance(value, dict) else value
    try:
        return isinstance(address, str) and units.is_host_name(
            units.parse_address(address, hosts=True, unix=True)
        )
    except BadValueError:
        return False


_LISTENER: Final = ("listener", _ANY)
_CLUSTER: Final = ("cluster", _ANY)

PENDING: Final = (
    Pending((*_LISTENER, "protocol"), _is("https"), "https", _USE_TCP),
    Pending((*_LISTENER, "certificate"), _written, [{"cert": "site.pem", "key": "site.key"}]),
    Pending((*_LISTENER, "tls"), _written, {"min_version": "1.3"}),
    Pending((*_LISTENER, "route"), _written, [{"deny": 403}]),
    Pending((*_LISTENER, "answers"), _written, {"503": "503.html"}),
    Pending((*_LISTENER, "access_log"), _on, {"path": "stdout"}),
    Pending((*_LISTENER, "via"), _written, "gate"),
    Pending((*_LISTENER, "request_start"), _written, "ms"),
    Pending((*_LISTENER, "queue_age_header"), _written, True),
    Pending((*_LISTENER, "request_timeout"), _written, "5s"),
    Pending((*_LISTENER, "keepalive_timeout"), _written, "5s"),
    Pending((*_LISTENER, "on_stale"), _is("503"), "503", 'write on_stale = "reset"'),
    Pending((*_LISTENER, "limits"), _written, {"connections_per_client": 10}),
    Pending((*_LISTENER, "policy"), _is("codel"), "codel", 'write policy = "deadline"'),
    Pending((*_LISTENER, "codel_target"), _written, "10ms"),
    Pending((*_LISTENER, "codel_interval"), _written, "200ms"),
    Pending((*_LISTENER, "proxy_protocol"), _on, "v2", 'write proxy_protocol = "off"'),
    Pending((*_LISTENER, "splice"), _is("on"), "on", 'write splice = "auto"'),
    Pending((*_CLUSTER, "balance"), _is("p2c"), "p2c", 'write balance = "least_connections"'),
    Pending((*_CLUSTER, "balance"), _is("random"), "random", 'write balance = "round_robin"'),
    Pending((*_CLUSTER, "balance"), _is("hash"), "hash", 'write balance = "round_robin"'),
    Pending((*_CLUSTER, "backends", _ANY), _host_name, "app.internal:9000", "write its IP address"),
    Pending((*_CLUSTER, "max_in_flight"), _on, "auto", 'write max_in_flight = "off"'),
    Pending((*_CLUSTER, "max_waiting"), _written, 10),
    Pending((*_CLUSTER, "sticky"), _on, {"cookie": "TIDEGATE"}),
    Pending((*_CLUSTER, "eject"), _on, {"failures": 5}),
    Pending((*_CLUSTER, "health"), _on, {"path": "/healthz"}),
    Pending((*_CLUSTER, "tls"), _on, {"verify": True}),
    Pending((*_CLUSTER, "pool"), _written, {"max_idle": 8}),
    Pending((*_CLUSTER, "send_proxy"), _on, "v2", 'write send_proxy = "off"'),
)


def check(raw: dict[str, Any], spot: Spot) -> None:
    """Report every use of something in the table, unless its key was reported for another reason."""
    wrong = {error.key_path for error in spot.reading.errors}
    for pending in PENDING:
        for path, value in _find(raw, pending.path, ()):
            if pending.uses(value) and show_path(path) not in wrong:
                spot.at(*path).error(
                    _message(path, value), pending.instead or f"take out {spot.at(*path).name}"
                )


def note(prefix: tuple[str, ...], key: str) -> str:
    """What the reference says of a key at `prefix`, "" when all of it is built."""
    paths = {(*prefix, key), (*prefix, key, _ANY)} - {_LISTENER, _CLUSTER}
    mine = [pending for pending in PENDING if pending.path in paths]
    if not mine:
        return ""
    if any(pending.uses is _written or pending.uses is _on for pending in mine):
        off = ' but `"off"`' if any(pending.uses is _on for pending in mine) else ""
        return f"Not built yet{': anything' if off else ''}{off}."
    if any(pending.uses is _host_name for pending in mine):
        return "Not built yet: host names."
    return f"Not built yet: {', '.join(f'`{show_value(pending.example)}`' for pending in mine)}."


def _message(path: Path, value: object) -> str:
    what = f"the host name {show_value(value)}" if path[-2:-1] == ("backends",) else show_path((path[-1],))
    if path[-2:-1] != ("backends",) and not isinstance(value, (dict, list)):
        what = f"{what} = {show_value(value)}"
    return f"{what} is not built yet in this version of tidegate"


def _find(value: object, pattern: tuple[str, ...], path: Path) -> Iterator[tuple[Path, object]]:
    if not pattern:
        yield path, value
        return
    first, rest = pattern[0], pattern[1:]
    if isinstance(value, dict):
        for key in value if first == _ANY else [first]:
            if key in value:
                yield from _find(value[key], rest, (*path, key))
    elif isinstance(value, list) and first == _ANY:
        for index, item in enumerate(value):
            yield from _find(item, rest, (*path, index))
