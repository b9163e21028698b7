"""The keys at the top of the file: the process as a whole."""

from __future__ import annotations

import hashlib
import pwd
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tidegate import logs
from tidegate.config import cluster_tables, defaults, listener_tables
from tidegate.config.composite import Sub
from tidegate.config.errors import BadValueError, show_value
from tidegate.config.kinds import (
    Choice,
    Duration,
    Flag,
    Number,
    Several,
    Size,
    SocketAddress,
    SocketPath,
    Text,
    name_error,
    text_of,
)
from tidegate.config.model import Config, Log, QueueAgeSource, StatsdLabels, Steer
from tidegate.config.schema import Key, Kind, Reload, Section, Spot, Table

LOG: Final = Table(
    "log",
    "What is logged on stderr, and how.",
    (
        Key(
            "level",
            Choice(tuple(logs.LEVELS)),
            defaults.LOG.level,
            "The least important level that is shown.",
        ),
        Key("format", Choice(logs.FORMATS), defaults.LOG.format, "`text` is key=value."),
    ),
)


def _user_error(name: str) -> str:
    try:
        pwd.getpwnam(name)
    except (KeyError, ValueError):
        return "there is no such user"
    return ""


@dataclass(frozen=True, slots=True)
class UserName(Kind):
    """The name of a user; its uid."""

    @property
    def label(self) -> str:
        return "name of a user"

    def read(self, value: object, spot: Spot) -> Any:
        try:
            return pwd.getpwnam(text_of(value, "the name of a user", '"deploy"')).pw_uid
        except KeyError:
            raise BadValueError("there is no such user", fix="see getent passwd") from None

    def show(self, value: Any) -> str:
        return show_value(value)


