"""`tidegate status`: what the running tidegate does."""

from __future__ import annotations

from typing import Any

import click

from tidegate_tools import client, table
from tidegate_tools.ages_view import accepted_ages
from tidegate_tools.table import Column


@click.command(
    epilog="""\b
Examples:
  tidegate status
  tidegate status --json | jq '.listeners[] | {name, waiting, dropped}'
"""
)
@client.control_option
@client.json_option
def command(control: str | None, as_json: bool) -> None:
    """Show what the running tidegate does: workers, listeners, clusters.

    Ends with status 3 when no tidegate answers.
    """
    status = client.call(control, "status")
    if as_json:
        client.show_json(status)
    else:
        click.echo(as_text(status))


def as_text(status: dict[str, Any]) -> str:
    """Tables for people."""
    parts = [_head(status), workers_table(status), _listeners(status), _clusters(status)]
    return "\n\n".join(part for part in parts if part)


def _head(status: dict[str, Any]) -> str:
    age = status["queue_age"]
    uptime = table.duration(status["uptime_s"] * 1e9)
    lines = [
        f"tidegate {status['version']}, process {status['pid']}, up {uptime}",
        f"config   {status['config']}",
        f"control  {status['control']}",
        f"ages by  {age['source']}" + (f" ({age['reason']})" if age["reason"] else ""),
    ]
    lines += [f"changed  {change}, until the next reload" for change in status.get("runtime_changes", ())]
    return "\n".join(table.clean(line) for line in lines)


def workers_table(status: dict[str, Any]) -> str:
    """One line per worker."""
    return table.table(*worker_rows(status))


def worker_rows(status: dict[str, Any]) -> tuple[list[Column], list[list[Any]]]:
    """Columns and cells of it."""
    columns = [Column("WORKER", right=True), Column("PID", right=True), Column("STATE")]
    titles = ("HEARTBEAT", "SESSIONS", "QUEUED", "WAITING", "THEFTS", "RESTARTS")
    columns += [Column(title, right=True) for title in titles]
    cells = [
        [
            one["index"],
            one["pid"] or "-",
            one["state"],
            heartbeat(one["heartbeat_age_ms"]),
            *(table.count(one[key]) for key in ("sessions", "queued", "waiting", "thefts", "restarts")),
        ]
        for one in status["workers"]
    ]
    return columns, cells


def heartbeat(age_ms: float | None) -> str:
    return "-" if age_ms is None else f"{table.duration(age_ms * 1e6)} ago"


def _listeners(status: dict[str, Any]) -> str:
    columns = [Column("LISTENER", flex=True), Column("ADDRESS", flex=True)]
    columns += [
        Column(title, right=True) for title in ("WAITING", "SESSIONS", "ACCEPTED", "P50", "P99", "MAX")
    ]
    cells, drops = [], []
    for one in status["listeners"]:
        ages = accepted_ages(one)
        figures = [table.duration(ages[key]) for key in ("p50_ns", "p99_ns", "max_ns")]
        counts = [table.count(one[key]) for key in ("waiting", "sessions", "accepted")]
        cells.append([one["name"], one["address"], *counts, *figures])
        if any(one["dropped"].values()):
            drops.append(f"dropped by {one['name']}: {table.reasons(one['dropped'])}")
    return "\n".join([table.table(columns, cells), *(table.clean(line)[: table.width()] for line in drops)])


def _clusters(status: dict[str, Any]) -> str:
    columns = [Column("CLUSTER", flex=True), Column("BACKEND", flex=True)]
    columns += [Column("STATE"), Column("CONNECTIONS", right=True), Column("FAILURES", right=True)]
    cells = [
        [
            cluster["name"],
            backend["address"],
            backend.get("state", "-"),
            table.count(backend["connections"]),
            table.count(backend["connect_failures"]),
        ]
        for cluster in status["clusters"]
        for backend in cluster["backends"]
    ]
    return table.table(columns, cells)
