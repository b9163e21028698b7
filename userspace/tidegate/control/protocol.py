"""What the control socket speaks: version, limits, and the closed list of errors. No I/O."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from tidegate.config.errors import BadValueError
from tidegate.config.units import parse_duration
from tidegate.metrics.names import Documented

PROTOCOL_VERSION: Final = 1

# The longest request: a saved state with a few thousand backends.
MAX_REQUEST: Final = 1 << 20


class ErrorCode(Documented):
    """Why a request was refused."""

    MALFORMED = "malformed", "What came is no request; the connection is closed."
    TOO_LARGE = "too_large", "A request is one line of at most 1 MiB; the connection is closed."
    FORBIDDEN = "forbidden", "This user may not use the socket (control_users); the connection is closed."
    VERSION = "version", "Another version of the protocol."
    UNKNOWN_VERB = "unknown_verb", "No such verb."
    BAD_ARGUMENT = (
        "bad_argument",
        "An argument is missing, unknown or of the wrong kind; nothing was changed.",
    )
    NOT_FOUND = "not_found", "No listener, cluster, backend or session of that name."
    NO_SUCH_WORKER = "no_such_worker", "Workers are numbered from 0."
    NOT_ACTIVE = "not_active", "The worker is not in a state in which it could do that."
    CONFLICT = (
        "conflict",
        "It contradicts what is there: a backend that exists already, the last one removed.",
    )
    NOT_BUILT = "not_built", "The value is part of the configuration, and not built yet."
    BUSY = "busy", "Something of the kind is under way, or too many ask at once; ask again."
    ENDING = "ending", "This tidegate drains or has handed over: nothing is changed any more."
    CONFIG = "config", "The configuration file is wrong; the message has its lines. The old one serves on."
    UPGRADE_FAILED = "upgrade_failed", "The successor did not start; this tidegate serves on."
    FAILED = "failed", "It was tried and did not work; the message says why and what to do."
    INTERNAL_ERROR = "internal_error", "A fault of tidegate; its log has the details."


def code_of(code: str) -> ErrorCode:
    """The member of that value. Raises ValueError for one that is not in the list."""
    for known in ErrorCode:
        if known == code:
            return known
    raise ValueError(f"{code!r} is not in the list of error codes")


class VerbError(Exception):
    """A verb's refusal: a code of the closed list, and a sentence for the operator."""

    def __init__(self, code: ErrorCode | str, message: str) -> None:
        """Raises ValueError for a code that is not in the list."""
        super().__init__(message)
        self.code = code_of(code)
        self.message = message


class MalformedError(ValueError):
    """A line that is no request."""


@dataclass(frozen=True, slots=True)
class Request:
    """One line from a peer, its form checked and its contents not yet."""

    id: int | str | None
    version: object
    verb: object
    args: object


def parse_request(line: bytes) -> Request:
    """Raises MalformedError."""
    try:
        raw = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        raise MalformedError("not JSON") from None
    if not isinstance(raw, dict):
        raise MalformedError("not an object")
    request_id = raw.get("id")
    if isinstance(request_id, bool) or not isinstance(request_id, (int, str, type(None))):
        raise MalformedError("id is a number, a text or null")
    return Request(request_id, raw.get("v"), raw.get("verb"), raw.get("args", {}))


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def answer_line(request_id: object, result: Mapping[str, Any]) -> bytes:
    answer = {"v": PROTOCOL_VERSION, "id": request_id, "ok": True, "result": result}
    return json.dumps(answer).encode() + b"\n"


def error_line(request_id: object, code: ErrorCode, message: str) -> bytes:
    error = {"code": code.value, "message": message}
    return json.dumps({"v": PROTOCOL_VERSION, "id": request_id, "ok": False, "error": error}).encode() + b"\n"


# arguments


@dataclass(frozen=True, slots=True)
class Arg:
    """One argument of a verb. `read` checks and converts it; its ValueError ends "`name` ..."."""

    name: str
    read: Callable[[object], Any]
    doc: str
    required: bool = False


def read_args(known: tuple[Arg, ...], given: object) -> dict[str, Any]:
    """Every known argument by name, converted, None where it was not given. Raises VerbError."""
    if not isinstance(given, dict):
        raise VerbError(ErrorCode.BAD_ARGUMENT, "args is an object")
    names = {arg.name for arg in known}
    for name in given:
        if name not in names:
            said = ", ".join(sorted(names)) or "none"
            raise VerbError(ErrorCode.BAD_ARGUMENT, f"unknown argument {name[:60]!r} (known: {said})")
    out: dict[str, Any] = {}
    for arg in known:
        value = given.get(arg.name)
        if value is None:
            if arg.required:
                raise VerbError(ErrorCode.BAD_ARGUMENT, f"{arg.name} is missing: {arg.doc}")
            out[arg.name] = None
            continue
        try:
            out[arg.name] = arg.read(value)
        except BadValueError as error:
            write = f", for example {error.write}" if error.write else ""
            raise VerbError(ErrorCode.BAD_ARGUMENT, f"{arg.name} {error.message}{write}") from None
        except ValueError as error:
            raise VerbError(ErrorCode.BAD_ARGUMENT, f"{arg.name} {error}") from None
    return out


def text(value: object) -> str:
    if not isinstance(value, str) or not value or len(value) > 4096 or "\0" in value:
        raise ValueError("is a text")
    return value


def flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("is true or false")
    return value


def table(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("is an object")
    return value


def duration(value: object) -> int:
    """In ns: "5s"."""
    if not isinstance(value, str):
        raise ValueError('is a duration with its unit, "5s"')
    return parse_duration(value)


def integer(low: int, high: int) -> Callable[[object], int]:
    def read(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"is a whole number from {low} to {high}")
        return value

    return read


def choice(*words: str) -> Callable[[object], str]:
    def read(value: object) -> str:
        if not isinstance(value, str) or value not in words:
            raise ValueError(f"is one of {', '.join(words)}")
        return value

    return read


def several(read: Callable[[object], Any], most: int = 64) -> Callable[[object], list[Any]]:
    """A list of them, or one alone."""

    def read_all(value: object) -> list[Any]:
        items = value if isinstance(value, list) else [value]
        if not items or len(items) > most:
            raise ValueError(f"has 1 to {most} items")
        return [read(item) for item in items]

    return read_all
