"""What a reload has to do, from two configurations."""

from __future__ import annotations

from tidegate import config
from tidegate.config import Config
from tidegate.config.diff import changes

BASE = """
{top}
[[listener]]
name = "web"
address = "127.0.0.1:8080"
protocol = "tcp"
cluster = "app"
{web}
[[listener]]
name = "api"
address = "127.0.0.1:8081"
protocol = "tcp"
cluster = "app"
[cluster.app]
backends = [{backends}]
{app}
{more}
"""


def made(**parts: str) -> Config:
    blank = {"top": "", "web": "", "backends": '"127.0.0.1:9000", "127.0.0.1:9001"', "app": "", "more": ""}
    return config.parse(BASE.format(**{**blank, **parts}), "web.toml")


def test_nothing_changed() -> None:
    found = changes(made(), made())
    assert not found.any
    assert found.describe() == []


def test_live_keys_of_a_listener_keep_its_sockets() -> None:
    found = changes(made(), made(web='stale_after = "2s"\nbacklog = 128'))
    (change,) = found.listeners_changed
    assert change.keys == ("backlog", "stale_after")
    assert not change.new_socket
    assert change.new_backlog
    assert found.describe() == ["listener web: backlog, stale_after"]


def test_an_address_takes_new_sockets() -> None:
    old = made()
    new = config.parse(
        BASE.format(top="", web="backlog = 9", app="", more="", backends='"127.0.0.1:9000"').replace(
            "8080", "8090"
        )
    )
    (change,) = changes(old, new).listeners_changed
    assert (change.old.name, change.new.name) == ("web", "web")
    assert change.keys == ("address", "backlog")
    assert change.new_socket and not change.new_backlog


def test_swapped_names_touch_no_socket() -> None:
    text = BASE.format(top="", web="", app="", more="", backends='"127.0.0.1:9000"')
    old = config.parse(text)
    new = config.parse(text.replace('"web"', '"x"').replace('"api"', '"web"').replace('"x"', '"api"'))
    found = changes(old, new)
    assert [change.keys for change in found.listeners_changed] == [("name",), ("name",)]
    assert not any(change.new_socket for change in found.listeners_changed)
    assert not found.listeners_added and not found.listeners_removed


def test_listeners_and_clusters_come_and_go() -> None:
    more = (
        '[[listener]]\naddress = "127.0.0.1:8082"\nprotocol = "tcp"\ncluster = "new"\n'
        '[cluster.new]\nbackends = ["127.0.0.1:9002"]'
    )
    there = changes(made(), made(more=more))
    assert [listener.name for listener in there.listeners_added] == ["127.0.0.1:8082"]
    assert [cluster.name for cluster in there.clusters_added] == ["new"]
    assert there.describe() == ["listener 127.0.0.1:8082 added", "cluster new added"]
    back = changes(made(more=more), made())
    assert [listener.name for listener in back.listeners_removed] == ["127.0.0.1:8082"]
    assert [cluster.name for cluster in back.clusters_removed] == ["new"]


def test_backends_are_matched_by_address() -> None:
    new = made(backends='{ address = "127.0.0.1:9001", weight = 3 }, "127.0.0.1:9002"', app="retries = 0")
    (change,) = changes(made(), new).clusters_changed
    assert change.keys == ("backends", "retries")
    assert [str(backend.address) for backend in change.backends_added] == ["127.0.0.1:9002"]
    assert [str(backend.address) for backend in change.backends_removed] == ["127.0.0.1:9000"]


def test_keys_of_the_process_take_a_restart_or_not() -> None:
    top = 'workers = 7\ncontrol = "/run/x.sock"\ncgroup = "blue"\nuser = ""\n'
    top += 'hang_after = "1s"\nlog = { level = "debug" }'
    found = changes(made(), made(top=top))
    assert found.restart == ("workers", "control", "user", "cgroup")
    assert found.process == ("hang_after", "log")
    assert "workers keeps its old value until a restart" in found.kept
    assert found.describe() == ["hang_after changed", "log changed"], "each is said once"
