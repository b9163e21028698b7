"""The configuration contract: its examples, its defaults, and each key read into the model."""

from __future__ import annotations

import re
import ssl
from dataclasses import fields
from ipaddress import ip_network
from pathlib import Path

import pytest
import trustme

from tidegate import config
from tidegate.config import (
    Config,
    ConfigErrors,
    cluster_tables,
    defaults,
    listener_tables,
    process_tables,
    route_tables,
)
from tidegate.config import model as m
from tidegate.config.composite import Sub
from tidegate.config.schema import REQUIRED, Table, all_tables

MS, S = 1_000_000, 1_000_000_000

FIRST = """
[[listener]]
address = "127.0.0.1:8080"        # "[::1]:8080", "0.0.0.0:80"
protocol = "http"                 # "tcp" | "http" | "https"
cluster = "app"                   # tcp: where to; http: the default route
[cluster.app]
backends = ["127.0.0.1:9000"]     # or { address = "...", weight = 2 }; "unix:/run/app.sock"
"""

LONG = """
workers = 2                       # or "auto"
control = "/run/tidegate/control.sock"
queue_age = "auto"                # "auto" | "bpf" | "tcp_info"
steer = "p2c"                     # "p2c" | "least_queue" | "hash" | "cpu"
hang_after = "200ms"
kill_hung_after = "30s"
drain_timeout = "30s"
user = "auto"
metrics = "127.0.0.1:9464"        # "off" by default
log = { level = "info", format = "text" }
zombie_interval = "30s"
max_session_age = "off"
[[listener]]
name = "web"
address = "127.0.0.1:8080"
protocol = "https"
cluster = "app"
backlog = 4096
accept_queue = 1024
max_connections = "auto"
stale_after = "1s"
policy = "deadline"
when_queue_full = "drop_new"
abort_on_close = true
on_stale = "reset"
request_timeout = "10s"
front_timeout = "60s"
keepalive_timeout = "60s"
zombie_after = "10m"
when_full = "queue"
proxy_protocol = "off"
trusted = []
via = "tidegate"
splice = "auto"
splice_after = "256KiB"
limits = { connections_per_client = 0, requests_per_second = 0, burst = 0 }
answers = { 503 = "503.html" }
access_log = { path = "access.log", format = "json" }
tls = { min_version = "1.2", unknown_sni = "default" }
[[listener.certificate]]
cert = "site.pem"
key = "site.key"
[[listener.route]]
host = "*.example.org"
path = { prefix = "/api" }
method = "GET"
strip_prefix = false
rewrite_host = ""
request_headers = { set = { "X-Env" = "prod" }, add = {}, remove = ["Cookie2"] }
cluster = "api"
[[listener.route]]
host = "old.example.org"
redirect = { to = "https", status = 301 }
[[listener.route]]
path = { exact = "/private" }
deny = 403
[[listener.route]]
path = { regex = '^/ok/[0-9]+$' }
answer = { status = 200, body = "ok" }
[cluster.app]
backends = [{ address = "127.0.0.1:9000", weight = 2 }, "unix:/run/app.sock"]
balance = "p2c"
max_in_flight = "auto"
connect_timeout = "3s"
back_timeout = "30s"
retries = 2
sticky = { cookie = "TIDEGATE" }
eject = { failures = 5, for = "10s" }
send_proxy = "off"
health = { path = "/healthz", interval = "5s", rise = 2, fall = 3 }
[cluster.api]
backends = ["api.internal:9001"]
tls = { verify = true, server_name = "api.internal" }
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A directory with what the long example names; the result is the path of its configuration file."""
    certificate = trustme.CA().issue_cert("example.org")
    (tmp_path / "site.pem").write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    certificate.private_key_pem.write_to_path(tmp_path / "site.key")
    (tmp_path / "503.html").write_text("busy")
    return tmp_path / "tidegate.toml"


def whole(text: str, source: str = "web.toml") -> Config:
    return config.parse(text, source, allow_pending=True)


def tcp(listener: str = "", cluster: str = "", top: str = "") -> Config:
    """The smallest tcp configuration with lines added."""
    return config.parse(
        f'{top}\n[[listener]]\naddress = "127.0.0.1:8080"\nprotocol = "tcp"\ncluster = "app"\n{listener}\n'
        f'[cluster.app]\nbackends = ["127.0.0.1:9000"]\n{cluster}\n',
        "web.toml",
    )


