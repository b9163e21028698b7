from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.cluster.building import SECOND, address

from tidegate.cluster.health import (
    FIRST_WITHIN_NS,
    MAX_HEAD,
    Check,
    CheckResult,
    RiseFall,
    first_check_ns,
    next_check_ns,
)
from tidegate.config.model import Health, ProxyProtocol


def health(path: str = "/healthz", expect: tuple[int, ...] = (), interval: int = 5 * SECOND) -> Health:
    return Health(path, interval, 2 * SECOND, 2, 3, expect)


def verdict(answer: bytes, expect: tuple[int, ...] = (), end: bool = True) -> CheckResult | None:
    """The verdict, the same whether the answer comes whole or byte by byte."""
    results = []
    for pieces in ([answer], [answer[i : i + 1] for i in range(len(answer))]):
        check = Check(health(expect=expect), address("127.0.0.1:80"))
        result = None
        for piece in [*pieces, *([b""] if end else [])]:
            if piece or end:
                result = check.receive(piece)
            if result is not None:
                break
        results.append(result)
    assert results[0] == results[1]
    return results[0]


@pytest.mark.parametrize(
    ("answer", "expect", "result"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", (), CheckResult.OK),
        (b"HTTP/1.0 204 No Content\r\n", (), CheckResult.OK),
        (b"HTTP/1.1 299\r\n", (), CheckResult.OK),
        (b"HTTP/1.1 200 \n", (), CheckResult.OK),
        (b"HTTP/1.1 301 Moved\r\nLocation: /\r\n\r\n", (), CheckResult.STATUS),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", (), CheckResult.STATUS),
        (b"HTTP/1.1 200 OK\r\n\r\n", (204, 301), CheckResult.STATUS),
        (b"HTTP/1.1 301 Moved\r\n\r\n", (204, 301), CheckResult.OK),
        (b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", (), CheckResult.OK),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 500 No\r\n\r\n", (), CheckResult.STATUS),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", (), CheckResult.GARBAGE),
        (b"SSH-2.0-OpenSSH_9.2\r\n", (), CheckResult.GARBAGE),
        (b"HTTP/2 200\r\n", (), CheckResult.GARBAGE),
        (b"HTTP/1.1 20 OK\r\n", (), CheckResult.GARBAGE),
        (b"HTTP/1.1 2000 OK\r\n", (), CheckResult.GARBAGE),
        (b"HTTP/1.1 200OK\r\n", (), CheckResult.GARBAGE),
        (b"HTTP/1.1  200 OK\r\n", (), CheckResult.GARBAGE),
        (b"\r\nHTTP/1.1 200 OK\r\n", (), CheckResult.GARBAGE),
        (b"HTTP/1.1 200 OK", (), CheckResult.CLOSED),
        (b"HTTP", (), CheckResult.CLOSED),
        (b"", (), CheckResult.CLOSED),
        (b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n", (), CheckResult.CLOSED),
    ],
)
def test_what_an_answer_means(answer: bytes, expect: tuple[int, ...], result: CheckResult) -> None:
    assert verdict(answer, expect) is result


def test_an_endless_head_is_not_waited_for() -> None:
    assert verdict(b"HTTP/1.1 200 " + b"x" * MAX_HEAD, end=False) is CheckResult.GARBAGE
    assert verdict(b"HTTP/1.1 103 \r\n" + b"x: y\r\n" * (MAX_HEAD // 6), end=False) is CheckResult.GARBAGE


@given(st.binary(max_size=64))
def test_no_bytes_upset_the_check(answer: bytes) -> None:
    result = verdict(answer)
    assert result is not None
    assert result is not CheckResult.TIMEOUT


def test_what_a_check_sends() -> None:
    request = Check(health("/up?x=1"), address("app.internal:9000")).request
    assert request.startswith(b"GET /up?x=1 HTTP/1.1\r\nHost: app.internal:9000\r\n")
    assert request.endswith(b"Connection: close\r\n\r\n")
    assert b"Host: localhost\r\n" in Check(health(), address("unix:/run/a")).request
    assert b"Host: [::1]:80\r\n" in Check(health(), address("[::1]:80")).request
    assert Check(health(""), address("10.0.0.1:80")).request == b""


def test_a_backend_that_expects_a_proxy_header_gets_one() -> None:
    assert Check(health(""), address("10.0.0.1:80"), ProxyProtocol.V1).request == b"PROXY UNKNOWN\r\n"
    version2 = Check(health(), address("10.0.0.1:80"), ProxyProtocol.V2).request
    assert version2[:16] == bytes.fromhex("0d0a0d0a000d0a515549540a 20 00 0000")
    assert version2[16:].startswith(b"GET /healthz ")


def test_rise_and_fall() -> None:
    state = RiseFall(rise=2, fall=3)
    script = [(True, True), (False, True), (False, True), (True, True)]  # the streak was broken
    script += [(False, True), (False, True), (False, False)]
    script += [(True, False), (False, False), (True, False), (True, True)]
    for good, up in script:
        before = state.up
        assert state.note(good) is (before != up)
        assert state.up is up


def test_the_very_first_failure_takes_down() -> None:
    state = RiseFall(rise=2, fall=3)
    assert state.note(False)
    assert not state.up
    assert not state.note(True)
    assert state.note(True)
    assert not state.note(False)  # from now on it takes three


@given(st.integers(1, 5), st.integers(1, 5), st.lists(st.booleans(), max_size=60))
def test_a_state_changes_only_after_enough_in_a_row(rise: int, fall: int, results: list[bool]) -> None:
    state = RiseFall(rise, fall)
    state.note(True)
    for at, good in enumerate(results):
        if state.note(good):
            needed = rise if state.up else fall
            assert all(result is state.up for result in results[max(0, at + 1 - needed) : at + 1])
            assert at + 1 >= needed


def test_checks_are_spread() -> None:
    rng = Random(1)
    dues = {next_check_ns(0, 0, health(), rng) for _ in range(200)}
    assert len(dues) > 150
    assert min(dues) >= 4.5 * SECOND
    assert max(dues) <= 5.5 * SECOND
    assert next_check_ns(0, 9 * SECOND, health(), rng) == 9 * SECOND  # a check that outlasted the interval
    firsts = {first_check_ns(7, health(), rng) for _ in range(200)}
    assert min(firsts) >= 7 and max(firsts) <= 7 + FIRST_WITHIN_NS
    assert max(first_check_ns(0, health(interval=10), rng) for _ in range(50)) <= 10
