"""Checks across tables: names and addresses used twice, clusters that are not there, files that do not match.

They look at the document as written rather than at finished objects, so that an error inside one listener
does not hide another between two.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from tidegate.config import defaults, units
from tidegate.config.errors import BadValueError, Path, show_path, show_value
from tidegate.config.kinds import absolute
from tidegate.config.schema import Section, Spot


def check(raw: dict[str, Any], section: Section) -> None:
    """All of them."""
    spot = section.spot
    listeners = [item for item in _list(raw.get("listener")) if isinstance(item, dict)]
    if "listener" not in raw:
        spot.error(
            "there is no [[listener]]: nothing to listen on",
            "write [[listener]] with address, protocol, cluster",
        )
    _count(len(listeners), section)
    _listeners_differ(raw, section)
    _clusters_exist(raw, section)
    _tcp_clusters(raw, section)
    _certificates(raw, spot)


def _count(listeners: int, section: Section) -> None:
    spot = section.spot.at("listener")
    workers = section.get("workers") or 1
    if listeners > defaults.MAX_LISTENERS:
        spot.error(
            f"{listeners} listeners, and {defaults.MAX_LISTENERS} is the limit", "run a second tidegate"
        )
    elif listeners * workers > defaults.MAX_SLOTS:
        spot.error(
            f"{listeners} listeners x {workers} workers are more than {defaults.MAX_SLOTS} sockets",
            f"write workers = {defaults.MAX_SLOTS // listeners}",
        )


def _listeners_differ(raw: dict[str, Any], section: Section) -> None:
    spot = section.spot
    addresses: dict[str, Path] = {}
    names: dict[str, Path] = {}
    metrics = section.get("metrics")
    if metrics is not None:
        addresses[str(metrics)] = ("metrics",)
    for path, listener in _listeners(raw):
        address = _address(listener.get("address"))
        name = listener.get("name") or address
        if address and address in addresses:
            first = addresses[address]
            spot.at(*path, "address").error(
                f"{address} is already taken by {show_path(first)} in line {spot.reading.lines.at(first)}",
                "give each its own address",
            )
        elif isinstance(name, str) and name in names:
            first = names[name]
            spot.at(*path, "name").error(
                f"the name {show_value(name)} is already taken in line {spot.reading.lines.at(first)}",
                "give each listener its own name",
            )
        if address:
            addresses.setdefault(address, (*path, "address"))
        if isinstance(name, str) and name:
            names.setdefault(name, (*path, "name"))


def _clusters_exist(raw: dict[str, Any], section: Section) -> None:
    clusters = raw.get("cluster")
    known = list(clusters) if isinstance(clusters, dict) else []
    for path, name in _uses(raw):
        if isinstance(name, str) and name and name not in known:
            fix = f"write [cluster.{name}] with backends"
            near = get_close_matches(name, known, 1)
            section.spot.at(*path).error(
                f"there is no cluster {show_value(name)}",
                f"did you mean {show_value(near[0])}?" if near else fix,
            )


def _tcp_clusters(raw: dict[str, Any], section: Section) -> None:
    """Settings of a cluster that need HTTP, on a cluster that a tcp listener uses."""
    clusters = raw.get("cluster")
    for _, listener in _listeners(raw):
        name = listener.get("cluster")
        if listener.get("protocol") != "tcp" or not isinstance(clusters, dict) or not isinstance(name, str):
            continue
        cluster = clusters.get(name)
        for key in ("sticky", "tls", "pool", "max_in_flight"):
            if isinstance(cluster, dict) and cluster.get(key, "off") != "off":
                section.spot.at("cluster", name, key).error(
                    f"{key} works on HTTP, and a tcp listener uses the cluster {show_value(name)}",
                    f"take out {key}, or give the tcp listener a cluster of its own",
                )


def _certificates(raw: dict[str, Any], spot: Spot) -> None:
    """Whether each certificate and key load, and belong together. Files that cannot be read were reported."""
    for path, listener in _listeners(raw):
        for index, pair in enumerate(_list(listener.get("certificate"))):
            if not isinstance(pair, dict):
                continue
            cert, key = pair.get("cert"), pair.get("key")
            if not (isinstance(cert, str) and isinstance(key, str) and cert and key):
                continue
            here = spot.at(*path, "certificate", index)
            cert_path, key_path = absolute(cert, here), absolute(key, here)
            if not (os.path.isfile(cert_path) and os.path.isfile(key_path)):
                continue
            if wrong := certificate_error(str(cert_path), str(key_path)):
                here.error(
                    f"the certificate cannot be used: {wrong}",
                    "cert and key are PEM files that belong together",
                )


def certificate_error(cert: str, key: str) -> str:
    """What is wrong with a certificate and its key, "" when nothing is."""
    asked = False

    def passphrase() -> str:
        nonlocal asked
        asked = True
        return ""

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, passphrase)
    except ssl.SSLError as error:
        if asked:
            return "the key has a passphrase, and nobody is there to type it"
        if error.reason == "KEY_VALUES_MISMATCH":
            return f"{key} is not the key of {cert}"
        return f"no certificate and key in PEM form ({error.reason or 'unknown format'})"
    except OSError as error:
        return str(error.strerror or error)
    return ""


def _uses(raw: dict[str, Any]) -> Iterator[tuple[Path, object]]:
    for path, listener in _listeners(raw):
        if "cluster" in listener:
            yield (*path, "cluster"), listener["cluster"]
        for index, route in enumerate(_list(listener.get("route"))):
            if isinstance(route, dict) and "cluster" in route:
                yield (*path, "route", index, "cluster"), route["cluster"]


def _listeners(raw: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    for index, listener in enumerate(_list(raw.get("listener"))):
        if isinstance(listener, dict):
            yield ("listener", index), listener


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _address(value: object) -> str:
    try:
        return str(units.parse_address(value)) if isinstance(value, str) else ""
    except BadValueError:
        return ""
