"""The judge of stall tests condemns what it must and claims nothing in between."""

from __future__ import annotations

import pytest
from harness.evidence import AgeBounds, bounds, judge, require_histogram
from harness.plan import Attempt, Outcome
from harness.processes import Stopped

MS = 1_000_000
SPAN = Stopped(signalled_ns=990 * MS, since_ns=1000 * MS, until_ns=3000 * MS)


def attempt(name: str, at_ms: int, outcome: Outcome = Outcome.ANSWERED, decided_ms: int = 3100) -> Attempt:
    return Attempt(name, at_ms * MS, at_ms * MS, (at_ms + 1) * MS, (at_ms + 2) * MS, decided_ms * MS, outcome)


def test_bounds_come_from_the_clock_readings_around_connect_and_outcome() -> None:
    age = bounds(attempt("a", 2000), SPAN)
    assert (age.low_ns, age.high_ns) == (998 * MS, 1100 * MS)
    assert bounds(attempt("before", 900), SPAN).low_ns == 0
    assert bounds(attempt("after", 3050), SPAN).low_ns == 0


def test_stale_ones_served_and_fresh_ones_refused_are_named() -> None:
    old, new, between = attempt("old", 2000), attempt("new", 2700), attempt("between", 2550)
    verdict = judge([old, new, between], SPAN, 500 * MS, served={"new"})
    verdict.require()
    assert [len(verdict.must_refuse), len(verdict.must_serve), len(verdict.open)] == [1, 1, 1]
    with pytest.raises(AssertionError, match="1 of 1 stale connections were served"):
        judge([old, new], SPAN, 500 * MS, served={"old", "new"}).require()
    with pytest.raises(AssertionError, match="1 of 1 fresh connections were refused"):
        judge([old, new], SPAN, 500 * MS, served=set()).require()


def test_a_coarse_source_is_given_its_resolution() -> None:
    edge = attempt("edge", 2490)
    assert len(judge([edge], SPAN, 500 * MS, {"edge"}).stale_served) == 1
    assert not judge([edge], SPAN, 500 * MS, {"edge"}, resolution_ns=10 * MS).stale_served


def test_an_unknown_fate_is_no_evidence() -> None:
    silent = attempt("silent", 2000, Outcome.TIMEOUT)
    with pytest.raises(AssertionError, match="nobody knows"):
        judge([silent], SPAN, 500 * MS, served=set())
    silent.late, silent.late_ns = "reset", 3050 * MS
    judge([silent], SPAN, 500 * MS, served=set()).require()


def test_histograms_that_cannot_be_are_refused() -> None:
    one = attempt("x", 0)
    ages = [AgeBounds(one, 3, 5), AgeBounds(one, 9, 10)]
    require_histogram(ages, [0, 0, 1, 1, 0], 2, 13, 9)
    require_histogram(ages, [0, 1, 0, 1, 0], 2, 13, 9)
    with pytest.raises(AssertionError, match="lie below 4"):
        require_histogram(ages, [0, 2, 0, 0, 0], 2, 13, 9)
    with pytest.raises(AssertionError, match="in buckets"):
        require_histogram(ages, [0, 1, 0, 0, 0], 1, 4, 4)
    with pytest.raises(AssertionError, match="sum of ages"):
        require_histogram(ages, [0, 0, 1, 1, 0], 2, 20, 9)
    with pytest.raises(AssertionError, match="largest age"):
        require_histogram(ages, [0, 0, 1, 1, 0], 2, 13, 11)
