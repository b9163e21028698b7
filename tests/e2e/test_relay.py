"""Bytes through the proxy: real servers behind it, real clients in front of it."""

from __future__ import annotations

import hashlib
import random
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness.backends import Backend
from harness.client import run
from harness.line_client import LineClient
from harness.plan import Plan
from harness.ports import free_port, wait_listening
from harness.proc import Tidegate, tcp_config
from harness.processes import Child
from harness.waiting import wait_until


@contextmanager
def nginx_site(directory: Path) -> Iterator[str]:
    """Serves the files of `directory` by nginx; its address."""
    port = free_port()
    config = directory / "nginx.conf"
    temporary = "".join(
        f"{name}_temp_path {directory}/{name};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config.write_text(
        f"daemon off; worker_processes 1; pid {directory}/pid; error_log stderr error;\n"
        "events { worker_connections 1024; }\n"
        f"http {{ access_log off; {temporary} server {{ listen 127.0.0.1:{port} backlog=1024;"
        f" root {directory}/site; }} }}\n"
    )
    child = Child(["nginx", "-e", "stderr", "-p", str(directory), "-c", str(config)], directory / "nginx.log")
    try:
        wait_listening(port)
        yield f"127.0.0.1:{port}"
    finally:
        child.kill()


@contextmanager
def haproxy_site(directory: Path) -> Iterator[str]:
    """HAProxy answering every request with the path."""
    port = free_port()
    config = directory / "haproxy.cfg"
    config.write_text(
        "global\n  nbthread 1\n  maxconn 2000\n"
        "defaults\n  mode http\n  timeout connect 3s\n  timeout client 30s\n  timeout server 30s\n"
        f"frontend f\n  bind 127.0.0.1:{port}\n"
        '  http-request return status 200 content-type text/plain lf-string "from haproxy %[path]"\n'
    )
    child = Child(["haproxy", "-db", "-f", str(config)], directory / "haproxy.log")
    try:
        wait_listening(port)
        yield f"127.0.0.1:{port}"
    finally:
        child.kill()


