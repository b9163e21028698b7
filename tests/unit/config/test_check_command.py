"""`tidegate check`: all errors and 2, or one line and 0."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tidegate_tools.check import command

GOOD = """[[listener]]
address = "127.0.0.1:8080"
protocol = "tcp"
cluster = "app"
[cluster.app]
backends = ["127.0.0.1:9000", "127.0.0.1:9001"]
"""
BAD = GOOD.replace("backends", "backend").replace('"tcp"', '"udp"')


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "web.toml"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_good_file(file: Path) -> None:
    file.write_text(GOOD)
    result = run(file)
    assert (result.exit_code, result.output) == (0, f"{file}: ok (1 listener, 1 cluster, 2 backends)\n")


def test_bad_file_prints_every_error_and_exits_2(file: Path) -> None:
    file.write_text(BAD)
    result = run(file)
    assert result.exit_code == 2
    lines = result.output.splitlines()
    assert [line.split(": ")[0] for line in lines if not line.startswith("  ")] == [
        f"{file}:3",
        f"{file}:5",
        f"{file}:6",
        str(file),
    ]
    assert "  did you mean backends?" in lines
    assert lines[-1] == f"{file}: 3 errors"


def test_json_of_a_bad_file(file: Path) -> None:
    file.write_text(BAD)
    result = run("--json", file)
    assert result.exit_code == 2
    answer = json.loads(result.output)
    assert (answer["ok"], answer["file"]) == (False, str(file))
    assert [error["line"] for error in answer["errors"]] == [3, 5, 6]
    assert set(answer["errors"][0]) == {"file", "line", "key_path", "message", "fix"}
    assert answer["errors"][0]["key_path"] == "listener[0].protocol"


def test_json_of_a_good_file(file: Path) -> None:
    file.write_text(GOOD)
    result = run(file, "--json")
    assert result.exit_code == 0
    assert json.loads(result.output) == {
        "ok": True,
        "file": str(file),
        "listeners": 1,
        "clusters": 1,
        "backends": 2,
        "errors": [],
    }


def test_missing_file_is_an_error_of_the_same_kind(file: Path) -> None:
    result = run(file)
    assert result.exit_code == 2
    assert result.output.startswith(f"{file}: cannot be read: No such file or directory\n")


def test_help_fits_a_terminal() -> None:
    result = CliRunner().invoke(command, ["--help"], terminal_width=80)
    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= 80
    assert "tidegate check" in result.output
