"""Routing: precedence, paths with two readings, redirects."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.config.loader import parse
from tidegate.config.model import FixedAnswer, HeaderEdits, Listener, PathRule, Redirect, Route
from tidegate.http.paths import decode_soft, readings, remove_dot_segments
from tidegate.http.request import Request, RequestParser, RequestRules
from tidegate.http.routes import Kind, RouteError, Routes, location

LISTENER = parse(
    '[[listener]]\naddress = "127.0.0.1:8080"\nprotocol = "http"\ncluster = "app"\n'
    '[cluster.app]\nbackends = ["127.0.0.1:9000"]\n',
    allow_pending=True,
).listeners[0]


def listener(*routes: Route, cluster: str = "app") -> Listener:
    return replace(LISTENER, routes=routes, cluster=cluster)


def request(host: str = "a.example", target: str = "/", method: str = "GET") -> Request:
    head = f"{method} {target} HTTP/1.1\r\nHost: {host}\r\n\r\n"
    parsed = RequestParser(RequestRules(b"http")).receive_head(head.encode())
    assert parsed is not None
    return parsed


def found(routes: Routes, host: str = "a.example", target: str = "/", method: str = "GET") -> str:
    action = routes.find(request(host, target, method))
    return action.cluster or f"{action.kind.name} {action.status}"


def rule(kind: str, value: str, **other: str) -> Route:
    return Route(path=PathRule(kind, value), **other)  # type: ignore[arg-type]


def test_no_routes() -> None:
    assert found(Routes(listener())) == "app"
    assert found(Routes(listener(cluster=""))) == "NOT_FOUND 404"


def test_hosts_by_precedence() -> None:
    routes = Routes(
        listener(
            Route(host="*.example", cluster="wide"),
            Route(host="*.b.example", cluster="narrow"),
            Route(host="a.b.example", cluster="exact"),
            Route(host="[2001:db8:0::1]", cluster="six"),
        )
    )
    for host, cluster in [
        ("a.b.example", "exact"),
        ("A.B.Example.:8080", "exact"),
        ("x.b.example", "narrow"),
        ("x.y.b.example", "narrow"),
        ("b.example", "wide"),
        ("x.c.example", "wide"),
        ("example", "app"),
        ("notexample", "app"),
        ("[2001:db8::1]:80", "six"),
    ]:
        assert found(routes, host) == cluster, host


def test_paths_by_precedence() -> None:
    routes = Routes(
        listener(
            rule("prefix", "/", cluster="root"),
            rule("prefix", "/api", cluster="api"),
            rule("prefix", "/api/v1", cluster="v1"),
            rule("prefix", "/static/", cluster="below"),
            rule("regex", r"\.php$", cluster="php"),
            rule("regex", r"^/api/.*\.php$", cluster="later"),
            rule("exact", "/api/v1/x.php", cluster="exact"),
            rule("exact", "/api", cluster="exactly"),
        )
    )
    for path, cluster in [
        ("/", "root"),
        ("/api", "exactly"),
        ("/api?x", "exactly"),
        ("/api/", "api"),
        ("/apix", "root"),
        ("/api/v1", "v1"),
        ("/api/v1/", "v1"),
        ("/api/v1/a/b/c/d/e", "v1"),
        ("/api/v12", "api"),
        ("/static", "root"),
        ("/static/", "below"),
        ("/static/a/b", "below"),
        ("/api/v1/x.php", "exact"),
        ("/api/v1/y.php", "php"),
        ("/api/v1/y.php?z.html", "php"),
        ("/zzz", "root"),
    ]:
        assert found(routes, target=path) == cluster, path


def test_methods_before_none_and_only_within_their_rule() -> None:
    routes = Routes(
        listener(
            rule("prefix", "/api", cluster="any"),
            rule("prefix", "/api", method="POST", cluster="posts"),
            rule("prefix", "/api/v1", method="PUT", cluster="puts"),
        )
    )
    assert found(routes, target="/api/v1", method="PUT") == "puts"
    assert found(routes, target="/api/v1", method="POST") == "posts"
    assert found(routes, target="/api/v1", method="GET") == "any"
    assert found(routes, target="/", method="PUT") == "app"


def test_a_host_whose_routes_do_not_fit_leaves_it_to_the_wider_ones() -> None:
    routes = Routes(
        listener(
            Route(host="a.example", path=PathRule("prefix", "/x"), cluster="ax"),
            Route(host="*.example", path=PathRule("prefix", "/y"), cluster="wy"),
            rule("exact", "/z", cluster="z"),
            cluster="",
        )
    )
    assert [found(routes, target=path) for path in ("/x", "/y", "/z", "/")] == [
        "ax",
        "wy",
        "z",
        "NOT_FOUND 404",
    ]


def test_the_first_of_equal_rules_wins() -> None:
    routes = Routes(listener(Route(host="a.example", cluster="one"), Route(host="a.example", cluster="two")))
    assert found(routes) == "one"


def test_the_asterisk_fits_routes_without_a_path() -> None:
    routes = Routes(
        listener(rule("prefix", "/", cluster="paths"), Route(method="OPTIONS", cluster="options"))
    )
    assert found(routes, target="*", method="OPTIONS") == "options"


DENYING = Routes(
    listener(
        rule("prefix", "/admin", deny=403),  # type: ignore[arg-type]
        rule("prefix", "/public", cluster="public"),
    )
)


@pytest.mark.parametrize(
    "target",
    [
        "/public/../admin",
        "/public/%2e%2e/admin",
        "/public/.%2E/admin/x",
        "/public%2F..%2Fadmin",
        "/public/..%2fadmin",
        "/public/..;/admin",
        "/public/..;a=b/admin",
        "/public/..\\admin",
        "/public\\..\\admin",
        "/public/%5c../admin" + "/../../admin",
        "//admin",
        "/./admin",
        "/x/../admin",
        "/admin;x",
        "/admin%2Fx",
        "/%2Fadmin",
    ],
)
def test_a_path_with_two_readings_cannot_walk_around_a_route(target: str) -> None:
    assert found(DENYING, target=target) in ("AMBIGUOUS 400", "DENY 403")


@pytest.mark.parametrize(
    "target", ["/admin", "/%61dmin", "/admin/..a", "/admin/%C3%A9", "/admin/./x", "/admin//x"]
)
def test_a_path_with_one_meaning_is_denied(target: str) -> None:
    assert found(DENYING, target=target) == "DENY 403"


@pytest.mark.parametrize(
    "target",
    [
        "/public/a%20b",
        "/public/%C3%A9",
        "/public/a/../b",
        "/public//a",
        "/public/a%2Fb",
        "/public/;x=1",
        "/public/.well",
    ],
)
def test_a_path_whose_readings_agree_is_routed(target: str) -> None:
    assert found(DENYING, target=target) == "public"


def test_rules_may_be_written_with_escapes() -> None:
    routes = Routes(
        listener(rule("exact", "/caf%C3%A9", cluster="cafe"), rule("prefix", "/a%62", cluster="ab"))
    )
    assert found(routes, target="/caf%c3%a9") == "cafe"
    assert found(routes, target="/ab/x") == "ab"


def test_without_path_rules_any_path_goes_through() -> None:
    routes = Routes(listener(Route(host="a.example", cluster="a")))
    assert found(routes, target="/x/../..;/%2F//y") == "a"


@given(st.text(alphabet="/.a%2eEfF5cC;\\", max_size=40))
@settings(deadline=None)
def test_readings_are_few_and_settled(text: str) -> None:
    path = b"/" + text.encode()
    forms = readings(path)
    assert decode_soft(path) in forms
    assert len(forms) <= 32
    assert any(remove_dot_segments(form) == form or b"/." in form for form in forms)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/a/b/../c", "/a/c"),
        ("/../a", "/a"),
        ("/a/.", "/a/"),
        ("/a/..", "/"),
        ("/./", "/"),
        ("/a//../b", "/a/b"),
    ],
)
def test_dot_segments(path: str, expected: str) -> None:
    assert remove_dot_segments(path.encode()) == expected.encode()


@pytest.mark.parametrize(
    ("to", "path", "target", "expected"),
    [
        ("https", None, "/x?y=1", "https://a.example/x?y=1"),
        ("https://b.example", None, "/x?y=1", "https://b.example/x?y=1"),
        ("https://b.example/", None, "/x", "https://b.example/x"),
        ("https://b.example:81/base", None, "/x?y", "https://b.example:81/base/x?y"),
        ("/new", PathRule("prefix", "/old"), "/old/x?y", "/new/x?y"),
        ("/new", PathRule("prefix", "/old"), "/old", "/new"),
        ("/", PathRule("prefix", "/old"), "/old/x", "/x"),
        ("/new", PathRule("exact", "/old"), "/old?y", "/new?y"),
        ("/new?a=b", PathRule("exact", "/old"), "/old?y", "/new?a=b&y"),
        ("https://b.example", PathRule("exact", "/old"), "/old?y", "https://b.example/old?y"),
    ],
)
def test_locations(to: str, path: PathRule | None, target: str, expected: str) -> None:
    routes = Routes(listener(Route(path=path, redirect=Redirect(to, 308))))
    asked = request("a.example:8080", target)
    action = routes.find(asked)
    assert (action.kind, action.status) == (Kind.REDIRECT, 308)
    assert location(action, asked, b"local") == expected.encode()


def test_rewrites_belong_to_their_route() -> None:
    edits = HeaderEdits(set=(("X-A", "1"),))
    routes = Routes(
        listener(
            Route(
                path=PathRule("prefix", "/api"),
                strip_prefix=True,
                rewrite_host="inner.example",
                request_headers=edits,
                response_headers=edits,
                cluster="api",
            ),
            Route(path=PathRule("prefix", "/plain"), cluster="plain"),
        ),
        {"api": "STICK", "app": "APP"},
    )
    action = routes.find(request(target="/api/x"))
    assert action.rewrite is not None
    assert (action.rewrite.strip, action.rewrite.host, action.rewrite.cookie) == (
        b"/api",
        b"inner.example",
        b"STICK",
    )
    assert action.rewrite.edits is not None and action.response_edits is not None
    assert routes.find(request(target="/plain")).rewrite is None
    default = routes.find(request(target="/other")).rewrite
    assert default is not None and default.cookie == b"APP"


def test_fixed_answers() -> None:
    answer = FixedAnswer(200, "ok")
    action = Routes(listener(Route(answer=answer))).find(request())
    assert (action.kind, action.answer) == (Kind.ANSWER, answer)


@pytest.mark.parametrize(
    "route",
    [
        Route(),
        Route(host="a.example:80", cluster="x"),
        Route(host="a b", cluster="x"),
        Route(path=PathRule("regex", "("), cluster="x"),
        Route(redirect=Redirect("/a\r\nX: y")),
        Route(rewrite_host="a/b", cluster="x"),
        Route(answer=FixedAnswer(200, "", "text\n")),
    ],
)
def test_routes_that_cannot_be_compiled(route: Route) -> None:
    with pytest.raises(RouteError):
        Routes(listener(route))


def test_a_path_of_a_thousand_segments_is_cut_to_the_depth_of_the_rules() -> None:
    routes = Routes(listener(rule("prefix", "/a/b", cluster="ab")))
    assert found(routes, target="/a/b" + "/x" * 3000) == "ab"
    assert found(routes, target="/a" + "/x" * 3000) == "app"
