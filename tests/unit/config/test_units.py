"""Durations, sizes and addresses: exact values, round trips, and suggestions that can be taken."""

from __future__ import annotations

import tomllib
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tidegate.config import units
from tidegate.config.errors import BadValueError
from tidegate.config.model import Address


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("200ms", 200_000_000),
        ("1s", 1_000_000_000),
        ("10m", 600_000_000_000),
        ("1.5h", 5_400_000_000_000),
        ("1d", 86_400_000_000_000),
        ("0.1s", 100_000_000),  # exact, which binary fractions are not
        ("250us", 250_000),
        ("1ns", 1),
        ("0s", 0),
    ],
)
def test_durations(text: str, ns: int) -> None:
    assert units.parse_duration(text) == ns


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("256KiB", 262_144),
        ("4MiB", 4_194_304),
        ("1MB", 1_000_000),
        ("1.5KiB", 1536),
        ("1GiB", 1 << 30),
        ("7B", 7),
        ("0", 0),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert units.parse_size(text) == size


@settings(deadline=None)
@given(st.integers(0, 10**17))
def test_durations_come_back(ns: int) -> None:
    assert units.parse_duration(units.format_duration(ns)) == ns


@settings(deadline=None)
@given(st.integers(0, 10**14))
def test_sizes_come_back(size: int) -> None:
    assert units.parse_size(units.format_size(size)) == size


@pytest.mark.parametrize(
    ("ns", "text"),
    [(200 * 10**6, "200ms"), (60 * 10**9, "60s"), (600 * 10**9, "10m"), (0, "0s"), (86_400 * 10**9, "24h")],
)
def test_durations_are_shown_as_people_write_them(ns: int, text: str) -> None:
    assert units.format_duration(ns) == text


@pytest.mark.parametrize(
    ("text", "hosts", "unix", "address"),
    [
        ("127.0.0.1:80", False, False, Address("127.0.0.1", 80)),
        ("0.0.0.0:65535", False, False, Address("0.0.0.0", 65535)),
        ("[::1]:80", False, False, Address("::1", 80)),
        ("[0:0::0001]:80", False, False, Address("::1", 80)),
        ("unix:/run/app.sock", False, True, Address("", 0, "/run/app.sock")),
        ("App.Internal:9000", True, True, Address("app.internal", 9000)),
        ("my_service:9000", True, True, Address("my_service", 9000)),
    ],
)
def test_addresses(text: str, hosts: bool, unix: bool, address: Address) -> None:
    assert units.parse_address(text, hosts=hosts, unix=unix) == address
    assert units.parse_address(str(address), hosts=hosts, unix=unix) == address


@pytest.mark.parametrize(
    ("parse", "text", "write"),
    [
        (units.parse_duration, "10sec", '"10s"'),
        (units.parse_duration, "10 S", '"10s"'),
        (units.parse_duration, " 10s", '"10s"'),
        (units.parse_duration, "10µs", '"10us"'),
        (units.parse_duration, "10MS", '"10ms"'),
        (units.parse_duration, "5 minutes", '"5m"'),
        (units.parse_duration, "0.1ns", '"1ns"'),
        (units.parse_size, "64kb", '"64KB"'),
        (units.parse_size, "64k", '"64KiB"'),
        (units.parse_size, "64mib", '"64MiB"'),
        (units.parse_size, "1.5B", '"2B"'),
        (units.parse_address, "127.0.0.1", '"127.0.0.1:8080"'),
        (units.parse_address, "8080", '"0.0.0.0:8080"'),
        (units.parse_address, "::1:8080", '"[::1]:8080"'),
        (units.parse_address, "[::1]", '"[::1]:8080"'),
        (units.parse_address, "localhost:80", '"127.0.0.1:80"'),
        (units.parse_address, "127.0.0.1:0", '"127.0.0.1:8080"'),
        (units.parse_address, "127.0.0.1:65536", '"127.0.0.1:8080"'),
        (units.parse_address, "http://127.0.0.1:81/x", '"127.0.0.1:81"'),
        (units.parse_address, "256.1.1.1:80", '"127.0.0.1:80"'),
        (units.parse_address, "unix:/run/x", '"127.0.0.1:8080"'),
    ],
)
def test_bad_values_name_what_was_meant(parse: Callable[[str], object], text: str, write: str) -> None:
    with pytest.raises(BadValueError) as caught:
        parse(text)
    assert caught.value.write == write


@pytest.mark.parametrize("text", ["500", "0", "", "s", "1m30s", "-1s", "1e3s", "1_0s", "٣s", "1.s", "1..5s"])
def test_not_durations(text: str) -> None:
    with pytest.raises(BadValueError):
        units.parse_duration(text)


@pytest.mark.parametrize("text", ["500", "", "KiB", "-1B", "1e3B", "1KiBB"])
def test_not_sizes(text: str) -> None:
    with pytest.raises(BadValueError):
        units.parse_size(text)


@pytest.mark.parametrize(
    "text",
    ["", ":80", "*:80", "a b:80", "-a:80", "a..b:80", "1.2.3:80", "x:+80", "x:٨٠", "unix:", "unix:app", "/x"],
)
def test_not_backend_addresses(text: str) -> None:
    with pytest.raises(BadValueError):
        units.parse_address(text, hosts=True, unix=True)


def test_unix_paths_fit_into_sun_path() -> None:
    longest = "unix:/" + "x" * (units.UNIX_PATH_MAX - 1)
    assert units.parse_address(longest, unix=True).is_unix
    with pytest.raises(BadValueError):
        units.parse_address(longest + "x", unix=True)


@pytest.mark.parametrize(
    ("text", "name"),
    [("app.internal:1", True), ("127.0.0.1:1", False), ("[::1]:1", False), ("unix:/x", False)],
)
def test_host_names_are_told_from_addresses(text: str, name: bool) -> None:
    assert units.is_host_name(units.parse_address(text, hosts=True, unix=True)) is name


TEXTS = st.text(alphabet='0123456789.:[]/ abcdefkKMmiIBbsSunx"\\*é', max_size=20)


@settings(deadline=None)
@given(TEXTS, st.sampled_from(["address", "backend"]))
@example('unix:a"b', "backend")
def test_suggested_addresses_are_good(text: str, kind: str) -> None:
    backend = kind == "backend"
    try:
        units.parse_address(text, hosts=backend, unix=backend)
    except BadValueError as bad:
        if bad.write:
            meant = tomllib.loads(f"x = {bad.write}")["x"]
            units.parse_address(meant, hosts=backend, unix=backend)


@settings(deadline=None)
@given(TEXTS, st.sampled_from([units.parse_duration, units.parse_size]))
@example("5e 9", units.parse_duration)
def test_suggested_amounts_are_good(text: str, parse: Callable[[str], int]) -> None:
    for _ in range(2):  # a unit and then a fraction may be wrong: one is said at a time
        try:
            parse(text)
        except BadValueError as bad:
            if not bad.write:
                return
            text = tomllib.loads(f"x = {bad.write}")["x"]
    parse(text)
