"""Manual pages and docs/tools, from the same text as --help.

    python -m tidegate_tools.manual docs DIRECTORY   the generated part of each DIRECTORY/VERB.md
    python -m tidegate_tools.manual man DIRECTORY    tidegate.1 and tidegate-VERB.1

A page in DIRECTORY keeps what stands outside its two markers.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import click

from tidegate import __version__
from tidegate_tools.main import main as group

BEGIN = "<!-- from --help; `python -m tidegate_tools.manual docs docs/tools` writes it -->"
END = "<!-- end of --help -->"
_STATUS = """\
0 when done, 1 when something failed, 2 when the command line or a file is wrong, 3 when no tidegate answers
or nothing is as asked for."""


def verbs() -> dict[str, click.Command]:
    """Every verb of this installation."""
    context = click.Context(group, info_name="tidegate")
    found = {}
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        found[name] = command
    return found


def _context(command: click.Command) -> click.Context:
    """As the command line makes it: a command remembers the help option of its first context."""
    if "_help_option" in vars(command):  # made before, for a run of the verb on its own
        vars(command)["_help_option"] = None
    above = click.Context(group, info_name="tidegate", help_option_names=["-h", "--help"])
    return click.Context(command, info_name=command.name, parent=above, max_content_width=10_000)


def usage(name: str, command: click.Command) -> str:
    """`tidegate ages [OPTIONS] [LISTENER]...`"""
    context = _context(command)
    return f"tidegate {name} {' '.join(command.collect_usage_pieces(context))}"


def options(command: click.Command) -> list[tuple[str, str]]:
    """(how it is written, what it does) of each option that says so."""
    context = _context(command)
    rows = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    return [row for row in rows if row is not None and row[1]]


def description(command: click.Command) -> list[str]:
    """Paragraphs."""
    text = inspect.cleandoc(command.help or "").split("\f")[0]
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def epilog(command: click.Command) -> str:
    """The verbatim block after the options, without click's mark."""
    return inspect.cleandoc((command.epilog or "").replace("\b", "")).strip()


def markdown(name: str, command: click.Command) -> str:
    """What stands between the markers."""
    parts = [BEGIN, "", f"    {usage(name, command)}", "", "\n\n".join(description(command)), ""]
    parts += ["| Option | |", "|---|---|"]
    parts += [
        f"| `{left.replace('|', chr(92) + '|')}` | {_cell(right)} |" for left, right in options(command)
    ]
    parts.append("")
    if epilog(command):
        parts += ["```", epilog(command), "```", ""]
    return "\n".join([*parts, END])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def updated(page: str | None, name: str, command: click.Command) -> str:
    """The page with its generated part made anew; a new page when there was none."""
    part = markdown(name, command)
    if page is None:
        return f"# tidegate {name}\n\n{part}\n"
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page of {name} has lost its markers")
    return before + part + after


def man(name: str, command: click.Command) -> str:
    """One page in man(7) macros; `name` is "" for the group."""
    full = f"tidegate-{name}" if name else "tidegate"
    short = command.get_short_help_str(200).rstrip(".")
    lines = [
        f'.TH "{full.upper()}" 1 "" "tidegate {__version__}" "tidegate"',
        ".SH NAME",
        f"{_roff(full)} \\- {_roff(short[:1].lower() + short[1:])}",
        ".SH SYNOPSIS",
        _roff(usage(name, command) if name else "tidegate COMMAND [ARGS]..."),
        ".SH DESCRIPTION",
    ]
    for paragraph in description(command):
        lines += [".PP", _roff(paragraph)]
    lines.append(".SH OPTIONS")
    for left, right in options(command):
        lines += [".TP", f"\\fB{_roff(left)}\\fR", _roff(" ".join(right.split()))]
    if name and epilog(command):
        lines += [".SH EXAMPLES AND NOTES", ".nf", _roff(epilog(command)), ".fi"]
    if not name:
        lines.append(".SH COMMANDS")
        for verb, below in verbs().items():
            lines += [".TP", f"\\fBtidegate\\-{verb}\\fR(1)", _roff(below.get_short_help_str(200))]
    lines += [".SH EXIT STATUS", _roff(" ".join(_STATUS.split()))]
    return "\n".join(lines) + "\n"


def _roff(text: str) -> str:
    """Escaped: backslashes, hyphens (they are meant as typed), and dots that begin a line."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^([.'])", r"\\&\1", escaped, flags=re.MULTILINE)


def write_docs(directory: Path) -> None:
    """Makes or updates a page for each verb."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, command in verbs().items():
        path = directory / f"{name}.md"
        page = path.read_text(encoding="utf-8") if path.exists() else None
        path.write_text(updated(page, name, command), encoding="utf-8")


def write_man(directory: Path) -> None:
    """Writes tidegate.1 and one page for each verb."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tidegate.1").write_text(man("", group), encoding="utf-8")
    for name, command in verbs().items():
        (directory / f"tidegate-{name}.1").write_text(man(name, command), encoding="utf-8")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["docs", where]:
            write_docs(Path(where))
        case ["man", where]:
            write_man(Path(where))
        case _:
            sys.exit(__doc__)
