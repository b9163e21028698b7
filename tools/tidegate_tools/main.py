"""The `tidegate` command: a group whose verbs are imported only when they are used.

Every verb is one module of this package that holds a `command` (a click command). The table below has
what `tidegate --help` and shell completion need, so neither imports any of them. A verb whose module is not
part of this installation is left out.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import click

from tidegate import __version__
from tidegate.errors import OperatorError


@dataclass(frozen=True, slots=True)
class Verb:
    """One subcommand: its module in this package and its line in `tidegate --help`."""

    module: str
    help: str


VERBS: dict[str, Verb] = {
    "run": Verb("run", "Run the proxy from a configuration file."),
    "check": Verb("check", "Check a configuration file and print every error in it."),
    "demo": Verb("demo", "Run the proxy in front of demo backends, with commands to try."),
    "doctor": Verb("doctor", "Say what this host can do, and how to mend what is missing."),
    "ages": Verb("ages", "Show how long connections wait in the accept queues of this host."),
    "trace": Verb("trace", "Watch the accept queue of any service by its cgroup."),
    "top": Verb("top", "Live view of workers, listeners, drops and backends."),
    "record": Verb("record", "Record queue ages over time to a file."),
    "plot": Verb("plot", "Draw a recording as a heat map."),
    "status": Verb("status", "Show what the running tidegate does."),
    "workers": Verb("workers", "Show the workers of the running tidegate."),
    "errors": Verb("errors", "Show the last messages that were refused, with the byte to blame."),
    "reload": Verb("reload", "Make the running tidegate read its configuration again."),
    "drain": Verb("drain", "Let a worker, or all of tidegate, finish and stop."),
    "upgrade": Verb("upgrade", "Hand over to the tidegate installed now without losing a connection."),
    "ctl": Verb("ctl", "Send any verb to the control socket."),
}


class LazyGroup(click.Group):
    """A click group over VERBS."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name, verb in VERBS.items() if _installed(verb)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        verb = VERBS.get(cmd_name)
        if verb is None or not _installed(verb):
            return None
        if ctx.resilient_parsing and not _completing_inside(cmd_name):
            return click.Command(cmd_name, short_help=verb.help)
        command = import_module(f"{__package__}.{verb.module}").command
        assert isinstance(command, click.Command)
        command.name = cmd_name
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, VERBS[name].help) for name in self.list_commands(ctx)]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except OperatorError as error:
            click.echo(f"tidegate: {error}", err=True)
            sys.exit(error.exit_code)


def _installed(verb: Verb) -> bool:
    return find_spec(f"{__package__}.{verb.module}") is not None


def _completing_inside(name: str) -> bool:
    """Whether the words being completed already name this verb, so that its own options are needed."""
    return name in os.environ.get("COMP_WORDS", "").split()


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 79},
    epilog="Shell completion: source <(tidegate --completion bash), or zsh, or fish.",
)
@click.version_option(__version__, prog_name="tidegate")
@click.option(
    "--completion",
    type=click.Choice(["bash", "zsh", "fish"]),
    expose_value=False,
    is_eager=True,
    callback=lambda ctx, _param, value: _completion(ctx, value),
    help="Print the completion script for a shell, for it to source.",
)
def main() -> None:
    """A reverse proxy that knows how long each connection waited in the kernel, and the tools to see it."""


def _completion(ctx: click.Context, shell: str | None) -> None:
    if not shell or ctx.resilient_parsing:
        return
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None  # the choice has only shells that click knows
    completion = kind(main, {}, "tidegate", "_TIDEGATE_COMPLETE")
    # not .source(): for bash it first runs one to learn its version, which a build root may not have
    click.echo(completion.source_template % completion.source_vars())
    ctx.exit()


if __name__ == "__main__":
    main()
