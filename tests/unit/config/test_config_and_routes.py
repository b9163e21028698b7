"""What the configuration lets through, routing can compile: nothing fails in a worker only."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tidegate import config
from tidegate.config.errors import show_value
from tidegate.http.routes import Routes

TEXT = st.text(alphabet="aB1.*-:/[]()^$\\|{}?+_%#= \t\r\n\x00é\U0001f30a", max_size=8) | st.text(max_size=4)
HOST = TEXT | st.sampled_from(["a.b", "*.a.b", "[::1]", "10.0.0.1", "a_b.c", "a.b."])
PATH = st.builds(
    lambda kind, text: {kind: text}, st.sampled_from(["exact", "prefix", "regex"]), TEXT.map("/".__add__)
)
HEADERS = st.dictionaries(TEXT | st.sampled_from(["X-A", "Expect", "Cookie"]), TEXT, max_size=2)
EDITS = st.fixed_dictionaries(
    {}, optional={"set": HEADERS, "add": HEADERS, "remove": st.lists(TEXT, max_size=2)}
)
RESULT = st.one_of(
    st.just({"cluster": "app"}),
    st.builds(lambda to: {"redirect": {"to": to}}, TEXT.map("https://a/".__add__) | TEXT),
    st.builds(lambda text: {"answer": {"status": 200, "content_type": text}}, TEXT),
    st.just({"deny": 403}),
)
ROUTE = st.builds(
    lambda conditions, result: {**conditions, **result},
    st.fixed_dictionaries(
        {},
        optional={
            "host": HOST,
            "path": PATH,
            "rewrite_host": HOST,
            "method": TEXT,
            "response_headers": EDITS,
        },
    ),
    RESULT,
)


@settings(max_examples=600, deadline=None)
@given(ROUTE)
@example({"path": {"regex": "(?u)/a"}, "deny": 403})
@example({"response_headers": {"set": {"Expect": "x"}}, "deny": 403})
@example({"answer": {"status": 200, "content_type": ""}})
def test_whatever_is_let_through_compiles(route: dict[str, object]) -> None:
    text = (
        '[[listener]]\naddress = "127.0.0.1:8080"\nprotocol = "http"\n[[listener.route]]\n'
        + "".join(f"{key} = {show_value(value, 10**6)}\n" for key, value in route.items())
        + '[cluster.app]\nbackends = ["127.0.0.1:9000"]\n'
    )
    try:
        parsed = config.parse(text, "web.toml", allow_pending=True)
    except config.ConfigErrors:
        return
    Routes(parsed.listeners[0])
