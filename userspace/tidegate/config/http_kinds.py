"""Kinds of values that mean something in HTTP: header fields, hosts, methods, patterns, statuses."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Any, Final
from urllib.parse import urlsplit

from tidegate.config import defaults
from tidegate.config.composite import read_value
from tidegate.config.errors import BadValueError, quoted, show_value
from tidegate.config.kinds import File, text_of
from tidegate.config.schema import FAILED, Kind, Spot
from tidegate.config.units import host_name_error

TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", re.ASCII)
"""RFC 9110, section 5.6.2."""

OURS: Final = {
    "connection": "",
    "content-length": "",
    "expect": "",
    "host": "rewrite_host",
    "keep-alive": "",
    "proxy-connection": "",
    "te": "",
    "trailer": "",
    "transfer-encoding": "",
    "upgrade": "",
    "via": "the listener's via",
}
"""Fields that say where a message ends or belong to one connection (RFC 9110, section 7.6), with the key that
sets them, if one does. tidegate writes them from what it parsed: an edit could make a backend see another
request."""

_FIELD_VALUE: Final = re.compile(r"[\t\x20-\x7e\x80-\U0010ffff]*")
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"})
_MAX_REGEX: Final = 1000


@dataclass(frozen=True, slots=True)
class HeaderName(Kind):
    """The name of a header field that may be edited."""

    @property
    def label(self) -> str:
        return "header name"

    def read(self, value: object, spot: Spot) -> Any:
        name = text_of(value, "a header name", '"X-Name"')
        if not TOKEN.fullmatch(name):
            better = re.sub(r"[^A-Za-z0-9-]+", "-", name.split(":")[0].strip()).strip("-")
            raise BadValueError("is not a header name", write=f'"{better or "X-Name"}"')
        if name.lower() in OURS:
            instead = OURS[name.lower()]
            raise BadValueError(
                "is a header that tidegate itself writes, so it cannot be edited",
                fix=f"use {instead}" if instead else "leave it out",
            )
        return name


@dataclass(frozen=True, slots=True)
class HeaderMap(Kind):
    """Header names and the values they get, as a tuple of pairs."""

    @property
    def label(self) -> str:
        return "table of header names and values"

    def read(self, value: object, spot: Spot) -> Any:
        if not isinstance(value, dict):
            raise BadValueError("a table of names and values is needed", write='{ "X-Env" = "prod" }')
        pairs = []
        for name, item in value.items():
            here = spot.at(name)
            good = _header_name(name, here)
            text = read_value(HeaderValue(), item, here)
            pairs.append((name, text) if good and text is not FAILED else None)
        seen = [name.lower() for name in value]
        for name in value:
            if seen.count(name.lower()) > 1:
                spot.at(name).error(
                    f"{name} is set twice: header names do not differ by case", "keep one of them"
                )
                return FAILED
        return FAILED if None in pairs else tuple(pairs)

    def show(self, value: Any) -> str:
        return "{}"


def _header_name(name: str, here: Spot) -> bool:
    try:
        HeaderName().read(name, here)
    except BadValueError as bad:
        here.error(f"{show_value(name)} {bad.message}", bad.fix or f"write {bad.write}")
        return False
    return True


@dataclass(frozen=True, slots=True)
class HeaderValue(Kind):
    """A field value: no control characters, CR, LF and NUL above all (RFC 9110, section 5.5)."""

    empty: bool = True

    @property
    def label(self) -> str:
        return "header value"

    def read(self, value: object, spot: Spot) -> Any:
        text = text_of(value, "a header value", '"..."')
        if not _FIELD_VALUE.fullmatch(text):
            raise BadValueError(
                "a header value has no line ends or control characters", fix="write it on one line"
            )
        if not text and not self.empty:
            raise BadValueError("is empty", fix="leave it out")
        if text != text.strip(" \t"):
            raise BadValueError(
                "has blanks at its ends, which HTTP does not keep", write=quoted(text.strip(" \t"))
            )
        return text


@dataclass(frozen=True, slots=True)
class HostPattern(Kind):
    """The host of a request: "www.example.org", "*.example.org" (one or more labels), an address."""

    @property
    def label(self) -> str:
        return "host or `*.host`"

    def read(self, value: object, spot: Spot) -> Any:
        text = text_of(value, "a host", '"www.example.org"')
        if text == "*":
            raise BadValueError("a route for every host has no host key", fix="leave host out")
        if re.fullmatch(r".*[^:]:\d+", text) and not text.endswith("]"):
            raise BadValueError(
                "has a port: routes look at the name alone", write=quoted(text.rpartition(":")[0])
            )
        _host(text.removeprefix("*."), '"www.example.org" or "*.example.org"')
        return text.lower()


@dataclass(frozen=True, slots=True)
class HostAndPort(Kind):
    """What a rewritten Host says: a host, a port if it is not the usual one; "" for none."""

    @property
    def label(self) -> str:
        return "host, or host and port"

    def read(self, value: object, spot: Spot) -> Any:
        text = text_of(value, "a host", '"app.internal"')
        match = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*)(?::(\d{1,5}))?", text)
        if match is None or (match[2] and not 1 <= int(match[2]) <= 65535):
            raise BadValueError("is not a host with or without a port", write='"app.internal:8080"')
        if text:
            _host(match[1], '"app.internal"')
        return text


def _host(name: str, example: str) -> None:
    if name.startswith("[") and name.endswith("]"):
        try:
            IPv6Address(name[1:-1])
        except ValueError:
            raise BadValueError("is not an IPv6 address", write='"[::1]"') from None
        return
    if re.fullmatch(r"\d{1,3}(\.\d{1,3}){3}", name):
        return
    if wrong := host_name_error(name):
        raise BadValueError(f"the host {wrong}", fix=f"write {example}")


@dataclass(frozen=True, slots=True)
class Method(Kind):
    """A method, by its exact spelling (RFC 9110, section 9.1)."""

    @property
    def label(self) -> str:
        return "method"

    def read(self, value: object, spot: Spot) -> Any:
        text = text_of(value, "a method", '"GET"')
        if not TOKEN.fullmatch(text):
            raise BadValueError("is not a method: one word", write='"GET"')
        if text not in _METHODS and text.upper() in _METHODS:
            raise BadValueError("methods are case-sensitive", write=f'"{text.upper()}"')
        return text


@dataclass(frozen=True, slots=True)
class UrlPath(Kind):
    """A path to compare with: absolute, without query."""

    @property
    def label(self) -> str:
        return "path"

    def read(self, value: object, spot: Spot) -> Any:
        text = text_of(value, "a path", '"/api"')
        if not text.startswith("/"):
            raise BadValueError("a path begins with /", write=quoted(f"/{text}"))
        if "?" in text or "#" in text:
            raise BadValueError(
                "routes look at the path without its query", write=quoted(re.split("[?#]", text)[0])
            )
        if not text.isascii() or not text.isprintable() or " " in text:
            raise BadValueError("has characters that a URL writes as %XX", fix="percent-encode it")
        return text


@dataclass(frozen=True, slots=True)
class Pattern(Kind):
    """A regular expression of Python's re, matched at the beginning of the path."""

    @property
    def label(self) -> str:
        return "regular expression"

    def read(self, value: object, spot: Spot) -> Any:
        text = text_of(value, "a regular expression", "'^/users/[0-9]+$'")
        if len(text) > _MAX_REGEX:
            raise BadValueError(f"is longer than {_MAX_REGEX} characters")
        try:
            with warnings.catch_warnings():
                # what Python means to read differently one day ("[[") is refused today
                warnings.simplefilter("error", FutureWarning)
                re.compile(text.encode("utf-8"))  # paths are bytes when they are matched
        except (re.error, RecursionError, OverflowError, FutureWarning) as error:
            raise BadValueError(
                f"is not a regular expression: {error}",
                fix="in TOML, 'single quotes' keep backslashes as they are",
            ) from None
        return text


