"""Configurations derived at runtime: the rules of the file hold, and what is saved is loaded again."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate import config as configuration
from tidegate.config import pending
from tidegate.config.model import BackendMode, Config, Policy
from tidegate.config.pending import Pending
from tidegate.control.protocol import ErrorCode, VerbError
from tidegate.supervisor import verbs_change
from tidegate.supervisor.verbs_change import (
    add_backend,
    load,
    remove_backend,
    save,
    with_admission,
    with_backend,
    with_log_level,
)

BASE = configuration.parse("""
[[listener]]
name = "web"
address = "127.0.0.1:8080"
protocol = "tcp"
cluster = "app"
[[listener]]
name = "api"
address = "127.0.0.1:8081"
protocol = "tcp"
cluster = "app"
[cluster.app]
backends = ["127.0.0.1:9000", { address = "unix:/run/app.sock", weight = 2 }]
""")


def backends(config: Config) -> list[tuple[str, int, str]]:
    return [(str(one.address), one.weight, one.mode.value) for one in config.cluster("app").backends]


def code(refused: pytest.ExceptionInfo[VerbError]) -> ErrorCode:
    return refused.value.code


def test_backends_come_change_and_go() -> None:
    config = add_backend(BASE, "app", "[::1]:9001", None)
    config = add_backend(config, "app", "127.0.0.1:9002", 5)
    config = with_backend(config, "app", "unix:/run/app.sock", mode=BackendMode.DRAIN)
    config = remove_backend(config, "app", "127.0.0.1:9000")
    assert backends(config) == [
        ("unix:/run/app.sock", 2, "drain"),
        ("[::1]:9001", 1, "ready"),
        ("127.0.0.1:9002", 5, "ready"),
    ]
    assert len(BASE.cluster("app").backends) == 2, "what was in force is not touched"


@pytest.mark.parametrize(
    ("cluster", "backend", "weight", "expected"),
    [
        ("nope", "127.0.0.1:1", None, ErrorCode.NOT_FOUND),
        ("app", "127.0.0.1:9000", 3, ErrorCode.CONFLICT),
        ("app", "127.0.0.1", None, ErrorCode.BAD_ARGUMENT),
        ("app", "127.0.0.1:99999", None, ErrorCode.BAD_ARGUMENT),
        ("app", "127.0.0.1:1", 1_000_000, ErrorCode.BAD_ARGUMENT),
        ("app", "unix:relative", None, ErrorCode.BAD_ARGUMENT),
    ],
)
def test_a_backend_that_cannot_be_added(
    cluster: str, backend: str, weight: int | None, expected: ErrorCode
) -> None:
    with pytest.raises(VerbError) as refused:
        add_backend(BASE, cluster, backend, weight)
    assert code(refused) is expected


def test_the_last_backend_stays() -> None:
    config = remove_backend(BASE, "app", "127.0.0.1:9000")
    with pytest.raises(VerbError) as refused:
        remove_backend(config, "app", "unix:/run/app.sock")
    assert code(refused) is ErrorCode.CONFLICT
    with pytest.raises(VerbError) as refused:
        remove_backend(config, "app", "127.0.0.1:9000")
    assert code(refused) is ErrorCode.NOT_FOUND
    assert "unix:/run/app.sock" in refused.value.message, "it says who is there"


def test_admission_of_one_listener_or_of_all() -> None:
    one = with_admission(BASE, "web", {"stale_after": "250ms", "max_connections": 9, "accept_queue": 5})
    assert [listener.stale_after_ns for listener in one.listeners] == [250_000_000, 1_000_000_000]
    assert [listener.max_connections for listener in one.listeners] == [9, None]
    every = with_admission(one, None, {"max_connections": "auto", "when_queue_full": "drop_oldest"})
    assert [listener.max_connections for listener in every.listeners] == [None, None]
    assert all(listener.policy is Policy.DEADLINE for listener in every.listeners)


@pytest.mark.parametrize(
    ("listener", "values", "expected"),
    [
        ("nope", {"stale_after": "1s"}, ErrorCode.NOT_FOUND),
        ("web", {"stale_after": "1"}, ErrorCode.BAD_ARGUMENT),
        ("web", {"stale_after": 1}, ErrorCode.BAD_ARGUMENT),
        ("web", {"max_connections": True}, ErrorCode.BAD_ARGUMENT),
        ("web", {"max_connections": "many"}, ErrorCode.BAD_ARGUMENT),
        ("web", {"policy": "none"}, ErrorCode.BAD_ARGUMENT),
        ("web", {"address": "127.0.0.1:1"}, ErrorCode.BAD_ARGUMENT),
        ("web", {"nonsense": 1}, ErrorCode.BAD_ARGUMENT),
    ],
)
def test_admission_by_the_rules_of_the_file(
    listener: str, values: dict[str, object], expected: ErrorCode
) -> None:
    with pytest.raises(VerbError) as refused:
        with_admission(BASE, listener, values)
    assert code(refused) is expected


def test_what_is_not_built_cannot_be_set_either(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Pending(("listener", "*", "when_queue_full"), lambda value: value == "drop_oldest", "drop_oldest")
    monkeypatch.setattr(pending, "PENDING", (entry,))
    with pytest.raises(VerbError) as refused:
        with_admission(BASE, "web", {"when_queue_full": "drop_oldest"})
    assert code(refused) is ErrorCode.NOT_BUILT


def test_the_log_level() -> None:
    assert with_log_level(BASE, "debug").log.level == "debug"
    with pytest.raises(VerbError) as refused:
        with_log_level(BASE, "loud")
    assert code(refused) is ErrorCode.BAD_ARGUMENT


def test_nothing_changed_is_nothing_saved() -> None:
    assert save(BASE, BASE) == {"version": 1, "listeners": {}, "clusters": {}}
    assert load(BASE, save(BASE, BASE)) == BASE


changes = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 5), st.none() | st.integers(1, 1000)),
        st.tuples(st.just("remove"), st.integers(1, 5), st.none()),
        st.tuples(st.just("mode"), st.integers(1, 5), st.sampled_from(BackendMode)),
        st.tuples(st.just("stale"), st.sampled_from(["web", "api", None]), st.integers(1, 10**7)),
        st.tuples(st.just("most"), st.sampled_from(["web", "api", None]), st.none() | st.integers(1, 10**6)),
        st.tuples(st.just("full"), st.just("web"), st.sampled_from(["drop_new", "drop_oldest"])),
        st.tuples(st.just("level"), st.none(), st.sampled_from(["debug", "info", "warning", "error"])),
    ),
    max_size=12,
)


def apply(config: Config, what: str, where: Any, value: Any) -> Config:
    address = f"127.0.0.1:{where}"
    match what:
        case "add":
            return add_backend(config, "app", address, value)
        case "remove":
            return remove_backend(config, "app", address)
        case "mode":
            return with_backend(config, "app", address, mode=value)
        case "stale":
            return with_admission(config, where, {"stale_after": f"{value}ms"})
        case "most":
            return with_admission(config, where, {"max_connections": "auto" if value is None else value})
        case "full":
            return with_admission(config, where, {"when_queue_full": value})
        case _:
            return with_log_level(config, value)


@given(changes)
def test_what_is_saved_is_loaded_again(steps: list[tuple[str, Any, Any]]) -> None:
    config = BASE
    for what, where, value in steps:
        try:
            config = apply(config, what, where, value)
        except VerbError as refused:
            if refused.code not in (ErrorCode.CONFLICT, ErrorCode.NOT_FOUND):
                raise
    assert load(BASE, save(BASE, config)) == config


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({}, ErrorCode.BAD_ARGUMENT),
        ({"version": 1, "listeners": []}, ErrorCode.BAD_ARGUMENT),
        ({"version": 1, "listeners": {"web": 1}}, ErrorCode.BAD_ARGUMENT),
        ({"version": 1, "clusters": {"app": []}}, ErrorCode.BAD_ARGUMENT),
        ({"version": 1, "clusters": {"app": [{"weight": 1}]}}, ErrorCode.BAD_ARGUMENT),
        ({"version": 1, "clusters": {"app": ["127.0.0.1:1", "127.0.0.1:1"]}}, ErrorCode.CONFLICT),
        ({"version": 1, "clusters": {"nope": ["127.0.0.1:1"]}}, ErrorCode.NOT_FOUND),
    ],
)
def test_a_state_that_cannot_be_loaded(state: dict[str, Any], expected: ErrorCode) -> None:
    with pytest.raises(VerbError) as refused:
        load(BASE, state)
    assert code(refused) is expected


def test_the_keys_of_admission_are_keys_of_listeners() -> None:
    assert all(verbs_change.listener_tables.LISTENER.key(name) for name in verbs_change.ADMISSION_KEYS)
