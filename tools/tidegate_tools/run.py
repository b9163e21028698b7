"""`tidegate run`: the proxy itself, in the foreground."""

from __future__ import annotations

import sys

import click


@click.command(
    epilog="""\b
Signals:
  TERM   drain within drain_timeout, then end; a second one ends at once
  INT    end at once
  HUP    read the configuration again, in place
  USR1   open log files again
  USR2   hand over to the tidegate installed now
"""
)
@click.argument("file", type=click.Path(dir_okay=False), metavar="FILE")
def command(file: str) -> None:
    """Run the proxy from FILE until a signal ends it. The log goes to stderr."""
    from tidegate.supervisor.supervisor import run

    sys.exit(run(file))
