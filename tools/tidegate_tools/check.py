"""`tidegate check`: every error of a configuration file, before anything starts."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from tidegate.config import Config, ConfigErrors, load
from tidegate.errors import EXIT_USAGE

EXAMPLES = """
\b
Examples:
  tidegate check /etc/tidegate/tidegate.toml
  tidegate check --json tidegate.toml | jq -r '.errors[].message'

Exit status: 0 when the file is good, 2 when it is not or cannot be read.
"""


@click.command("check", epilog=EXAMPLES)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def command(file: Path, as_json: bool) -> None:
    """Check a configuration FILE and print every error in it.

    Each error is shown as FILE:LINE: what is wrong, and below it what to write instead. Certificates, keys
    and answer files are read too; nothing is started and no address is bound.
    """
    try:
        config = load(file)
    except ConfigErrors as errors:
        _refuse(errors, file, as_json)
    if as_json:
        click.echo(json.dumps({"ok": True, "file": str(file), **_counts(config), "errors": []}))
    else:
        counts = ", ".join(_plural(count, what) for what, count in _counts(config).items())
        click.echo(f"{file}: ok ({counts})")


def _refuse(errors: ConfigErrors, file: Path, as_json: bool) -> None:
    if as_json:
        found = [asdict(error) for error in errors.errors]
        click.echo(json.dumps({"ok": False, "file": str(file), "errors": found}))
    else:
        for error in errors.errors:
            click.echo(str(error), err=True)
        click.echo(f"{file}: {_plural(len(errors.errors), 'errors')}", err=True)
    sys.exit(EXIT_USAGE)


def _counts(config: Config) -> dict[str, int]:
    backends = sum(len(cluster.backends) for cluster in config.clusters)
    return {"listeners": len(config.listeners), "clusters": len(config.clusters), "backends": backends}


def _plural(count: int, what: str) -> str:
    return f"{count} {what.removesuffix('s') if count == 1 else what}"
