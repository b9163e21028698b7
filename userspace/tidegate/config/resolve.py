"""What "auto" means on this host, for the values that the configuration alone decides."""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass

from tidegate.config import defaults
from tidegate.config.model import Config
from tidegate.errors import OperatorError


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom the workers run as."""

    name: str
    uid: int
    gid: int


def worker_count(config: Config) -> int:
    """Workers to start: as configured, or one for each CPU this process may use."""
    if config.workers is not None:
        return config.workers
    slots = defaults.MAX_SLOTS // max(1, len(config.listeners))
    return max(1, min(len(os.sched_getaffinity(0)), defaults.MAX_WORKERS, slots))


def run_as(config: Config, euid: int | None = None) -> Identity | None:
    """Whom to become in workers; None to stay who we are. `euid` is the caller's, by default this process's.

    Raises OperatorError when a user is named that only root can become, or that is not there any more.
    """
    euid = os.geteuid() if euid is None else euid
    if not config.user:
        return None
    if config.user == "auto":
        return (_user("tidegate") or _user("nobody")) if euid == 0 else None
    user = _user(config.user)
    if user is None:
        raise OperatorError(f"user {config.user} does not exist", f"useradd --system {config.user}")
    if user.uid == euid:
        return None
    if euid != 0:
        raise OperatorError(
            f"only root can run workers as {config.user}", 'start it as root, or write user = "auto"'
        )
    return user


def _user(name: str) -> Identity | None:
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return None
    return Identity(entry.pw_name, entry.pw_uid, entry.pw_gid)
