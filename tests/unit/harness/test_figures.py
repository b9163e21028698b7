"""Rounds, ratios, tables; what is read from other programs' reports."""

from __future__ import annotations

import math

import pytest
from harness import wrk
from harness.rounds import Rounds, play, table
from harness.sessions import excess

REPORT = """Running 1s test @ http://127.0.0.1:1/
  1 threads and 32 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   651.10us  605.20us   6.05ms   94.80%
    Req/Sec    53.35k     6.75k   56.63k    90.91%
  Latency Distribution
     50%  651.00us
     75%    1.20ms
     90%    2.00ms
     99%    1.50s
  58379 requests in 1.10s, 10.80MB read
  Socket errors: connect 0, read 3, write 1, timeout 2
  Non-2xx or 3xx responses: 7
Requests/sec:  53071.29
Transfer/sec:      9.82MB
"""


def test_wrk_report() -> None:
    seen = wrk.parse(REPORT)
    assert (seen.requests, seen.rate, seen.p50_us, seen.p99_us, seen.errors) == (
        58379, 53071.29, 651.0, 1_500_000.0, 13,
    )  # fmt: skip
    with pytest.raises(ValueError):
        wrk.parse("unable to connect to 127.0.0.1:1 Connection refused")


def test_rounds_alternate_their_order_and_compare_within_a_round() -> None:
    order: list[str] = []
    speed = iter([100.0, 50.0, 30.0, 60.0])  # a, b, then b, a on a machine grown slower

    def contestant(name: str) -> dict[str, float]:
        order.append(name)
        return {"rate": next(speed)}

    result = play({"a": lambda: contestant("a"), "b": lambda: contestant("b")}, 2, quiet=True)
    assert order == ["a", "b", "b", "a"]
    assert result.ratios("b", "a", "rate") == [0.5, 0.5]
    assert result.median("a", "rate") == 80.0
    text = table(
        result, "t", [("rate", "conn/s", ".0f"), ("none", "nil", ".0f")], ratio_of="rate", reference="a"
    )
    assert text.splitlines()[3].split() == ["b", "40", "-", "0.50", "0.50-0.50"]
    assert all(len(line) < 80 for line in text.splitlines())


def test_a_figure_nobody_has_is_not_a_number() -> None:
    assert math.isnan(Rounds(["a"]).median("a", "rate"))


def test_excess() -> None:
    assert excess([10, 10]) == 0
    assert excess([15, 5]) == 0.5
    assert excess([0, 0]) == 0
