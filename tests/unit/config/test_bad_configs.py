"""Every file in tests/bad_configs is refused for exactly its reasons, each at its line."""

from __future__ import annotations

import re
import tomllib

import pytest
from bad_configs.cases import CASES, Case

from tidegate import config
from tidegate.config import ConfigErrors
from tidegate.errors import EXIT_USAGE, OperatorError


@pytest.mark.parametrize("case", CASES, ids=str)
def test_refused_for_exactly_its_reasons(case: Case) -> None:
    with pytest.raises(ConfigErrors) as caught:
        config.load(case.path, allow_pending=True)
    found = [(error.line, f"{error.message}\n{error.fix}") for error in caught.value.errors]
    assert [line for line, _ in found] == [line for line, _ in case.errors], caught.value
    for (_, text), (_, fragment) in zip(found, case.errors, strict=True):
        assert fragment in text
    for error in caught.value.errors:
        assert error.fix, f"no fix: {error}"
        assert error.file == str(case.path)


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 50
    assert all(case.errors for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_fix_that_names_a_value_is_toml(case: Case) -> None:
    with pytest.raises(ConfigErrors) as caught:
        config.load(case.path, allow_pending=True)
    for error in caught.value.errors:
        match = re.fullmatch(r"write ([a-z_]+ = [^.]+)", error.fix)
        if match and " for " not in match[1] and not match[1].endswith(("value", "NAME")):
            tomllib.loads(match[1].split(", redirect")[0])


def test_errors_are_operator_errors_that_print_file_and_line() -> None:
    with pytest.raises(OperatorError) as caught:
        config.parse("workers = 0\nsteer = 'x'\n", "web.toml")
    assert caught.value.exit_code == EXIT_USAGE
    text = str(caught.value)
    assert text.startswith("3 errors in web.toml\n")
    assert "web.toml:1: workers = 0: is not between 1 and 64\n  write workers = 1\n" in text
    assert "web.toml:2: " in text
    assert "web.toml: there is no [[listener]]" in text
