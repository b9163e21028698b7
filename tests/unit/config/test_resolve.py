"""What "auto" becomes on a host."""

from __future__ import annotations

import os
import pwd

import pytest

from tidegate import config
from tidegate.config import Config, resolve
from tidegate.errors import OperatorError


def made(top: str = "") -> Config:
    return config.parse(
        f'{top}\n[[listener]]\naddress = "127.0.0.1:8080"\nprotocol = "tcp"\ncluster = "app"\n'
        '[cluster.app]\nbackends = ["127.0.0.1:9000"]\n'
    )


def test_workers_follow_the_cpus_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve.worker_count(made()) == len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3, 5, 9})
    assert resolve.worker_count(made()) == 3
    assert resolve.worker_count(made("workers = 2")) == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(500)))
    assert resolve.worker_count(made()) == 64


def test_auto_user_is_tidegate_or_nobody_for_root_alone() -> None:
    try:
        expected = pwd.getpwnam("tidegate")
    except KeyError:
        expected = pwd.getpwnam("nobody")
    identity = resolve.run_as(made(), euid=0)
    assert identity is not None
    assert (identity.name, identity.uid, identity.gid) == (expected.pw_name, expected.pw_uid, expected.pw_gid)
    assert resolve.run_as(made(), euid=1000) is None


def test_an_empty_user_keeps_the_caller() -> None:
    assert resolve.run_as(made('user = ""'), euid=0) is None


def test_a_named_user_takes_root() -> None:
    nobody = pwd.getpwnam("nobody")
    config_of_nobody = made('user = "nobody"')
    identity = resolve.run_as(config_of_nobody, euid=0)
    assert identity is not None and identity.uid == nobody.pw_uid
    assert resolve.run_as(config_of_nobody, euid=nobody.pw_uid) is None
    with pytest.raises(OperatorError, match="only root"):
        resolve.run_as(config_of_nobody, euid=nobody.pw_uid + 1)