def test_the_first_example_is_a_whole_file() -> None:
    parsed = whole(FIRST)
    (listener,) = parsed.listeners
    assert listener.name == "127.0.0.1:8080"
    assert listener.protocol is m.Protocol.HTTP
    assert listener.abort_on_close is True
    assert parsed.cluster(listener.cluster).backends == (m.Backend(m.Address("127.0.0.1", 9000)),)


def test_the_first_example_works_today_as_tcp() -> None:
    parsed = config.parse(FIRST.replace('"http" ', '"tcp" '), "web.toml")
    assert parsed.listeners[0].protocol is m.Protocol.TCP
    assert parsed.listeners[0].abort_on_close is False


def test_the_long_example(files: Path) -> None:
    parsed = whole(LONG, str(files))
    (listener,) = parsed.listeners
    assert parsed.metrics == m.Address("127.0.0.1", 9464)
    assert listener.answers == ((503, files.parent / "503.html"),)
    assert listener.access_log == m.AccessLog(str(files.parent / "access.log"), "json")
    assert listener.certificates == (m.Certificate(files.parent / "site.pem", files.parent / "site.key"),)
    assert listener.tls == m.ListenerTls()
    assert listener.routes == (
        m.Route(
            host="*.example.org",
            path=m.PathRule("prefix", "/api"),
            method="GET",
            request_headers=m.HeaderEdits(set=(("X-Env", "prod"),), remove=("Cookie2",)),
            cluster="api",
        ),
        m.Route(host="old.example.org", redirect=m.Redirect("https", 301)),
        m.Route(path=m.PathRule("exact", "/private"), deny=403),
        m.Route(path=m.PathRule("regex", "^/ok/[0-9]+$"), answer=m.FixedAnswer(200, "ok")),
    )
    app, api = parsed.clusters
    assert app.backends == (
        m.Backend(m.Address("127.0.0.1", 9000), 2),
        m.Backend(m.Address("", 0, "/run/app.sock")),
    )
    assert app.max_in_flight == 0
    assert app.sticky_cookie == "TIDEGATE"
    assert app.eject == m.Eject(5, 10 * S)
    assert app.health == m.Health("/healthz", 5 * S, 2 * S, 2, 3, ())
    assert api.backends == (m.Backend(m.Address("api.internal", 9001)),)
    assert api.tls == m.BackendTls(True, "api.internal", None)


def test_splice_after_a_certificate_is_said_to_belong_to_the_listener(files: Path) -> None:
    moved = LONG.replace('splice = "auto"\nsplice_after = "256KiB"\n', "").replace(
        'key = "site.key"\n', 'key = "site.key"\nsplice = "auto"\nsplice_after = "256KiB"\n'
    )
    with pytest.raises(ConfigErrors) as caught:
        whole(moved, str(files))
    assert [error.message for error in caught.value.errors] == [
        f"{key} belongs in [[listener]], but stands in [[listener.certificate]]"
        for key in ("splice", "splice_after")
    ]
    assert all("move it above [[listener.certificate]] (line " in error.fix for error in caught.value.errors)