def curl(*arguments: str) -> bytes:
    done = subprocess.run(["curl", "-sS", "--max-time", "30", *arguments], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that nginx's unprivileged workers can enter."""
    made = Path(tempfile.mkdtemp(prefix="tg-site-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def test_curl_and_wrk_through_to_nginx(directory: Path) -> None:
    (directory / "site").mkdir()
    blob = random.Random(5).randbytes(20_000_000)
    (directory / "site" / "blob").write_bytes(blob)
    (directory / "site" / "index.html").write_text("fresh water\n")
    with nginx_site(directory) as backend, Tidegate(tcp_config([backend])) as gate:
        url = f"http://{gate.address()}"
        assert curl(f"{url}/") == b"fresh water\n"
        assert hashlib.sha256(curl(f"{url}/blob")).digest() == hashlib.sha256(blob).digest()
        # two requests on one connection
        assert curl(f"{url}/", f"{url}/") == b"fresh water\n" * 2
        done = subprocess.run(
            ["wrk", "-t1", "-c40", "-d1s", f"{url}/"], capture_output=True, text=True, check=True, timeout=30
        )
        assert "Socket errors" not in done.stdout, done.stdout
        assert "Non-2xx" not in done.stdout, done.stdout
        requests = re.search(r"(\d+) requests in", done.stdout)
        assert requests is not None
        assert int(requests.group(1)) > 40
        done = subprocess.run(
            ["wrk", "-t1", "-c20", "-d1s", "-H", "Connection: close", f"{url}/"],
            capture_output=True, text=True, check=True, timeout=30,
        )  # fmt: skip
        assert "Non-2xx" not in done.stdout, done.stdout
        # 44 connections with keep-alive, and one for each request of the other run
        wait_until(lambda: gate.listener()["sessions"] == 0, 5, "every session to end")
        listener = gate.listener()
        assert listener["accepted"] > 64
        assert listener["accepted"] == sum(listener["ended"].values()) + sum(listener["dropped"].values())
        assert not any(listener["dropped"].get(reason) for reason in ("stale", "queue_full", "no_backend"))


def test_curl_through_to_haproxy(directory: Path) -> None:
    with haproxy_site(directory) as backend, Tidegate(tcp_config([backend])) as gate:
        assert curl(f"http://{gate.address()}/x/y") == b"from haproxy /x/y"


@pytest.mark.parametrize(
    ("front", "back"), [("::1", "127.0.0.1"), ("127.0.0.1", "::1"), ("127.0.0.1", "unix")]
)
def test_address_families(front: str, back: str, directory: Path) -> None:
    options = {"path": str(directory / "app.sock")} if back == "unix" else {"host": back}
    with Backend("echo", **options) as backend, Tidegate(tcp_config([backend.address], host=front)) as gate:
        result = run(Plan(front, gate.port(), rate=200, count=40))
        assert result.outcomes() == {"answered": 40}


def test_a_server_that_speaks_first_is_heard() -> None:
    with (
        Backend("echo", banner="220 ready\n") as backend,
        Tidegate(tcp_config([backend.address])) as gate,
        LineClient(gate.port()) as client,
    ):
        assert client.hear() == "220 ready"
        assert client.ask("EHLO") == "EHLO"


def test_half_close_both_ways() -> None:
    with Backend("exchange") as backend, Tidegate(tcp_config([backend.address])) as gate:
        done = subprocess.run(
            ["nc", "-N", "127.0.0.1", str(gate.port())],
            input=b'{"id": "a", "down": 100000, "seed": 1}\nthe end',
            capture_output=True,
            timeout=20,
            check=True,
        )
        assert len(done.stdout) == 100_000
        seen = backend.stats()["done"]["a"]
        assert (seen["up"], seen["eof"], seen["error"]) == (7, True, "")


def test_a_redis_session_is_kept_through_it(directory: Path) -> None:
    port = free_port()
    server = Child(
        ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(directory)],
        directory / "redis.log",
    )
    try:
        wait_listening(port)
        with Tidegate(tcp_config([f"127.0.0.1:{port}"])) as gate:
            cli = ["redis-cli", "-h", "127.0.0.1", "-p", str(gate.port())]
            script = "".join(f"INCR n\nSET key{i} {i}\nGET key{i}\n" for i in range(500))
            done = subprocess.run(cli, input=script, capture_output=True, text=True, timeout=30, check=True)
            answers = done.stdout.split()
            assert answers[-3:] == ["500", "OK", "499"]
            assert len(answers) == 1500
            # state that lives in the connection, and a message pushed to a client that only waits
            with LineClient(gate.port()) as waits, LineClient(gate.port()) as tells:
                assert waits.ask("CLIENT SETNAME waiter") == "+OK"
                waits.say("SUBSCRIBE tide")
                assert [waits.hear() for _ in range(6)][-1] == ":1"
                assert tells.ask("PUBLISH tide high") == ":1"
                assert [waits.hear() for _ in range(7)][-1] == "high"
            big = "x" * 3_000_000
            subprocess.run([*cli, "-x", "SET", "big"], input=big, capture_output=True, text=True, check=True)
            done = subprocess.run(
                [*cli, "GET", "big"], capture_output=True, text=True, check=True, timeout=30
            )
            assert done.stdout.strip() == big
    finally:
        server.kill()


def test_a_postgresql_session_is_kept_through_it(directory: Path) -> None:
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not binaries:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    shutil.chown(directory, "postgres")
    port = free_port()
    subprocess.run(
        ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--clear-groups", "--",
         str(binaries[-1] / "initdb"), "-D", str(directory / "data"), "-A", "trust", "--no-sync"],
        capture_output=True, check=True, timeout=60, cwd="/",
    )  # fmt: skip
    server = Child(
        [str(binaries[-1] / "postgres"), "-D", str(directory / "data"), "-p", str(port), "-h", "127.0.0.1",
         "-k", str(directory), "-F"],
        directory / "log", user="postgres", cwd=Path("/"),
    )  # fmt: skip
    try:
        wait_listening(port, 30)
        with Tidegate(tcp_config([f"127.0.0.1:{port}"])) as gate:
            script = (
                "CREATE TEMP TABLE t AS SELECT i, repeat('x', 1000) AS x FROM generate_series(1, 5000) i;\n"
                + "UPDATE t SET i = i + 1;\n" * 50
                + "SELECT sum(i), sum(length(x)) FROM t;\nCOPY t TO STDOUT;\n"
            )
            psql = [
                "psql",
                "-X",
                "-q",
                "-A",
                "-t",
                "-h",
                "127.0.0.1",
                "-p",
                str(gate.port()),
                "-U",
                "postgres",
            ]
            done = subprocess.run(psql, input=script, capture_output=True, text=True, timeout=60, check=True)
            lines = done.stdout.splitlines()
            assert lines[0] == f"{5000 * 5001 // 2 + 50 * 5000}|5000000"
            assert len(lines) == 5001
    finally:
        server.kill()


def test_balancing_and_retries_over_several_backends() -> None:
    with Backend("counting") as one, Backend("counting") as two:
        dead = f"127.0.0.1:{free_port()}"
        config = tcp_config(
            [one.address, dead, two.address],
            cluster={"balance": "round_robin", "retries": 2, "connect_timeout": "1s"},
        )
        with Tidegate(config) as gate:
            result = run(Plan("127.0.0.1", gate.port(), rate=300, count=90))
            assert result.outcomes() == {"answered": 90}
            shares = [len(one.seen()), len(two.seen())]
            assert sum(shares) == 90
            assert min(shares) >= 30, shares
            backends = {b["address"]: b for c in gate.status()["clusters"] for b in c["backends"]}
            assert backends[dead]["connect_failures"] > 0
            assert backends[one.address]["connect_failures"] == 0


def test_least_connections_avoids_the_busy_one() -> None:
    with Backend("counting") as one, Backend("counting") as two:
        config = tcp_config([one.address, two.address], cluster={"balance": "least_connections"})
        with Tidegate(config) as gate:
            held = []
            for number in range(10):
                client = LineClient(gate.port())
                assert client.ask(f"h{number}") == f"h{number}"
                held.append(client)
            assert sorted([len(one.seen()), len(two.seen())]) == [5, 5]
            for client in held:
                client.sock.close()


def test_no_backend_at_all_is_a_counted_end() -> None:
    config = tcp_config([f"127.0.0.1:{free_port()}"], cluster={"retries": 1, "connect_timeout": "1s"})
    with Tidegate(config) as gate:
        for _ in range(5):
            with LineClient(gate.port()) as client:
                client.say("hello")
                assert client.end() in ("eof", "reset")

        def closed() -> int:
            listener = gate.listener()
            reasons = {**listener["ended"], **listener["dropped"]}
            return sum(n for reason, n in reasons.items() if "backend" in reason or "connect" in reason)

        wait_until(lambda: closed() == 5, 5, "five ends for want of a backend")


def test_many_connections_from_many_addresses() -> None:
    with Backend("counting") as backend, Tidegate(tcp_config([backend.address])) as gate:
        for last in (2, 3):
            plan = Plan("127.0.0.1", gate.port(), rate=500, count=250, source=f"127.0.0.{last}")
            assert run(plan).outcomes() == {"answered": 250}
        with socket.create_connection(("127.0.0.1", gate.port())):
            pass
        assert len(backend.seen()) == 500
