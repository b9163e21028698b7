"""Routing: a listener's routes compiled once, asked once per request.

Precedence, the most telling first: exact host, longest wildcard, any host; within it exact path, regex in the
order declared, longest prefix, any path; within that, a route for the method before one for all. The best
of *all* routes that match is taken: a host whose routes do not fit the path leaves it to the wider ones.
One lookup is a few dict probes: O(labels + path segments), whatever the number of routes (regexes apart).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Final

from tidegate.config.model import FixedAnswer, Listener, Route
from tidegate.errors import EXIT_USAGE, OperatorError
from tidegate.http.edits import Edits, compile_edits
from tidegate.http.errors import Fault, RequestError
from tidegate.http.head import VALUE_CHAR, parse_authority
from tidegate.http.headers import Rewrite
from tidegate.http.paths import AMBIGUOUS, behind_prefix, decode_soft, readings
from tidegate.http.request import Request

_LOCATION: Final = re.compile(rb"[!-~]+")


class RouteError(OperatorError):
    """A route that cannot be compiled."""

    exit_code = EXIT_USAGE


class Kind(IntEnum):
    """What to do with a request."""

    CLUSTER = 0
    REDIRECT = 1
    DENY = 2  # with `status`
    ANSWER = 3
    NOT_FOUND = 4  # 404: no route, and the listener has no cluster
    AMBIGUOUS = 5  # 400: the path's readings lead to different routes


class Action:
    """Where a route leads. Compared by identity: one object per route."""

    __slots__ = ("answer", "cluster", "kind", "matched", "response_edits", "rewrite", "status", "to")

    def __init__(self, kind: Kind, *, cluster: str = "", status: int = 0) -> None:
        self.kind = kind
        self.cluster = cluster
        self.status = status
        self.rewrite: Rewrite | None = None
        self.response_edits: Edits | None = None
        self.to = b""  # redirects: "https", a URL or a path
        self.answer: FixedAnswer | None = None
        self.matched: bytes | None = b""  # the part of the path the rule spelled out; None: all of it


NOT_FOUND: Final = Action(Kind.NOT_FOUND, status=404)
AMBIGUOUS_PATH: Final = Action(Kind.AMBIGUOUS, status=400)


class _Methods:
    """The actions of one (host, path) rule."""

    __slots__ = ("any", "named")

    def __init__(self) -> None:
        self.named: dict[bytes, Action] = {}
        self.any: Action | None = None

    def add(self, method: bytes, action: Action) -> None:
        # The first of two equal rules wins, as it does among regexes.
        if not method:
            self.any = self.any or action
        else:
            self.named.setdefault(method, action)

    def find(self, method: bytes) -> Action | None:
        return self.named.get(method, self.any)


class _Paths:
    """The path rules of one host."""

    __slots__ = ("deepest", "exact", "prefixes", "regexes", "unbound")

    def __init__(self) -> None:
        self.exact: dict[bytes, _Methods] = {}
        self.regexes: list[tuple[re.Pattern[bytes], _Methods]] = []
        self.prefixes: dict[bytes, _Methods] = {}
        self.deepest = 0  # slashes in the longest prefix
        self.unbound = _Methods()  # routes without a path

    @property
    def by_path(self) -> bool:
        return bool(self.exact or self.regexes or self.prefixes)

    def add(self, route: Route, action: Action) -> None:
        method = route.method.encode("ascii")
        rule = route.path
        if rule is None:
            self.unbound.add(method, action)
            return
        value = rule.value.encode("utf-8")
        if rule.kind != "regex":
            value = decode_soft(value)
        if rule.kind == "exact":
            action.matched = None
            self.exact.setdefault(value, _Methods()).add(method, action)
        elif rule.kind == "prefix":
            # "/" is every path; "/api/" is what lies below /api, "/api" is that and /api itself.
            key = value if value != b"/" else b""
            action.matched = value.rstrip(b"/")
            self.prefixes.setdefault(key, _Methods()).add(method, action)
            self.deepest = max(self.deepest, key.count(b"/"))
        else:
            for pattern, methods in self.regexes:
                if pattern.pattern == value:
                    methods.add(method, action)
                    return
            try:
                pattern = re.compile(value)
            except re.error as error:
                raise RouteError(f"path regex {rule.value!r}: {error}", "see Python's re syntax") from None
            methods = _Methods()
            methods.add(method, action)
            self.regexes.append((pattern, methods))

    def find(self, path: bytes, method: bytes) -> Action | None:
        methods = self.exact.get(path)
        if methods is not None:
            action = methods.find(method)
            if action is not None:
                return action
        for pattern, methods in self.regexes:
            if pattern.search(path) is not None:
                action = methods.find(method)
                if action is not None:
                    return action
        if self.prefixes and path.startswith(b"/"):
            action = self._find_prefix(path, method)
            if action is not None:
                return action
        return self.unbound.find(method)

    def _find_prefix(self, path: bytes, method: bytes) -> Action | None:
        prefixes = self.prefixes
        # No prefix is deeper than `deepest` slashes: what lies below is cut off first.
        parts = path.split(b"/", self.deepest + 1)
        if len(parts) > self.deepest + 1:
            cut = len(path) - len(parts[-1])  # just behind a slash
        else:
            methods = prefixes.get(path)
            if methods is not None:
                action = methods.find(method)
                if action is not None:
                    return action
            cut = path.rfind(b"/") + 1
        while cut > 0:
            for key in (path[:cut], path[: cut - 1]):
                methods = prefixes.get(key)
                if methods is not None:
                    action = methods.find(method)
                    if action is not None:
                        return action
            cut = path.rfind(b"/", 0, cut - 1) + 1
        return None


class Routes:
    """One listener's routes."""

    __slots__ = ("_any", "_by_path", "_default", "_exact", "_wildcards", "actions")

    def __init__(self, listener: Listener, sticky: Mapping[str, str] | None = None) -> None:
        """`sticky`: cluster name -> name of its sticky cookie. Raises RouteError, EditError."""
        sticky = sticky or {}
        self._exact: dict[bytes, _Paths] = {}
        self._wildcards: dict[bytes, _Paths] = {}
        self._any = _Paths()
        self._default = NOT_FOUND
        if listener.cluster:
            self._default = Action(Kind.CLUSTER, cluster=listener.cluster)
            cookie = sticky.get(listener.cluster, "").encode("ascii")
            if cookie:
                self._default.rewrite = Rewrite(cookie=cookie)
        self.actions: list[Action] = [self._default]
        for route in listener.routes:
            action = _compile(route, sticky)
            self.actions.append(action)
            self._paths(route.host).add(route, action)
        tables = [self._any, *self._exact.values(), *self._wildcards.values()]
        self._by_path = any(table.by_path for table in tables)

    def _paths(self, host: str) -> _Paths:
        if not host or host == "*":
            return self._any
        wildcard = host.startswith("*.")
        parsed = parse_authority((host[2:] if wildcard else host).encode("utf-8"))
        if parsed is None or parsed[1] is not None:
            raise RouteError(
                f"route host {host!r} is not a host name", 'write "a.example", "*.example" or ""'
            )
        return (self._wildcards if wildcard else self._exact).setdefault(parsed[0], _Paths())

    def find(self, request: Request) -> Action:
        """The action for a request. Never raises; the kinds that are refusals carry their status."""
        host, path, method = request.host, request.path, request.method
        if not self._by_path or AMBIGUOUS.search(path) is None:
            return self._find(host, path, method)
        actions = {self._find(host, reading, method) for reading in readings(path)}
        return actions.pop() if len(actions) == 1 else AMBIGUOUS_PATH

    def _find(self, host: bytes, path: bytes, method: bytes) -> Action:
        paths = self._exact.get(host)
        if paths is not None:
            action = paths.find(path, method)
            if action is not None:
                return action
        if self._wildcards:
            dot = host.find(b".")
            while dot >= 0:
                paths = self._wildcards.get(host[dot + 1 :])
                if paths is not None:
                    action = paths.find(path, method)
                    if action is not None:
                        return action
                dot = host.find(b".", dot + 1)
        return self._any.find(path, method) or self._default


