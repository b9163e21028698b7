"""The reference of all keys, made from the tables that the parser reads by.

`python -m tidegate.config.reference docs/configuration.md` writes each table between its marks in the file,
`<!-- keys: [[listener]] -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Final

from tidegate.config import cluster_tables, listener_tables, pending, process_tables
from tidegate.config.schema import ALL, Key, Reload, Table, all_tables

TOP: Final = "top"
"""The title, in marks, of the table that has none."""
_MARKED: Final = re.compile(r"(<!-- keys: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
_RELOAD: Final = {Reload.LIVE: "live", Reload.SOCKET: "new socket", Reload.RESTART: "restart"}
_PREFIXES: Final = {
    process_tables.PROCESS.title: (),
    listener_tables.LISTENER.title: ("listener", "*"),
    cluster_tables.CLUSTER.title: ("cluster", "*"),
}


def tables() -> dict[str, Table]:
    """Every table there is, by the title that its marks have."""
    return {table.title or TOP: table for table in all_tables(process_tables.PROCESS)}


def render(table: Table) -> str:
    """A table's keys in Markdown."""
    reload = table.title in _PREFIXES
    head = ["key", "type", "default", *(["reload"] if reload else []), "meaning"]
    rows = [_row(head), _row(["---"] * len(head))]
    for key in table.keys:
        cells = [f"`{key.name}`", key.kind.label, key.default_text]
        rows.append(_row([*cells, *([_RELOAD[key.reload]] if reload else []), _meaning(table, key)]))
    return f"{table.doc}\n\n" + "\n".join(rows) + "\n"


def refresh(text: str) -> str:
    """The document with every marked table written anew. Raises KeyError for marks of no table."""
    known = tables()
    return _MARKED.sub(lambda mark: f"{mark[1]}{render(known[mark[2]])}{mark[3]}", text)


def _meaning(table: Table, key: Key) -> str:
    said = [key.doc]
    if key.only != ALL:
        said.append(f"Only {' and '.join(sorted(key.only))}.")
    note = pending.note(_PREFIXES[table.title], key.name) if table.title in _PREFIXES else ""
    return " ".join([*said, f"*{note}*"] if note else said)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(refresh(path.read_text("utf-8")), "utf-8")
