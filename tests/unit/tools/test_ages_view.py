"""Selection, order and form of what `tidegate ages` shows."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from tidegate.kernel.sock_diag import ListenSocket
from tidegate_tools import ages_view
from tidegate_tools.ages_view import Selection, View
from tidegate_tools.owners import Owner, Owners
from tidegate_tools.queues import Queue, Source, Waiter
from tidegate_tools.snapshot import Snapshot

MS = 1_000_000


def queue(host: str, port: int, ages_ms: list[int], inode: int, **fields: Any) -> Queue:
    one = ListenSocket(socket.AF_INET, host, port, 0, len(ages_ms), 128, 0, inode, inode, 1, False, 0)
    waiters = [
        Waiter(
            f"10.0.0.1:{4000 + i}",
            f"{host}:{port}",
            age * MS,
            -age * MS,
            Source.STAMP,
            10 * i,
            False,
            False,
            i,
        )
        for i, age in enumerate(ages_ms)
    ]
    return Queue(f"{host}:{port}", host, port, 0, fields.pop("netns", ""), [one], waiters, **fields)


def served() -> dict[str, Any]:
    buckets = [0] * 40
    buckets[20] = 10
    return {
        "name": "web",
        "address": "127.0.0.1:80",
        "accepted": 1234,
        "dropped": {"stale": 7, "queue_full": 0},
        "age_histogram": {"count": 10, "sum_ns": 15 * MS, "max_ns": 2_000_000, "buckets": buckets},
    }


STATUS = {"pid": 42, "version": "1", "queue_age": {"source": "bpf", "reason": ""}, "listeners": [served()]}
NGINX = Owner(7, "nginx", (7, 8))


def view(**selection: Any) -> View:
    queues = [
        queue("127.0.0.1", 80, [5, 900], 1),
        queue("127.0.0.1", 81, [10, 20, 30], 2, dead=4),
        queue("127.0.0.1", 82, [], 3),
    ]
    return ages_view.build(Snapshot(queues, 99), Owners({2: NGINX}), STATUS, Selection(**selection))


def ports(**selection: Any) -> list[int]:
    return [row.queue.port for row in view(**selection).rows]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({}, [80, 81, 82]),
        ({"sort": "waiting"}, [81, 80, 82]),
        ({"sort": "gone"}, [81, 80, 82]),
        ({"sort": "address"}, [80, 81, 82]),
        ({"sort": "process"}, [81, 80, 82]),
        ({"busy": True}, [80, 81]),
        ({"min_age_ns": 31 * MS}, [80]),
        ({"patterns": ["82", "web"]}, [80, 82]),
        ({"patterns": ["nginx"]}, [81]),
        ({"patterns": ["8"]}, [81]),  # a worker's process number
        ({"patterns": [":80"]}, [80]),
        ({"patterns": ["127.0.0.1"]}, [80, 81, 82]),
        ({"patterns": ["127.0.0.1:82"]}, [82]),
        ({"patterns": ["0.0.0.0"]}, []),
    ],
)
def test_selection_and_order(selection: dict[str, Any], expected: list[int]) -> None:
    assert ports(**selection) == expected


def test_text() -> None:
    text = ages_view.as_text(view(connections=2))
    lines = text.splitlines()
    assert lines[0].split() == [
        "LISTENER",
        "PROCESS",
        "WAITING",
        "GONE",
        "OLDEST",
        "P50",
        "P99",
        "SYN",
        "SOURCE",
    ]
    assert lines[1].split() == ["127.0.0.1:80", "-", "2/128", "0", "900ms", "5ms", "900ms", "0", "stamp"]
    assert lines[2].split() == ["127.0.0.1:81", "nginx/7", "7/128", "4", "30ms", "20ms", "30ms", "0", "stamp"]
    assert lines[3].split() == ["127.0.0.1:82", "-", "0/128", "0", "-", "-", "-", "0", "-"]
    assert "127.0.0.1:80  10.0.0.1:4001  900ms       10B  open   stamp" in lines
    assert "(the oldest 2 of 5; --limit shows more)" in lines
    assert "Ages at accept since tidegate started, upgrades included (by bpf):" in lines
    assert lines[-3].split() == ["web", "1234", "1ms", "1ms", "2ms", "2ms", "stale", "7"]
    assert all(len(line) < 80 for line in lines)


def test_nothing_matches() -> None:
    text = ages_view.as_text(view(patterns=["nosuch"]))
    assert text == "no TCP listener matches nosuch"


@pytest.mark.parametrize(("by_root", "hint"), [(True, False), (False, True)])
def test_root_is_not_sent_to_root(by_root: bool, hint: bool) -> None:
    owners = Owners(hidden=True, by_root=by_root)
    shown = ages_view.build(Snapshot([queue("127.0.0.1", 80, [], 1)], 99), owners, None, Selection())
    (note,) = shown.notes
    assert ("root sees more" in note) is hint


def test_json_says_why_tidegate_is_missing() -> None:
    shown = ages_view.build(Snapshot([], 99), Owners(), None, Selection(), "may not ask")
    assert ages_view.as_json(shown)["notes"] == ["may not ask"]


def test_columns_appear_when_they_say_something() -> None:
    text = ages_view.as_text(view())
    assert "NETNS" not in text
    assert "DROPS" not in text
    rows = view().rows
    rows[0].queue.netns = "blue"
    rows[0].queue.sockets[0].drops = 3
    text = ages_view.as_text(View(rows, Selection(), None, [], 0, 0))
    assert "NETNS" in text
    assert "DROPS" in text


def test_json_has_the_documented_fields() -> None:
    out = json.loads(json.dumps(ages_view.as_json(view(connections=1))))
    fields = {"listeners", "monotonic_ns", "took_ns", "notes", "schema", "tcp_info_resolution_ns", "tidegate"}
    assert set(out) == fields
    first, second, third = out["listeners"]
    assert first["oldest_ns"] == 900 * MS
    assert first["name"] == "web"
    assert first["accepted"] == 1234
    assert first["accepted_ages"]["count"] == 10
    assert 1 << 20 <= first["accepted_ages"]["p50_ns"] <= 2_000_000
    assert [one["age_ns"] for one in first["connections"]] == [900 * MS, 5 * MS]
    assert (second["waiting"], second["gone"], second["reset"], second["left"]) == (7, 4, 4, 0)
    assert second["process"] == {"pid": 7, "name": "nginx", "pids": [7, 8]}
    assert third["oldest_ns"] is None
    assert third["source"] is None


def test_without_tidegate_and_without_listeners() -> None:
    empty = ages_view.build(Snapshot([], 0, 0, ["a note"]), Owners(), None, Selection())
    assert ages_view.as_text(empty) == "no TCP listener\n\nnote: a note"
    assert ages_view.as_json(empty)["listeners"] == []
