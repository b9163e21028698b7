"""What to say of a key that a table does not have: misspelt, misplaced, or another proxy's word for it."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Final

from tidegate.config.errors import show_path
from tidegate.config.schema import Spot, Table, all_tables

OTHER_NAMES: Final = {
    "bind": "address",
    "listen": "address",
    "port": "address",
    "mode": "protocol",
    "default_backend": "cluster",
    "backend": "cluster",
    "upstream": "cluster",
    "server": "backends",
    "servers": "backends",
    "targets": "backends",
    "maxconn": "max_connections",
    "nbproc": "workers",
    "threads": "workers",
    "worker_processes": "workers",
    "timeout_connect": "connect_timeout",
    "timeout_client": "front_timeout",
    "timeout_server": "back_timeout",
    "lb_algorithm": "balance",
    "load_balancing": "balance",
    "certificates": "certificate",
    "routes": "route",
    "listeners": "listener",
    "clusters": "cluster",
}
"""What other proxies call things, for hints only."""


def unknown(name: str, table: Table, here: Spot) -> tuple[str, str]:
    """Message and fix for a key that the table does not have."""
    for outer in reversed(here.tables[:-1]):
        if outer.key(name) is not None:
            return _misplaced(name, table, outer, here)
    message = f"unknown key {show_path((name,))} {table.place}"
    near = get_close_matches(name, table.names, 1, 0.6)
    known_as = OTHER_NAMES.get(name.lower().replace("-", "_"), "")
    if name.lower().replace("-", "_") in table.names:
        near = [name.lower().replace("-", "_")]
    elif known_as and table.key(known_as) is not None:
        near = [known_as]
    if near:
        return message, f"did you mean {near[0]}?"
    for inner in table.keys:
        for sub in inner.kind.tables:
            if sub.key(name) is not None:
                return message, f"it belongs {sub.place}"
    for other in all_tables(here.tables[0]):
        if other.key(name) is not None:
            return message, f"it belongs {other.place}"
    return message, f"known keys: {', '.join(table.names)}"


def _misplaced(name: str, table: Table, outer: Table, here: Spot) -> tuple[str, str]:
    """A key that stands after a later table's header and so, in TOML, belongs to that one."""
    path = here.path
    while path and isinstance(path[-1], int):
        path = path[:-1]
    line = here.reading.lines.at(path)
    message = f"{name} belongs {outer.place}, but stands {table.place}"
    if not outer.title:
        return message, "move it to the top of the file, above the first [table]"
    line_of = f" (line {line})" if line else ""
    return message, (
        f"move it above {table.title}{line_of}: in TOML a key belongs to the last [table] written before it"
    )
