"""The keys of [[listener.route]]: conditions, edits, and one of four results."""

from __future__ import annotations

from typing import Final

from tidegate.config import defaults
from tidegate.config.composite import Sub
from tidegate.config.http_kinds import (
    HeaderMap,
    HeaderName,
    HeaderValue,
    HostAndPort,
    HostPattern,
    Method,
    Pattern,
    Target,
    UrlPath,
)
from tidegate.config.kinds import Flag, Number, Several, Text, name_error
from tidegate.config.model import FixedAnswer, HeaderEdits, PathRule, Redirect, Route
from tidegate.config.schema import REQUIRED, Key, Section, Table

PATH: Final = Table(
    "listener.route.path",
    "One of the three says which paths the route takes.",
    (
        Key("exact", UrlPath(), None, "This path and no other.", shown="not set"),
        Key(
            "prefix",
            UrlPath(),
            None,
            "Paths that begin with it, segment by segment: `/api` takes `/api` and `/api/x`, not `/apix`.",
            shown="not set",
        ),
        Key(
            "regex",
            Pattern(),
            None,
            "Paths in which it finds a match: anchor it with ^ and $.",
            shown="not set",
        ),
    ),
)
EDITS: Final = Table(
    "listener.route.request_headers",
    "Edits of header fields; `response_headers` has the same keys.",
    (
        Key("set", HeaderMap(), (), "Fields that replace those of the same name."),
        Key("add", HeaderMap(), (), "Fields added to those of the same name."),
        Key("remove", Several(HeaderName(), "header names", '["Cookie2"]'), (), "Fields taken out."),
    ),
)
REDIRECT_STATUSES: Final = (301, 302, 307, 308)
REDIRECT: Final = Table(
    "listener.route.redirect",
    "Send the client elsewhere.",
    (
        Key("to", Target(), REQUIRED, '`"https"` for the same URL over TLS, or a URL or path.'),
        Key("status", Number(301, 308), defaults.REDIRECT_STATUS, "301, 302, 307 or 308."),
    ),
)
ANSWER: Final = Table(
    "listener.route.answer",
    "Answer from the configuration.",
    (
        Key("status", Number(200, 599), REQUIRED, "The status of the answer."),
        Key("body", Text("string", '"ok"'), "", "Its body."),
        Key("content_type", HeaderValue(empty=False), defaults.ANSWER_CONTENT_TYPE, "Its Content-Type."),
    ),
)


def _check_path(section: Section) -> None:
    given = [name for name in PATH.names if name in section.written]
    if len(given) == 1:
        return
    what = "path is empty" if not given else f"path has {' and '.join(given)}, and they exclude each other"
    section.error(
        given[1] if given else "exact",
        what,
        'write one of { exact = "/x" }, { prefix = "/x" }, { regex = "^/x" }',
    )


def _path(section: Section) -> PathRule:
    kind = next(name for name in PATH.names if name in section.written)
    return PathRule(kind, section.get(kind))


def _check_redirect(section: Section) -> None:
    status = section.get("status")
    if status not in REDIRECT_STATUSES:
        section.error("status", f"status = {status}: is not a redirect's", "write 301, 302, 307 or 308")


_EDITS: Final = Sub(
    EDITS, lambda section: HeaderEdits(**section.attributes()), '{ set = { "X-Env" = "prod" } }'
)

ROUTE: Final = Table(
    "[[listener.route]]",
    "Where requests go that meet all its conditions. The most specific route wins: exact host, then longest "
    "wildcard, then none; exact path, then regex (in the order of the file), then longest prefix; with a "
    "method before without. Each has exactly one of `cluster`, `redirect`, `deny`, `answer`.",
    (
        Key("host", HostPattern(), "", "Condition: this host; `*.a.b` is any name below a.b.", shown="any"),
        Key(
            "path",
            Sub(PATH, _path, '{ prefix = "/api" }', _check_path),
            None,
            "Condition: these paths.",
            shown="any",
        ),
        Key("method", Method(), "", "Condition: this method.", shown="any"),
        Key(
            "cluster",
            Text("name of a cluster", '"app"', name_error),
            "",
            "Result: the cluster.",
            shown="not set",
        ),
        Key(
            "redirect",
            Sub(REDIRECT, lambda s: Redirect(**s.attributes()), '{ to = "https" }', _check_redirect),
            None,
            "Result: a redirect.",
        ),
        Key("deny", Number(400, 599), 0, "Result: this status, with tidegate's own answer.", shown="not set"),
        Key(
            "answer",
            Sub(ANSWER, lambda s: FixedAnswer(**s.attributes()), '{ status = 200, body = "ok" }'),
            None,
            "Result: this answer.",
        ),
        Key("strip_prefix", Flag(), False, "Take `path.prefix` off before the request goes on."),
        Key("rewrite_host", HostAndPort(), "", "The Host that the backend sees.", shown="the client's"),
        Key("request_headers", _EDITS, HeaderEdits(), "Edits on the way to the backend.", shown="none"),
        Key("response_headers", _EDITS, HeaderEdits(), "Edits on the way to the client.", shown="none"),
    ),
)

RESULTS: Final[tuple[str, ...]] = ("cluster", "redirect", "deny", "answer")
FORWARD_ONLY: Final = ("strip_prefix", "rewrite_host", "request_headers")


def check(section: Section) -> None:
    """What the keys of a route must be together."""
    given = [name for name in RESULTS if name in section.written]
    if not given:
        section.error(
            "cluster", "the route has no result", 'write one of cluster = "NAME", redirect, deny, answer'
        )
    for name in given[1:]:
        section.error(
            name, f"the route has {given[0]} and {name}, and it can have one result", f"take out {name}"
        )
    path: PathRule | None = section.get("path")
    if (
        section.get("strip_prefix")
        and "path" not in section.failed
        and (path is None or path.kind != "prefix")
    ):
        section.error(
            "strip_prefix", "strip_prefix needs a prefix to strip", 'write path = { prefix = "/api" }'
        )
    if given and "cluster" not in given:
        for name in FORWARD_ONLY:
            if section.has(name) and section.get(name) != section.default(name):
                section.error(name, f"{name} has no effect: {given[0]} sends nothing on", f"take out {name}")


ROUTES: Final = Sub(ROUTE, lambda section: Route(**section.attributes()), check=check)