def test_defaults_of_a_tcp_listener() -> None:
    parsed = tcp()
    (listener,) = parsed.listeners
    assert (parsed.workers, parsed.control, parsed.user) == (None, "/run/tidegate/control.sock", "auto")
    assert (parsed.hang_after_ns, parsed.drain_timeout_ns) == (200 * MS, 30 * S)
    assert (parsed.metrics, parsed.max_session_age_ns) == (None, None)
    assert (listener.backlog, listener.accept_queue, listener.max_connections) == (4096, 1024, None)
    assert (listener.stale_after_ns, listener.front_timeout_ns) == (S, 60 * S)
    assert listener.zombie_after_ns == 600 * S
    assert (listener.splice, listener.splice_after) == (m.Splice.AUTO, 262_144)
    cluster = parsed.cluster("app")
    assert (cluster.balance, cluster.max_in_flight) == (m.Balance.P2C, None)
    assert (cluster.connect_timeout_ns, cluster.back_timeout_ns, cluster.retries) == (3 * S, 30 * S, 2)
    assert (cluster.sticky_cookie, cluster.eject, cluster.health, cluster.tls) == ("", None, None, None)


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ('workers = "auto"', "workers", None),
        ("workers = 4", "workers", 4),
        ("pin_workers = true", "pin_workers", True),
        ('queue_age = "tcp_info"', "queue_age", m.QueueAgeSource.TCP_INFO),
        ('drain_timeout = "0s"', "drain_timeout_ns", 0),
        ("drain_timeout = 0", "drain_timeout_ns", 0),
        ('user = ""', "user", ""),
        ('user = "root"', "user", "root"),
        ('max_session_age = "1h"', "max_session_age_ns", 3600 * S),
        ('log = { level = "debug" }', "log", m.Log("debug", "text")),
        ('cgroup = "blue"', "cgroup", "blue"),
        ('splice_limit = "1MiB"', "splice_limit", 1 << 20),
        ('metrics = "off"', "metrics", None),
    ],
)
def test_keys_of_the_process(line: str, field: str, value: object) -> None:
    assert getattr(tcp(top=line), field) == value


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ('name = "front"', "name", "front"),
        ("max_connections = 1", "max_connections", 1),
        ('stale_after = "500ms"', "stale_after_ns", 500 * MS),
        ('when_queue_full = "drop_oldest"', "when_queue_full", m.WhenQueueFull.DROP_OLDEST),
        ("abort_on_close = true", "abort_on_close", True),
        ('when_full = "refuse"', "when_full", m.WhenFull.REFUSE),
        ('trusted = ["10.0.0.0/8", "::1"]', "trusted", (ip_network("10.0.0.0/8"), ip_network("::1/128"))),
        ("splice_after = 0", "splice_after", 0),
        ('splice_after = "0"', "splice_after", 0),
        ('splice = "off"', "splice", m.Splice.OFF),
    ],
)
def test_keys_of_a_listener(line: str, field: str, value: object) -> None:
    assert getattr(tcp(listener=line).listeners[0], field) == value


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ('balance = "round_robin"', "balance", m.Balance.ROUND_ROBIN),
        ('max_in_flight = "off"', "max_in_flight", None),
        ("retries = 0", "retries", 0),
        ('sticky = "off"', "sticky_cookie", ""),
        ('eject = "off"', "eject", None),
        ("tcp_keepalive = false", "tcp_keepalive", False),
    ],
)
def test_keys_of_a_cluster(line: str, field: str, value: object) -> None:
    assert getattr(tcp(cluster=line).cluster("app"), field) == value


def test_via_off_is_no_via() -> None:
    assert whole(FIRST.replace("cluster =", 'via = "off"\ncluster =', 1)).listeners[0].via == ""


def test_relative_paths_start_at_the_file() -> None:
    assert config.parse(FIRST, "/etc/tidegate/x.toml", allow_pending=True).control == defaults.CONTROL
    parsed = config.parse("control = 'run/c.sock'\n" + FIRST, "/etc/tidegate/x.toml", allow_pending=True)
    assert parsed.control == "/etc/tidegate/run/c.sock"


def test_instances_have_cgroups_of_their_own() -> None:
    ours, other = tcp(), tcp(top='control = "/run/other/control.sock"')
    assert ours.cgroup == "main"
    assert re.fullmatch(r"[A-Za-z0-9-]{1,64}", other.cgroup) and other.cgroup != ours.cgroup
    assert tcp(top='control = "/run/other/control.sock"').cgroup == other.cgroup
    assert tcp(top='control = "/run/other-control.sock"').cgroup != other.cgroup


def test_the_source_is_no_part_of_the_value() -> None:
    assert config.parse(FIRST, "a", allow_pending=True) == config.parse(FIRST, "b", allow_pending=True)


@pytest.mark.parametrize("listeners", [256, 257])
def test_no_more_listeners_than_the_kernel_side_has(listeners: int) -> None:
    text = "".join(
        f'[[listener]]\naddress = "127.0.0.{n % 250 + 1}:{8000 + n}"\nprotocol = "tcp"\ncluster = "app"\n'
        for n in range(listeners)
    )
    text = f'workers = 1\n{text}[cluster.app]\nbackends = ["127.0.0.1:9000"]\n'
    if listeners <= 256:
        assert len(config.parse(text).listeners) == listeners
        with pytest.raises(ConfigErrors, match="write workers = 16"):
            config.parse(text.replace("workers = 1\n", "workers = 17\n"))
    else:
        with pytest.raises(ConfigErrors, match="256 is the limit"):
            config.parse(text)


def test_bounds_are_those_of_records_h() -> None:
    header = (Path(__file__).parents[3] / "bpf" / "records.h").read_text()
    for name in ("MAX_WORKERS", "MAX_LISTENERS", "MAX_SLOTS"):
        found = re.search(rf"#define {name} (\d+)", header)
        assert found and int(found[1]) == getattr(defaults, name)


