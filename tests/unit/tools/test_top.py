"""The screens of `tidegate top` at two sizes, and what the keys do."""

from __future__ import annotations

import curses
import socket
from typing import Any

import pytest

from tidegate.kernel.sock_diag import ListenSocket
from tidegate_tools.owners import Owner
from tidegate_tools.queues import Queue, Source, Waiter
from tidegate_tools.top import press
from tidegate_tools.top_model import SORTS, History, Look, ordered
from tidegate_tools.top_view import HELP, Controls, Screen, Style, frame, rate

MS = 1_000_000
SIZES = [(80, 24), (132, 43)]


def queue(port: int, ages_ms: list[int], dead: int = 0) -> Queue:
    one = ListenSocket(socket.AF_INET, "127.0.0.1", port, 0, len(ages_ms), 128, 0, port, port, 1, False, 0)
    waiters = [
        Waiter(f"10.0.0.{i}:4000", f"127.0.0.1:{port}", age * MS, 0, Source.STAMP, 0, False, False, i)
        for i, age in enumerate(ages_ms)
    ]
    return Queue(f"127.0.0.1:{port}", "127.0.0.1", port, 0, "", [one], waiters, dead=dead)


def served(name: str, port: int, accepted: int, stale: int, bucket: int) -> dict[str, Any]:
    buckets = [0] * 40
    buckets[bucket] = accepted
    return {
        "name": name, "address": f"127.0.0.1:{port}", "protocol": "tcp", "cluster": "app", "slots": [0],
        "backlog": 4096, "stale_after_ms": 1000, "waiting": 0, "accepted": accepted, "sessions": 7,
        "queued": 0, "dropped": {"stale": stale, "client_gone": 0}, "ended": {"client_closed": 5},
        "age_histogram": {"count": accepted, "sum_ns": 0, "max_ns": 2 << bucket, "buckets": buckets},
    }  # fmt: skip


def status(step: int, workers: int = 2, backends: int = 2) -> dict[str, Any]:
    return {
        "version": "0.1.0", "pid": 9, "uptime_s": 100.0 + step, "config": "c", "control": "s",
        "queue_age": {"source": "bpf", "reason": ""}, "cgroup": "", "maps": {},
        "workers": [
            {"index": i, "pid": 10 + i, "state": "hung" if i == 1 else "active", "heartbeat_age_ms": 5,
             "restarts": 0, "sessions": 3, "queued": 0, "waiting": 0, "thefts": 1}
            for i in range(workers)
        ],
        "listeners": [
            served("web", 80, 1000 + 500 * step, 10 * step, 20),
            served("api", 81, 100 + 2 * step, 0, 23),
        ],
        "clusters": [
            {"name": "app", "backends": [
                {"address": f"127.0.0.1:{9000 + i}", "connections": 1, "connect_failures": 0}
                for i in range(backends)
            ]}
        ],
    }  # fmt: skip


def served_history(**shape: int) -> History:
    history = History()
    queues = [queue(80, [5, 1500], dead=1), queue(81, []), queue(22, [])]
    for step in range(3):
        history.add(Look(step * 2_000_000_000, queues, {}, status(step, **shape)))
    return history


def host_history(note: str = "no tidegate runs", left_out: bool = False) -> History:
    history = History()
    owners = {80: Owner(7, "nginx", (7, 8))}
    history.add(Look(0, [queue(80, [5, 1500]), queue(22, [])], owners, None, note=note, left_out=left_out))
    return history


def text(history: History, controls: Controls, width: int = 80, height: int = 24) -> list[str]:
    return [line.text for line in frame(history, controls, width, height)]


