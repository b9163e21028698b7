"""Operator errors: something a person must mend. Each says what is wrong and what to do."""

from __future__ import annotations

EXIT_OK = 0
EXIT_FAILED = 1  # a running thing failed
EXIT_USAGE = 2  # the operator's input is wrong: configuration, arguments
EXIT_UNREACHABLE = 3  # no running tidegate answers


class OperatorError(Exception):
    """An error an operator can act on: shown without a traceback, ends the command with `exit_code`."""

    exit_code = EXIT_FAILED

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.fix}" if self.fix else self.message
