"""Values with units: durations, sizes and addresses, from text and back. Every failure is a BadValueError."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from difflib import get_close_matches
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from tidegate.config.errors import BadValueError, quoted
from tidegate.config.model import Address

DURATION_UNITS: Final = {
    "ns": 1,
    "us": 1_000,
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60 * 1_000_000_000,
    "h": 3600 * 1_000_000_000,
    "d": 86_400 * 1_000_000_000,
}
"""Nanoseconds in each unit a duration can be written in."""

SIZE_UNITS: Final = {
    "B": 1,
    "KB": 1000,
    "KiB": 1024,
    "MB": 1000**2,
    "MiB": 1024**2,
    "GB": 1000**3,
    "GiB": 1024**3,
}
"""Bytes in each unit a size can be written in."""

UNIX_PATH_MAX: Final = 107
"""Bytes of a Unix socket's path: sun_path holds 108 with its final NUL (unix(7))."""

_OTHER_DURATION_NAMES: Final = {
    "µs": "us",
    "μs": "us",
    "usec": "us",
    "msec": "ms",
    "millis": "ms",
    "milliseconds": "ms",
    "sec": "s",
    "secs": "s",
    "second": "s",
    "seconds": "s",
    "min": "m",
    "mins": "m",
    "minute": "m",
    "minutes": "m",
    "hr": "h",
    "hour": "h",
    "hours": "h",
    "day": "d",
    "days": "d",
}
_NUMBER: Final = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)([^\W\d_]*)")
_SCHEME: Final = re.compile(r"[a-z]+://")
_LABEL: Final = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")


def parse_duration(text: str) -> int:
    """Nanoseconds of "200ms", "1.5h"; one number and one unit."""
    _without_spaces(text, parse_duration)
    amount, unit = _amount(text, "duration", '"200ms", "10s", "1.5h"')
    if not unit:
        raise BadValueError(
            "a duration needs a unit", fix=f'write "{amount}s" for seconds, "{amount}ms" for milliseconds'
        )
    if unit not in DURATION_UNITS:
        known = _OTHER_DURATION_NAMES.get(unit.lower()) or (
            unit.lower() if unit.lower() in DURATION_UNITS else ""
        )
        units = ", ".join(DURATION_UNITS)
        raise BadValueError(f"unknown unit {unit!r} (known: {units})", write=f'"{amount}{known or "s"}"')
    return _exact(amount, DURATION_UNITS[unit], "ns")


def format_duration(ns: int) -> str:
    """Text that parse_duration reads back as `ns`, in the largest unit that fits; "60s" rather than "1m"."""
    units = {name: size for name, size in DURATION_UNITS.items() if size <= DURATION_UNITS["s"] or ns != size}
    return _format(ns, units, "s")


def parse_size(text: str) -> int:
    """Bytes of "256KiB", "1MB", "0"."""
    _without_spaces(text, parse_size)
    amount, unit = _amount(text, "size", '"256KiB", "4MiB", "1MB"')
    if not unit:
        if Decimal(amount) == 0:
            return 0
        raise BadValueError(
            "a size needs a unit", fix=f'write "{amount}KiB" for 1024-byte kilobytes, "{amount}B" for bytes'
        )
    if unit not in SIZE_UNITS:
        near = next(
            (name for name in ("KiB", "MiB", "GiB", "KB", "MB", "GB", "B") if _same_unit(name, unit)), ""
        )
        near = near or next(iter(get_close_matches(unit, SIZE_UNITS, 1)), "KiB")
        raise BadValueError(
            f"unknown unit {unit!r} (known: {', '.join(SIZE_UNITS)})", write=f'"{amount}{near}"'
        )
    return _exact(amount, SIZE_UNITS[unit], "B")


def format_size(size: int) -> str:
    """Text that parse_size reads back as `size`, in the largest unit that fits, powers of 1024 first."""
    if size and size % 1024 == 0:
        return _format(size, {name: n for name, n in SIZE_UNITS.items() if "i" in name or name == "B"}, "B")
    return _format(size, SIZE_UNITS, "B")


def parse_address(text: str, *, hosts: bool = False, unix: bool = False) -> Address:
    """An Address of "127.0.0.1:80" or "[::1]:80"; with `hosts` also "name:80", with `unix` "unix:/path"."""
    try:
        return _parse_address(text, hosts, unix)
    except _MeantError as bad:
        meant = bad.meant
        try:
            _parse_address(meant, hosts, unix)
        except BadValueError:  # more than one thing is wrong with it
            meant = "127.0.0.1:8080"
        raise BadValueError(bad.message, write=quoted(meant)) from None


def is_host_name(address: Address) -> bool:
    """Whether it takes name resolution to connect there."""
    if address.is_unix:
        return False
    try:
        ip_address(address.host)
    except ValueError:
        return True
    return False


