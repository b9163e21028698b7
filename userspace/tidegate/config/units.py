"""Values with units: durations, sizes and addresses, from text and back. Every failure is a BadValueError."""

from __future__ import annotations

import re
from decimal import Decimal
from difflib import get_close_matches
from ipaddress import IPv6Address, ip_address
from typing import Final

from tidegate.config.errors import BadValueError
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
_NUMBER: Final = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*([^\d\s.]*)", re.ASCII)
_LABEL: Final = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")


def parse_duration(text: str) -> int:
    """Nanoseconds of "200ms", "1.5h"; one number and one unit."""
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
    """The shortest text that parse_duration reads back as `ns`, in the largest unit that divides it."""
    return _format(ns, DURATION_UNITS, "s")


def parse_size(text: str) -> int:
    """Bytes of "256KiB", "1MB", "0"."""
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
    """The shortest text that parse_size reads back as `size`; powers of 1024 before powers of 1000."""
    if size and size % 1024 == 0:
        return _format(size, {name: n for name, n in SIZE_UNITS.items() if "i" in name or name == "B"}, "B")
    return _format(size, SIZE_UNITS, "B")


def parse_address(text: str, *, hosts: bool = False, unix: bool = False) -> Address:
    """An Address of "127.0.0.1:80" or "[::1]:80"; with `hosts` also "name:80", with `unix` "unix:/path"."""
    if text.startswith("unix:"):
        if not unix:
            raise BadValueError("a Unix socket cannot be used here", write='"127.0.0.1:8080"')
        return _unix(text[len("unix:") :])
    if unix and text.startswith("/"):
        raise BadValueError("a Unix socket is written with a prefix", write=f'"unix:{text}"')
    for scheme in ("http://", "https://", "tcp://"):
        if text.startswith(scheme):
            rest = text[len(scheme) :].split("/")[0]
            raise BadValueError(
                "an address has no scheme", write=f'"{rest if ":" in rest else rest + ":80"}"'
            )
    host, port = _split_port(text)
    if host.startswith("["):
        return Address(_ipv6(host), port)
    return Address(_ipv4_or_name(host, port, hosts), port)


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
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise BadValueError(f"is not a {what}", fix=f"write one number and one unit, as in {examples}")
    if text != match[1] + match[2]:
        raise BadValueError("has a space in it", write=f'"{match[1]}{match[2]}"')
    return match[1], match[2]


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
    return written.lower() in {name.lower(), name.lower().removesuffix("b")}


def _unix(path: str) -> Address:
    if not path.startswith("/"):
        raise BadValueError(
            "the path of a Unix socket must be absolute", write=f'"unix:/run/{path or "app.sock"}"'
        )
    if "\0" in path or len(path.encode()) > UNIX_PATH_MAX:
        raise BadValueError(f"the path of a Unix socket has at most {UNIX_PATH_MAX} bytes and no NUL")
    return Address("", 0, path)


def _split_port(text: str) -> tuple[str, int]:
    if text.count(":") > 1 and not text.startswith("["):
        bare = _bare_ipv6(text)
        raise BadValueError("an IPv6 address needs brackets", write=f'"{bare}"')
    host, colon, digits = text.rpartition(":")
    if not colon or (text.startswith("[") and "]" in digits):
        if text.isascii() and text.isdigit():
            raise BadValueError("has a port but no address", write=f'"0.0.0.0:{text}"')
        raise BadValueError("has no port", write=f'"{text or "127.0.0.1"}:8080"')
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 5 and 1 <= int(digits) <= 65535):
        raise BadValueError(f"{digits!r} is not a port: 1 to 65535", write=f'"{host or "0.0.0.0"}:8080"')
    if host in ("", "*"):
        raise BadValueError(
            "has no address", fix=f'write "0.0.0.0:{digits}" for IPv4, "[::]:{digits}" for IPv6'
        )
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
        raise BadValueError(f"{host} is not an IPv6 address", write='"[::1]:8080"') from None


def _ipv4_or_name(host: str, port: int, hosts: bool) -> str:
    try:
        return str(ip_address(host))
    except ValueError:
        pass
    wrong = host_name_error(host)
    if hosts:
        if wrong:
            raise BadValueError(f"{host!r} {wrong}", write=f'"127.0.0.1:{port}"')
        return host.lower()
    if wrong:
        raise BadValueError(f"{host!r} is not an IP address", write=f'"127.0.0.1:{port}"')
    raise BadValueError(f"{host!r} is a name: an IP address is needed here", write=f'"127.0.0.1:{port}"')