class TestCertificates:
    """What is wrong with a certificate is found when the file is checked, not at the first handshake."""

    def errors(self, files: Path) -> list[str]:
        with pytest.raises(ConfigErrors) as caught:
            whole(LONG, str(files))
        return [error.message for error in caught.value.errors]

    def test_key_of_another(self, files: Path) -> None:
        trustme.CA().issue_cert("example.org").private_key_pem.write_to_path(files.parent / "site.key")
        (message,) = self.errors(files)
        assert "is not the key of" in message

    def test_no_pem(self, files: Path) -> None:
        (files.parent / "site.pem").write_text("hello")
        (message,) = self.errors(files)
        assert message.startswith("the certificate cannot be used")

    def test_passphrase(self, files: Path) -> None:
        serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
        path = files.parent / "site.key"
        key = serialization.load_pem_private_key(path.read_bytes(), None)
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(b"secret"),
            )
        )
        (message,) = self.errors(files)
        assert "passphrase" in message

    def test_directory_in_place_of_a_file(self, files: Path) -> None:
        (files.parent / "site.pem").unlink()
        (files.parent / "site.pem").mkdir()
        (message,) = self.errors(files)
        assert "is not a regular file" in message

    def test_good_one_loads_as_the_check_says(self, files: Path) -> None:
        parsed = whole(LONG, str(files))
        pair = parsed.listeners[0].certificates[0]
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(pair.cert, pair.key)


def test_answer_files_are_bounded(files: Path) -> None:
    (files.parent / "503.html").write_bytes(b"x" * (defaults.MAX_ANSWER_FILE + 1))
    with pytest.raises(ConfigErrors, match="larger than 64KiB"):
        whole(LONG, str(files))


def test_one_error_does_not_hide_another() -> None:
    with pytest.raises(ConfigErrors) as caught:
        whole(
            '[[listener]]\naddress = "127.0.0.1:1"\nprotocol = "https"\nbacklog = "x"\ncluster = "nope"\n'
            '[[listener]]\naddress = "127.0.0.1:1"\nprotocol = "tcp"\ncluster = "app"\nstale_after = 1\n'
            '[cluster.app]\nbackends = ["127.0.0.1:1"]\nretries = 99\n'
        )
    assert [error.key_path for error in caught.value.errors] == [
        "listener[0]",
        "listener[0].backlog",
        "listener[0].cluster",
        "listener[1].address",
        "listener[1].stale_after",
        "cluster.app.retries",
    ]


@pytest.mark.parametrize(
    ("table", "cls"),
    [
        (process_tables.PROCESS, Config),
        (listener_tables.LISTENER, m.Listener),
        (cluster_tables.CLUSTER, m.Cluster),
        (route_tables.ROUTE, m.Route),
    ],
)
def test_every_field_of_the_model_has_a_key(table: Table, cls: type) -> None:
    derived = {Config: {"source"}, m.Cluster: {"name"}}.get(cls, set())
    assert {key.attribute for key in table.keys} == {field.name for field in fields(cls)} - derived


def test_defaults_of_tables_are_the_defaults_of_their_keys() -> None:
    checked = 0
    for table in all_tables(process_tables.PROCESS):
        for key in table.keys:
            if isinstance(key.kind, Sub) and key.default not in (None, ""):
                for inner in key.kind.table.keys:
                    assert getattr(key.default, inner.attribute) == inner.default, f"{key.name}.{inner.name}"
                    checked += 1
    assert checked > 10


def test_defaults_written_out_read_back_as_defaults() -> None:
    """Each documented default is a value that the key takes, and means what leaving it out means."""
    plain = tcp()
    for table, place in (
        (process_tables.PROCESS, "top"),
        (listener_tables.LISTENER, "listener"),
        (cluster_tables.CLUSTER, "cluster"),
    ):
        tried = 0
        for key in table.keys:
            text = key.default_text
            if (
                not text.startswith("`")
                or key.default is REQUIRED
                or text.count("`") > 2
                or key.name == "metrics"
            ):
                continue
            if len(key.only) < len(m.Protocol) or key.name in (
                "pool",
                "max_waiting",
                "codel_target",
                "codel_interval",
            ):
                continue
            assert tcp(**{place: f"{key.name} = {text.strip('`')}"}) == plain, key.name
            tried += 1
        assert tried > 5