@dataclass(frozen=True, slots=True)
class Target(Kind):
    """Where a redirect leads: "https", a URL or a path."""

    @property
    def label(self) -> str:
        return '`"https"`, a URL or a path'

    def read(self, value: object, spot: Spot) -> Any:
        text = text_of(value, "a target", '"https"')
        if text == "https":
            return text
        if not text.isascii() or not text.isprintable() or " " in text:
            raise BadValueError("has characters that a URL writes as %XX", fix="percent-encode it")
        if text.startswith("/") and not text.startswith("//"):
            return text
        try:
            url = urlsplit(text)
            good = url.scheme in {"http", "https"} and bool(url.hostname) and url.port != 0
        except ValueError:
            good = False
        if not good:
            raise BadValueError(
                'is not "https", an http(s) URL or a path', write='"https://www.example.org/"'
            )
        return text


@dataclass(frozen=True, slots=True)
class Answers(Kind):
    """Files for own answers by status, as a tuple of pairs."""

    @property
    def label(self) -> str:
        return "table of statuses and files"

    def read(self, value: object, spot: Spot) -> Any:
        if not isinstance(value, dict):
            raise BadValueError(
                "a table of statuses and files is needed", write='{ 503 = "/etc/tidegate/503.html" }'
            )
        pairs = []
        for name, item in value.items():
            here = spot.at(name)
            file = read_value(File(most=defaults.MAX_ANSWER_FILE), item, here)
            if not re.fullmatch("30[1278]|[45][0-9]{2}", name):
                here.error(
                    f"{name} is not the status of an error or a redirect",
                    "write a status from 400 to 599, or 301, 302, 307, 308",
                )
                file = FAILED
            pairs.append(None if file is FAILED else (int(name), file))
        return FAILED if None in pairs else tuple(sorted(pair for pair in pairs if pair))

    def show(self, value: Any) -> str:
        return "{}"