def _compile(route: Route, sticky: Mapping[str, str]) -> Action:
    if route.cluster:
        action = Action(Kind.CLUSTER, cluster=route.cluster)
        cookie = sticky.get(route.cluster, "").encode("ascii")
        strip = b""
        if route.strip_prefix and route.path is not None and route.path.kind == "prefix":
            strip = decode_soft(route.path.value.encode("utf-8")).rstrip(b"/")
        host = route.rewrite_host.encode("utf-8")
        if host and parse_authority(host) is None:
            raise RouteError(
                f"rewrite_host {route.rewrite_host!r} is not a host", 'write "host" or "host:port"'
            )
        edits = compile_edits(route.request_headers)
        if cookie or strip or host or edits is not None:
            action.rewrite = Rewrite(strip=strip, host=host, cookie=cookie, edits=edits)
    elif route.redirect is not None:
        action = Action(Kind.REDIRECT, status=route.redirect.status)
        action.to = route.redirect.to.encode("utf-8")
        if _LOCATION.fullmatch(action.to) is None:
            raise RouteError(f"redirect to {route.redirect.to!r} is not a URL", "percent-encode other bytes")
    elif route.deny:
        action = Action(Kind.DENY, status=route.deny)
    elif route.answer is not None:
        action = Action(Kind.ANSWER, status=route.answer.status)
        action.answer = route.answer
        if re.fullmatch(VALUE_CHAR + rb"+", route.answer.content_type.encode("utf-8")) is None:
            raise RouteError("content_type holds a control character", "write it on one line")
    else:
        raise RouteError("a route leads nowhere", "give it cluster, redirect, deny or answer")
    action.response_edits = compile_edits(route.response_headers)
    return action


def ambiguous(request: Request) -> RequestError:
    """Why AMBIGUOUS_PATH was found: the first thing in the path that can be read in several ways."""
    target = request.raw_target
    doubt = AMBIGUOUS.search(request.path)
    at = max(target.find(request.path), 0) + (doubt.start() if doubt is not None else 0)
    error = RequestError(
        400, Fault.AMBIGUOUS_PATH, "the path can be read in ways that lead to different routes"
    )
    return error.blame(target, at, len(request.method) + 1)


def location(action: Action, request: Request, local: bytes) -> bytes:
    """The Location of a redirect; path and query are kept.

    "https": the same host without its port (`local` when an HTTP/1.0 client named none). A target without
    a path gets the request's path; one with a path takes the place of what the route's rule spelled out
    (a prefix, or the whole path).
    """
    to = action.to
    target = request.target if request.target != b"*" else b"/"
    if to == b"https":
        return b"https://%b%b" % (request.host or local, target)
    path, mark, query = target.partition(b"?")
    start = to.find(b"://")
    if to.startswith(b"/") or (start >= 0 and b"/" in to[start + 3 :]):
        path = b"" if action.matched is None else behind_prefix(path, action.matched)
    return _with_query(to.rstrip(b"/") + path if path else to, mark, query)


def _with_query(to: bytes, mark: bytes, query: bytes) -> bytes:
    if not mark:
        return to
    return b"%b%b%b" % (to, b"&" if b"?" in to else b"?", query)


def clusters_of(routes: Iterable[Action]) -> set[str]:
    """The clusters that routes lead to."""
    return {action.cluster for action in routes if action.kind == Kind.CLUSTER}
