from __future__ import annotations

import json
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.cluster.resolve import (
    LOOKUP_TIMEOUT_NS,
    MAX_ADDRESSES,
    REFRESH_NS,
    RETRY_NS,
    Lookups,
    question,
)

START = 10**12


def reply(number: int, *addresses: str) -> bytes:
    return json.dumps({"id": number, "addresses": addresses}).encode()


def asked(lookups: Lookups, now: int) -> dict[str, int]:
    return {host: number for number, host in lookups.due(now)}


@pytest.fixture
def lookups() -> Lookups:
    made = Lookups(Random(1))
    made.want(["a.test", "b.test"], START)
    return made


def test_new_names_are_asked_about_at_once_and_once(lookups: Lookups) -> None:
    assert set(asked(lookups, START)) == {"a.test", "b.test"}
    assert asked(lookups, START + 1) == {}


def test_an_answer_is_sorted_and_refreshed_after_the_interval(lookups: Lookups) -> None:
    number = asked(lookups, START)["a.test"]
    answer = lookups.receive(reply(number, "::1", "10.0.0.9", "10.0.0.10"), START + 5)
    assert answer is not None
    assert (answer.host, answer.addresses) == ("a.test", ("10.0.0.9", "10.0.0.10", "::1"))
    assert "a.test" not in asked(lookups, START + REFRESH_NS // 2)
    assert "a.test" in asked(lookups, START + 5 + int(REFRESH_NS * 1.1))


def test_failures_repeat_sooner_but_ever_more_rarely(lookups: Lookups) -> None:
    now = START
    waits = []
    for _ in range(8):
        number = asked(lookups, now)["a.test"]
        answer = lookups.receive(b'{"id": %d, "error": "no such name"}' % number, now)
        assert answer is not None
        assert (answer.addresses, answer.error) == ((), "no such name")
        before = now
        while "a.test" not in (again := asked(lookups, now)):
            now += RETRY_NS // 20
        waits.append(now - before)
        lookups.receive(b'{"id": %d, "error": "x"}' % again["a.test"], now)
        now += 2 * REFRESH_NS
    assert RETRY_NS // 2 <= waits[0] <= RETRY_NS * 1.05
    assert max(waits) <= REFRESH_NS * 1.05
    assert waits[-1] >= REFRESH_NS // 2


def test_a_question_without_an_answer_is_given_up_and_asked_again(lookups: Lookups) -> None:
    first = asked(lookups, START)["a.test"]
    now = START + LOOKUP_TIMEOUT_NS
    assert asked(lookups, now) == {}
    second = asked(lookups, now + RETRY_NS)["a.test"]
    assert second != first
    assert lookups.receive(reply(first, "10.0.0.1"), now) is None  # too late
    assert lookups.receive(reply(second, "10.0.0.2"), now) is not None


def test_names_nobody_wants_are_forgotten(lookups: Lookups) -> None:
    numbers = asked(lookups, START)
    lookups.want(["b.test"], START)
    assert lookups.receive(reply(numbers["a.test"], "10.0.0.1"), START) is None
    assert lookups.hosts == {"b.test"}
    lookups.want([], START)
    assert lookups.next_due_ns() is None


def test_a_dead_helper_fails_what_was_open(lookups: Lookups) -> None:
    asked(lookups, START)
    lookups.helper_died(START)
    assert set(asked(lookups, START + RETRY_NS)) == {"a.test", "b.test"}


def test_a_flood_of_addresses_is_cut(lookups: Lookups) -> None:
    number = asked(lookups, START)["a.test"]
    answer = lookups.receive(reply(number, *(f"10.0.{i >> 8}.{i & 255}" for i in range(5000))), START)
    assert answer is not None
    assert len(answer.addresses) == MAX_ADDRESSES
    assert answer.addresses[0] == "10.0.0.0"


@given(st.one_of(st.binary(max_size=60), st.from_regex(rb'\{"id": 1, "addresses": [^\n]{0,20}\}')))
def test_nonsense_from_the_helper_changes_nothing(line: bytes) -> None:
    lookups = Lookups(Random(1))
    lookups.want(["a.test"], START)
    asked(lookups, START)
    answer = lookups.receive(line, START)
    assert answer is None or answer.error or answer.addresses


def test_a_question_is_one_line() -> None:
    assert question(3, "a\nb") == b'{"id": 3, "host": "a\\nb"}\n'
