"""The count of arrivals: never too large, exact when all is quiet, the costly way only while it is needed."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate_tools.arrivals import ENOUGH, FIRST_PAUSE_NS, RECHECK_NS, Arrivals, Look

S = 1_000_000_000


@dataclass
class Service:
    """What happens to a service, and what the programs would count of it."""

    at_ns: int = 0
    waiting: int = 0
    taken: int = 0
    untimed: int = 0
    arrived: int = 0
    counted: int = 0
    elsewhere: int = 0  # connections of others in its network namespace
    counting: bool = True

    def arrive(self) -> None:
        self.arrived += 1
        self.waiting += 1
        self.counted += self.counting

    def accept(self, timed: bool = True) -> None:
        if self.waiting:
            self.waiting -= 1
            self.taken += timed
            self.untimed += not timed

    def do(self, events: str) -> None:
        """a: arrives, t: is taken, u: is taken untimed, e: elsewhere."""
        for event in events:
            if event == "a":
                self.arrive()
            elif event == "e":
                self.elsewhere += 1
            else:
                self.accept(timed=event == "t")

    def look(self, between: tuple[str, str, str, str] = ("", "", "", "")) -> Look:
        """What is read, with things happening between the readings."""
        opened = self.arrived + self.elsewhere
        self.do(between[0])
        counted = self.counted
        self.do(between[1])
        taken = self.taken
        self.do(between[2])
        waiting = self.waiting
        self.do(between[3])
        return Look(self.at_ns, opened, counted, taken, waiting, self.taken, self.counted)


class Bench:
    def __init__(self, waiting: int = 0, between: tuple[str, str, str, str] = ("", "", "", "")) -> None:
        self.service = Service(waiting=waiting)
        self.arrivals = Arrivals(self.service.look(between))

    def look(self, seconds: float = 1.0, between: tuple[str, str, str, str] = ("", "", "", "")) -> None:
        self.service.at_ns += int(seconds * S)
        self.arrivals.look(self.service.look(between))
        self.service.counting = self.arrivals.counting


def test_a_service_that_asks_is_known_after_enough() -> None:
    bench = Bench()
    bench.service.do("at" * (ENOUGH - 1))
    bench.look()
    assert bench.arrivals.counting
    bench.service.do("at")
    bench.look()
    assert not bench.arrivals.counting
    assert bench.arrivals.arrived == ENOUGH
    bench.service.do("aaatt")
    bench.look()
    assert (bench.arrivals.arrived, bench.arrivals.untimed) == (ENOUGH + 3, 0)
    bench.service.do("t")
    bench.look()
    assert bench.arrivals.arrived == ENOUGH + 3


def test_between_looks_it_is_known_as_soon() -> None:
    bench = Bench(waiting=5)
    service = bench.service
    service.do("at" * ENOUGH)
    assert not bench.arrivals.settle(service.taken, service.counted), "5 of those taken may be older"
    service.do("t" * 5)
    assert bench.arrivals.settle(service.taken, service.counted)
    service.counting = False
    assert not bench.arrivals.counting
    service.do("at" * 10)
    bench.look()
    assert bench.arrivals.arrived == ENOUGH + 10


def test_one_that_never_asks_is_counted_for_good() -> None:
    bench = Bench()
    for round_ in range(1, 10):
        bench.service.do("au" * 50)
        assert not bench.arrivals.settle(bench.service.taken, bench.service.counted)
        bench.look()
        assert bench.arrivals.counting
        assert (bench.arrivals.arrived, bench.arrivals.untimed) == (50 * round_, 50 * round_)


def test_what_waited_before_is_accepted_and_not_established() -> None:
    bench = Bench(waiting=7)
    bench.service.do("tttttatt")
    bench.look()
    assert (bench.arrivals.arrived, bench.arrivals.untimed, bench.service.taken) == (1, 0, 7)


def known(bench: Bench) -> None:
    bench.service.do("at" * ENOUGH)
    bench.look()
    assert not bench.arrivals.counting


def test_a_second_listener_that_does_not_ask_is_found_out() -> None:
    bench = Bench()
    known(bench)
    bench.service.do("au" * 3)  # nobody sees these
    bench.look()
    assert bench.arrivals.counting, "the namespace had more than that"
    assert bench.arrivals.arrived == ENOUGH
    bench.service.do("auatau")
    bench.look()
    assert (bench.arrivals.arrived, bench.arrivals.untimed) == (ENOUGH + 3, 2)
    for _ in range(20):
        bench.service.do("at" * 100)
        bench.look()
        assert bench.arrivals.counting, "from now on each one counts"
    assert bench.arrivals.arrived == ENOUGH + 3 + 2000


def test_others_in_the_namespace_cost_less_and_less() -> None:
    bench = Bench()
    known(bench)
    counted = 0
    for _ in range(1200):
        bench.service.do("ate")
        bench.look()
        counted += bench.arrivals.counting
    assert (bench.arrivals.arrived, bench.arrivals.untimed) == (ENOUGH + 1200, 0)
    assert RECHECK_NS / S <= counted < 40, "seconds of 1200"


def test_a_recheck_is_over_after_its_time() -> None:
    bench = Bench()
    known(bench)
    bench.service.do("e")
    bench.look()
    assert bench.arrivals.counting
    bench.look(RECHECK_NS / S + 0.1)
    assert not bench.arrivals.counting
    bench.look()
    assert not bench.arrivals.counting, "that one is accounted for"
    bench.service.do("e")
    bench.look(FIRST_PAUSE_NS / S)
    assert bench.arrivals.counting


events = st.text("aaattte", max_size=6)
steps = st.lists(
    st.tuples(st.text("aaattue", max_size=40), st.tuples(events, events, events, events)), max_size=30
)


@given(st.integers(0, 5), st.tuples(events, events, events, events), steps, st.booleans())
@settings(deadline=None, max_examples=300)
def test_never_too_many_whenever_it_is_read(
    waiting: int,
    first: tuple[str, str, str, str],
    steps: list[tuple[str, tuple[str, str, str, str]]],
    asks: bool,
) -> None:
    bench = Bench(waiting, first)
    service = bench.service
    before = 0
    for events, between in steps:
        service.do(events.replace("u", "t") if asks else events)
        bench.look(between=between)
        assert before <= bench.arrivals.arrived <= service.arrived
        assert service.taken - waiting <= bench.arrivals.arrived + len("".join(first)), "none from nowhere"
        assert 0 <= bench.arrivals.untimed <= service.untimed
        before = bench.arrivals.arrived
    if asks:
        while service.waiting:
            service.accept()
        bench.look()
        missed = sum(part.count("a") + part.count("t") for part in first)
        assert service.arrived - missed <= bench.arrivals.arrived, "all is quiet: exact but for the first"
        assert missed or bench.arrivals.arrived == service.arrived


@pytest.mark.parametrize("number", [ENOUGH, 5 * ENOUGH])
def test_under_load_it_is_known_too(number: int) -> None:
    """Something is always under way when it is read."""
    bench = Bench()
    bench.service.do("a" * 3 + "at" * number)
    bench.look(between=("at", "at", "at", "at"))
    assert not bench.arrivals.counting