PROCESS: Final = Table(
    "",
    "The process as a whole. These keys stand before the first [table].",
    (
        Key(
            "workers",
            Number(1, defaults.MAX_WORKERS, (("auto", None),)),
            defaults.WORKERS,
            "Worker processes; `auto`: one for each CPU the process may use.",
            reload=Reload.RESTART,
        ),
        Key(
            "pin_workers",
            Flag(),
            defaults.PIN_WORKERS,
            "Bind each worker to one CPU.",
            reload=Reload.RESTART,
        ),
        Key(
            "control",
            SocketPath(),
            defaults.CONTROL,
            "The control socket, which `tidegate status` and the other commands talk to.",
            reload=Reload.RESTART,
        ),
        Key(
            "control_users",
            Several(UserName(), "names of users", '["deploy"]'),
            defaults.CONTROL_USERS,
            "Users who may use the control socket, besides root and the one tidegate runs as.",
        ),
        Key(
            "queue_age",
            Choice.of(QueueAgeSource),
            defaults.QUEUE_AGE,
            "Where ages come from: `bpf` is exact and does not start without BPF, `tcp_info` is a lower "
            "bound, `auto` takes the best there is. `accept` starts the clock at accept(), as other proxies "
            "do: it shows what they cannot see, and serves for comparison only.",
            reload=Reload.RESTART,
        ),
        Key(
            "steer",
            Choice.of(Steer),
            defaults.STEER,
            "How the kernel chooses the worker of a new connection.",
            reload=Reload.RESTART,
        ),
        Key(
            "hang_after",
            Duration(),
            defaults.HANG_AFTER_NS,
            "A worker without a sign of life for this long gets no new connections, and its waiting ones are "
            "served by others.",
            field="hang_after_ns",
        ),
        Key(
            "kill_hung_after",
            Duration(),
            defaults.KILL_HUNG_AFTER_NS,
            "A worker that hangs for this long is killed and replaced.",
            field="kill_hung_after_ns",
        ),
        Key(
            "drain_timeout",
            Duration(zero=True),
            defaults.DRAIN_TIMEOUT_NS,
            "How long sessions may go on when tidegate or a worker stops; 0 cuts them at once.",
            field="drain_timeout_ns",
        ),
        Key(
            "user",
            Text("name of a user", '"auto"', _user_error, (("auto", "auto"), ("", ""))),
            defaults.USER,
            'Whom workers run as; `auto`: tidegate if there is such a user, else nobody; `""`: the caller.',
            reload=Reload.RESTART,
        ),
        Key(
            "metrics",
            SocketAddress(off=True),
            defaults.METRICS,
            "Where Prometheus finds the metrics.",
            reload=Reload.RESTART,
        ),
        Key(
            "statsd",
            SocketAddress(off=True),
            defaults.STATSD,
            "A StatsD server, UDP, that the metrics are pushed to.",
            reload=Reload.RESTART,
        ),
        Key(
            "statsd_interval",
            Duration(),
            defaults.STATSD_INTERVAL_NS,
            "Time between two pushes.",
            reload=Reload.RESTART,
            field="statsd_interval_ns",
        ),
        Key(
            "statsd_labels",
            Choice.of(StatsdLabels),
            defaults.STATSD_LABELS,
            "How labels are sent: as parts of the `name`, or as `tags` in DogStatsD's form.",
            reload=Reload.RESTART,
        ),
        Key("log", Sub(LOG, lambda s: Log(**s.attributes()), '{ level = "info" }'), defaults.LOG, "Logging."),
        Key(
            "zombie_interval",
            Duration(),
            defaults.ZOMBIE_INTERVAL_NS,
            "Time between two walks of the zombie checker.",
            field="zombie_interval_ns",
        ),
        Key(
            "max_session_age",
            Duration(off=True),
            defaults.MAX_SESSION_AGE_NS,
            "Sessions older than this are closed, whatever they do.",
            field="max_session_age_ns",
        ),
        Key(
            "cgroup",
            Text("name", '"auto"', name_error),
            defaults.CGROUP,
            "Name of its cgroup, `<cgroup2 mount>/tidegate/<name>`; `auto` makes one from `control`.",
            reload=Reload.RESTART,
        ),
        Key(
            "splice_limit",
            Size(low=64 * defaults.KIB),
            defaults.SPLICE_LIMIT,
            "Bytes in flight in the kernel in one direction of a spliced session, beyond its socket buffers.",
        ),
        Key(
            "splice_total",
            Size(low=64 * defaults.KIB),
            defaults.SPLICE_TOTAL,
            "The same for all sessions of a worker; when it is reached no further direction is spliced.",
        ),
        Key(
            "listener",
            listener_tables.LISTENERS,
            (),
            "Addresses to listen on, one at least.",
            field="listeners",
        ),
        Key("cluster", cluster_tables.CLUSTERS, (), "Backends.", field="clusters"),
    ),
)


def check(section: Section) -> None:
    """What the keys of the process must be together."""
    hang, kill = section.get("hang_after"), section.get("kill_hung_after")
    if hang and kill and kill <= hang:
        name = "kill_hung_after" if "kill_hung_after" in section.written else "hang_after"
        section.error(name, "kill_hung_after is not longer than hang_after", 'write kill_hung_after = "30s"')
    limit, total = section.get("splice_limit"), section.get("splice_total")
    if limit and total and limit > total:
        name = "splice_limit" if "splice_limit" in section.written else "splice_total"
        section.error(name, "splice_limit is larger than splice_total", "make splice_total a multiple of it")


def build(section: Section, source: str) -> Config:
    """The configuration, with the defaults that depend on other keys."""
    values = section.attributes()
    if values["cgroup"] == "auto":
        values["cgroup"] = cgroup_of(values["control"])
    return Config(source=source, **values)


def cgroup_of(control: str) -> str:
    """The cgroup name of the instance with that control socket: "main", or readable and with a digest.

    It must be the same after a restart and for a successor, and another one for a second instance.
    """
    if control == defaults.CONTROL:
        return "main"
    words = re.sub(r"[^A-Za-z0-9]+", "-", str(Path(control).with_suffix(""))).strip("-")
    return f"{words[-40:].lstrip('-') or 'x'}-{hashlib.sha256(control.encode()).hexdigest()[:8]}"