OVERVIEW_80 = """\
tidegate 0.1.0  up 102s  ages by bpf               by oldest  every 1s  22:13:00
accepted 251/s  dropped 5.0/s  sessions 14  waiting 3, of them gone 1

WORKER  PID  STATE   HEARTBEAT  SESSIONS  QUEUED  WAITING  THEFTS  RESTARTS
     0   10  active    5ms ago         3       0        0       1         0
     1   11  hung      5ms ago         3       0        0       1         0

LISTENER  WAITING  GONE  OLDEST  ACC/S  DROP/S   P99  AGE
web             3     1    1.5s    250     5.0   2ms               ▇▇▇
api             0     0       -    1.0       0  16ms               ▁▄▄

DROPPED/S  stale 5.0

CLUSTER  BACKEND         CONNECTIONS  FAILURES
app      127.0.0.1:9000            1         0
app      127.0.0.1:9001            1         0
q quit  s sort  p pause  enter look into  e sessions  ? help"""


def test_overview() -> None:
    lines = text(served_history(), Controls(clock="22:13:00"))
    assert "\n".join(lines) == OVERVIEW_80


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("screen", list(Screen))
@pytest.mark.parametrize("shape", [{}, {"workers": 30, "backends": 50}])
def test_no_screen_passes_its_size(width: int, height: int, screen: Screen, shape: dict[str, int]) -> None:
    for history in (served_history(**shape), host_history()):
        lines = text(history, Controls(screen=screen), width, height)
        assert len(lines) <= height
        assert max(map(len, lines)) <= width
        assert lines[-1].startswith("q quit")


def test_listeners_keep_their_place_among_many_workers_and_backends() -> None:
    lines = text(served_history(workers=30, backends=50), Controls())
    assert any(line.startswith("web") for line in lines)
    assert any(line.startswith("api") for line in lines)
    assert sum("more" in line for line in lines) == 2


def test_a_hung_worker_and_drops_stand_out() -> None:
    bad = [line.text for line in frame(served_history(), Controls(), 80, 24) if line.style is Style.BAD]
    assert [line.split()[0] for line in bad] == ["1", "DROPPED/S"]


def test_host_without_tidegate() -> None:
    lines = text(host_history(), Controls())
    assert lines[0].startswith("the TCP listeners of this host  ")
    assert lines[1] == "no tidegate runs"
    assert lines[4].split() == ["ADDRESS", "PROCESS", "WAITING", "GONE", "OLDEST", "AGE"]
    assert lines[5].split()[:5] == ["127.0.0.1:80", "nginx/7", "2", "0", "1.5s"]


def test_why_tidegate_is_not_shown_is_never_cut() -> None:
    note = f"may not ask the tidegate at /{'very-long-path/' * 7}control.sock (needs root)"
    lines = text(host_history(note), Controls(clock="22:13:00", paused=True))
    assert "".join(lines[1:3]).replace(" ", "") == note.replace(" ", "")
    assert lines[0].startswith("the TCP listeners of this host  ")
    assert lines[3].startswith("waiting 2")


@pytest.mark.parametrize(("left_out", "words"), [(True, "--host leaves out"), (False, "not known")])
def test_sessions_that_are_not_there(left_out: bool, words: str) -> None:
    assert words in text(host_history(left_out=left_out), Controls(screen=Screen.SESSIONS))[-2]


def test_the_help_page_is_not_cut() -> None:
    assert all(len(line) <= 79 for line in HELP.splitlines())  # top draws in a column less than there are
    lines = text(served_history(), Controls(screen=Screen.HELP), 79)
    assert lines[3:-1] == HELP.splitlines()


@pytest.mark.parametrize("shape", [{"workers": 1, "backends": 8}, {"workers": 8, "backends": 1}])
def test_lists_that_fit_are_not_shortened(shape: dict[str, int]) -> None:
    lines = text(served_history(**shape), Controls())
    assert not any("more" in line for line in lines)
    assert len(lines) <= 24


def test_looking_into_a_listener() -> None:
    lines = text(served_history(), Controls(screen=Screen.LISTENER))
    assert "web  127.0.0.1:80" in lines
    assert "waiting 3 of 128, gone 1, oldest 1.5s" in lines
    assert "dropped  stale 20" in lines
    assert any(line.split()[:2] == ["1ms", "2000"] for line in lines)
    clients = [line.split()[0] for line in lines if line.startswith("10.0.0.")]
    assert clients == ["10.0.0.1:4000", "10.0.0.0:4000"]  # the oldest first


