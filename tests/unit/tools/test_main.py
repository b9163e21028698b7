"""The command group: lazy, quick, and with exit codes that mean something."""

from __future__ import annotations

import os
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from tidegate.errors import EXIT_UNREACHABLE, OperatorError
from tidegate_tools import main as main_module
from tidegate_tools.main import VERBS, Verb, main


class _UnreachableError(OperatorError):
    exit_code = EXIT_UNREACHABLE


@pytest.fixture
def failing_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    module = type(sys)("tidegate_tools.failing")

    @click.command()
    def command() -> None:
        raise _UnreachableError("nobody answers", "start one")

    module.command = command  # type: ignore[attr-defined]
    module.__spec__ = type(sys.__spec__)("tidegate_tools.failing", None)
    monkeypatch.setitem(sys.modules, "tidegate_tools.failing", module)
    monkeypatch.setitem(VERBS, "failing", Verb("failing", "Fails."))


def test_help_lists_installed_verbs_without_importing_them() -> None:
    code = (
        "import sys; from tidegate_tools.main import main, VERBS\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "loaded = [v.module for v in VERBS.values() if 'tidegate_tools.' + v.module in sys.modules]\n"
        "heavy = [m for m in ('pyroute2', 'psutil', 'rich', 'bcc') if m in sys.modules]\n"
        "print('LOADED', loaded, heavy)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "LOADED [] []" in out
    for name in main.list_commands(click.Context(main)):
        assert f"  {name} " in out


def test_verb_without_module_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VERBS, "ghost", Verb("no_such_module_here", "Absent."))
    result = CliRunner().invoke(main, ["--help"])
    assert "ghost" not in result.output
    assert CliRunner().invoke(main, ["ghost"]).exit_code == 2


def test_operator_error_ends_with_its_exit_code_and_fix(failing_verb: None) -> None:
    result = CliRunner().invoke(main, ["failing"])
    assert result.exit_code == EXIT_UNREACHABLE
    assert "tidegate: nobody answers\n  fix: start one" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(shell: str) -> None:
    result = CliRunner().invoke(main, ["--completion", shell])
    assert result.exit_code == 0
    assert "_TIDEGATE_COMPLETE" in result.output


def test_completion_of_verbs_imports_none() -> None:
    env = os.environ | {"_TIDEGATE_COMPLETE": "bash_complete", "COMP_WORDS": "tidegate ", "COMP_CWORD": "1"}
    code = (
        "import sys, atexit; from tidegate_tools import main as m\n"
        "atexit.register(lambda: print('LOADED', [v.module for v in m.VERBS.values()"
        " if 'tidegate_tools.' + v.module in sys.modules]))\n"
        "m.main(prog_name='tidegate')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stdout
    assert "LOADED []" in out
    for name in main_module.main.list_commands(click.Context(main)):
        assert f"plain,{name}" in out


def test_help_fits_eighty_columns() -> None:
    assert all(len(line) < 80 for line in CliRunner().invoke(main, ["--help"]).output.splitlines())
