"""Features that the configuration names and this version does not have yet.

A file that uses one is refused by name: a value that is silently ignored is worse than one that is refused.
When a feature is built, its line here goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from tidegate.config.errors import Path, show_path, show_value
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


_LISTENER: Final = ("listener", _ANY)
_CLUSTER: Final = ("cluster", _ANY)

PENDING: Final = (
    Pending((*_LISTENER, "protocol"), _is("https"), "https", _USE_TCP),
    Pending((*_LISTENER, "certificate"), _written, [{"cert": "site.pem", "key": "site.key"}]),
    Pending((*_LISTENER, "tls"), _written, {"min_version": "1.3"}),
    Pending((*_LISTENER, "policy"), _is("codel"), "codel", 'write policy = "deadline"'),
    Pending((*_LISTENER, "codel_target"), _written, "10ms"),
    Pending((*_LISTENER, "codel_interval"), _written, "200ms"),
    Pending((*_CLUSTER, "max_in_flight"), _is("auto"), "auto", 'write max_in_flight = "off"'),
    Pending((*_CLUSTER, "tls"), _on, {"verify": True}),
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
    return f"Not built yet: {', '.join(f'`{show_value(pending.example)}`' for pending in mine)}."


def _message(path: Path, value: object) -> str:
    what = show_path((path[-1],))
    if not isinstance(value, (dict, list)):
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