def test_a_long_histogram_keeps_the_oldest_and_sums_the_rest() -> None:
    history = served_history()
    assert history.last.status is not None
    buckets = history.last.status["listeners"][0]["age_histogram"]["buckets"]
    buckets[:] = [0] * 5 + [1] * 30 + [0] * 5
    lines = text(history, Controls(screen=Screen.LISTENER))
    counts = [line.split() for line in lines if line.endswith("#")]
    assert sum(int(row[1]) for row in counts) == 30
    assert counts[0][0].startswith("<")
    assert counts[-1][0] == "17s"


def test_rates_survive_a_restart_of_tidegate() -> None:
    history = History()
    history.add(Look(0, [], {}, status(5)))
    history.add(Look(1_000_000_000, [], {}, status(0)))
    row = history.listeners()[0]
    assert row.accepted_rate == 1000
    assert row.drop_rates == {}


def test_a_look_just_after_another_takes_its_place() -> None:
    history = served_history()
    before = {row.name: row.accepted_rate for row in history.listeners()}
    drawn = history.sparkline("web", 10)
    last = history.last
    again = {**status(2), "listeners": [served("web", 80, 2001, 20, 20), served("api", 81, 104, 0, 23)]}
    history.add(Look(last.at_ns + 1_000_000, last.queues, {}, again))
    after = {row.name: row.accepted_rate for row in history.listeners()}
    assert after["web"] == pytest.approx(501 / 2.001), "not 1 in a millisecond"
    assert after["api"] == pytest.approx(before["api"], rel=0.01)
    assert history.sparkline("web", 10) == drawn


def test_sparkline_is_logarithmic_and_bounded() -> None:
    history = host_history()
    key = history.listeners()[0].key
    history.ages[key].extend([0, 100_000, 10 * MS, 10**10, 10**12])
    assert history.sparkline(key, 6) == "▇▁▁▄██"
    assert history.sparkline(key, 3, ascii_only=True) == "-##"
    assert history.sparkline("unknown", 4) == "    "


@pytest.mark.parametrize(
    ("sort", "first"), [("oldest", "web"), ("waiting", "web"), ("accepted", "web"), ("name", "api")]
)
def test_orders(sort: str, first: str) -> None:
    assert ordered(served_history().listeners(), sort)[0].name == first


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "-"), (0, "0"), (0.5, "0.5"), (12.4, "12"), (123456, "123k")]
)
def test_rate(value: float | None, shown: str) -> None:
    assert rate(value) == shown


def test_keys() -> None:
    history, controls = served_history(), Controls()
    press(curses.KEY_DOWN, controls, history)
    assert controls.selected == "api"
    press(curses.KEY_DOWN, controls, history)
    assert controls.selected == "api"  # the last stays the last
    press(curses.KEY_UP, controls, history)
    assert controls.selected == "web"
    press(10, controls, history)
    assert controls.screen is Screen.LISTENER
    press(27, controls, history)
    assert controls.screen is Screen.OVERVIEW
    seen = []
    for _ in SORTS:
        press(ord("s"), controls, history)
        seen.append(controls.sort)
    assert sorted(seen) == sorted(SORTS)
    press(ord("p"), controls, history)
    assert controls.paused
    press(ord("+"), controls, history)
    assert controls.interval_s == 0.5
    for _ in range(9):
        press(ord("-"), controls, history)
    assert controls.interval_s == 10.0
    assert press(ord("e"), controls, history)
    assert controls.screen is Screen.SESSIONS
    press(ord("?"), controls, history)
    assert controls.screen is Screen.HELP
    assert not press(-1, controls, history)


def test_keys_without_listeners() -> None:
    history = History()
    history.add(Look(0, [], {}, None))
    controls = Controls()
    press(curses.KEY_DOWN, controls, history)
    for screen in Screen:
        controls.screen = screen
        assert text(history, controls)


def test_escape_sequences_in_names_do_not_reach_the_terminal() -> None:
    history = served_history()
    assert history.last.status is not None
    history.last.status["listeners"][0]["name"] = "ev\x1b[2Jil"
    assert not any("\x1b" in line for line in text(history, Controls()))