def host_name_error(name: str) -> str:
    """What is wrong with a host name (RFC 1123, underscores allowed), "" when nothing is."""
    if not name:
        return "is empty"
    if not name.isascii():
        return "has other than ASCII characters: write its xn-- form"
    if len(name) > 253:
        return "is longer than 253 characters"
    labels = name.removesuffix(".").split(".")
    for label in labels:
        if not _LABEL.fullmatch(label):
            return f"has a bad label {label!r}"
    if labels[-1].isdigit():
        return "ends in a number, so it is no host name, and it is no IPv4 address either"
    return ""


def _amount(text: str, what: str, examples: str) -> tuple[str, str]:
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise BadValueError(f"is not a {what}", fix=f"write one number and one unit, as in {examples}")
    return match[1], match[2]


def _without_spaces(text: str, parse: Callable[[str], int]) -> None:
    """Refuse a good amount with spaces in it; with them left out, a bad one has its own error."""
    close = "".join(text.split())
    if close != text:
        parse(close)
        raise BadValueError("has a space in it", write=quoted(close))


def _exact(amount: str, unit: int, smallest: str) -> int:
    value = Decimal(amount) * unit
    if value != value.to_integral_value():
        raise BadValueError(f"is finer than 1{smallest}", write=f'"{max(1, round(value))}{smallest}"')
    return int(value)


def _format(value: int, units: dict[str, int], zero: str) -> str:
    if value == 0:
        return f"0{zero}"
    for name, size in sorted(units.items(), key=lambda item: -item[1]):
        if value % size == 0:
            return f"{value // size}{name}"
    raise AssertionError("every table of units has the unit 1")


def _same_unit(name: str, written: str) -> bool:
    return written.lower() in {name.lower(), name.lower().removesuffix("b"), name[0].lower()}


class _MeantError(BadValueError):
    """A bad address, and a guess at what was meant, which may be as bad."""

    def __init__(self, message: str, meant: str) -> None:
        super().__init__(message)
        self.meant = meant


def _parse_address(text: str, hosts: bool, unix: bool) -> Address:
    if text.startswith("unix:"):
        if not unix:
            raise _MeantError("a Unix socket cannot be used here", "127.0.0.1:8080")
        return _unix(text[len("unix:") :])
    if unix and text.startswith("/"):
        raise _MeantError("a Unix socket is written with a prefix", f"unix:{text}")
    if match := _SCHEME.match(text):
        rest = text[match.end() :].split("/")[0]
        raise _MeantError("an address has no scheme", rest if ":" in rest else f"{rest}:80")
    host, port = _split_port(text)
    if host.startswith("["):
        return Address(_ipv6(host), port)
    return Address(_ipv4_or_name(host, port, hosts), port)


def _unix(path: str) -> Address:
    if not path.startswith("/"):
        raise _MeantError("the path of a Unix socket must be absolute", f"unix:/run/{path or 'app.sock'}")
    if "\0" in path or len(path.encode()) > UNIX_PATH_MAX:
        what = f"the path of a Unix socket has at most {UNIX_PATH_MAX} bytes and no NUL"
        raise _MeantError(what, "unix:/run/app.sock")
    return Address("", 0, path)


def _split_port(text: str) -> tuple[str, int]:
    if text.count(":") > 1 and not text.startswith("["):
        raise _MeantError("an IPv6 address needs brackets", _bare_ipv6(text))
    host, colon, digits = text.rpartition(":")
    if not colon or "]" in digits:
        if text.isascii() and text.isdigit():
            raise _MeantError("has a port but no address", f"0.0.0.0:{text}")
        raise _MeantError("has no port", f"{text}:8080")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 5 and 1 <= int(digits) <= 65535):
        raise _MeantError(f"{digits!r} is not a port: 1 to 65535", f"{host}:8080")
    if host in ("", "*"):
        fix = f'write "0.0.0.0:{digits}" for IPv4, "[::]:{digits}" for IPv6'
        raise BadValueError("has no address", fix=fix)
    return host, int(digits)


def _bare_ipv6(text: str) -> str:
    """What somebody who left the brackets out may have meant."""
    host, _, port = text.rpartition(":")
    for candidate, digits in ((host, port), (text, "8080")):
        try:
            return f"[{IPv6Address(candidate)}]:{int(digits)}"
        except ValueError:
            continue
    return "[::1]:8080"


def _ipv6(host: str) -> str:
    try:
        return str(IPv6Address(host.removeprefix("[").removesuffix("]")))
    except ValueError:
        raise _MeantError(f"{host!r} is not an IPv6 address", "[::1]:8080") from None


def _ipv4_or_name(host: str, port: int, hosts: bool) -> str:
    try:
        return str(IPv4Address(host))
    except ValueError:
        pass
    wrong = host_name_error(host)
    if hosts and not wrong:
        return host.lower()
    what = (
        "is a name: an IP address is needed here" if not wrong else wrong if hosts else "is not an IP address"
    )
    raise _MeantError(f"{host!r} {what}", f"127.0.0.1:{port}")
