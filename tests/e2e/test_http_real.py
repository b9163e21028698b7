"""Programs of others on both sides: curl, wrk, nghttp, Python's clients; nginx, HAProxy, http.server."""

# ruff: noqa: SIM117 - a proxy, then its clients: two levels say more than one line

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import wrk
from harness.backends import NativeBackend
from harness.http_wire import ScriptedBackend
from harness.peers import HAProxy, Nginx
from harness.ports import free_port, wait_listening
from harness.proc import Tidegate, tcp_config
from harness.processes import Child

BIG = 16 * 1024 * 1024


@contextlib.contextmanager
def proxy(address: str, cluster: Any = None, **listener: Any) -> Iterator[Tidegate]:
    with Tidegate(tcp_config([address], protocol="http", cluster=cluster, **listener)) as gate:
        yield gate


@contextlib.contextmanager
def python_server(directory: Path) -> Iterator[str]:
    """http.server: HTTP/1.0, a connection for each request."""
    port = free_port()
    command = [sys.executable, "-m", "http.server", "-b", "127.0.0.1", "-d", str(directory), str(port)]
    child = Child(command, directory.parent / "server.log")
    try:
        wait_listening(port)
        yield f"127.0.0.1:{port}"
    finally:
        child.kill()


@pytest.fixture
def directory() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="tg-http-"))
    (made / "site").mkdir()
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def curl(*arguments: str) -> bytes:
    done = subprocess.run(["curl", "-sS", "--max-time", "60", *arguments], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def test_curl_and_python_clients_before_http_server(directory: Path) -> None:
    content = os.urandom(BIG)
    (directory / "site" / "big").write_bytes(content)
    (directory / "site" / "small").write_text("small")
    with python_server(directory / "site") as server, proxy(server) as gate:
        base = f"http://{gate.address()}"
        assert curl(f"{base}/small", f"{base}/small", f"{base}/small") == b"small" * 3
        assert curl(f"{base}/big") == content
        assert curl("--http1.0", f"{base}/small") == b"small"
        assert b"200 OK" in curl("-I", f"{base}/big")
        assert curl("-o", "/dev/null", "-w", "%{http_code}", f"{base}/missing") == b"404"
        with urllib.request.urlopen(f"{base}/small") as response:
            assert response.read() == b"small"
        client = http.client.HTTPConnection("127.0.0.1", gate.port())
        for _ in range(5):
            client.request("GET", "/small")
            response = client.getresponse()
            assert (response.status, response.read()) == (200, b"small")
        client.close()


@pytest.mark.parametrize("peer", [HAProxy, Nginx])
def test_other_proxies_and_servers_behind(peer: Any) -> None:
    """tidegate, then another proxy, then a server: kept-alive connections all the way."""
    with NativeBackend("http", body=1000) as backend, peer(backend.address, mode="http") as middle:
        with proxy(middle.address) as gate:
            assert len(curl(*[f"http://{gate.address()}/{at}" for at in range(20)])) == 20_000
            seen = wrk.run(f"http://{gate.address()}/", connections=16, seconds=1)
            assert seen.requests > 100 and seen.errors == 0
            listener = gate.listener()
            assert listener["ended"]["internal_error"] == 0


@pytest.mark.parametrize("close", [False, True])
def test_wrk_sees_no_error(close: bool) -> None:
    with NativeBackend("http") as backend, proxy(backend.address) as gate:
        seen = wrk.run(f"http://{gate.address()}/", connections=32, seconds=2, close=close)
        assert seen.requests > 200 and seen.errors == 0


@pytest.mark.skipif(not shutil.which("h2load"), reason="no h2load")
def test_h2load_speaking_http1_pipelines() -> None:
    with NativeBackend("http") as backend, proxy(backend.address) as gate:
        done = subprocess.run(
            ["h2load", "--h1", "-n", "2000", "-c", "8", "-m", "10", f"http://{gate.address()}/"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "2000 succeeded, 0 failed" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(not shutil.which("nghttp"), reason="no nghttp")
@pytest.mark.parametrize("upgrade", [True, False])
def test_nghttp_is_not_led_around_the_rules(upgrade: bool) -> None:
    """It speaks HTTP/2 at once, or asks in HTTP/1.1 to go on in it: the one is refused, the other ignored."""
    with ScriptedBackend() as backend, proxy(backend.address) as gate:
        more = ["-u"] if upgrade else []
        done = subprocess.run(
            ["nghttp", "-v", *more, f"http://{gate.address()}/secret"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert "HTTP Upgrade failed" in done.stdout + done.stderr or not upgrade
        requests = backend.seen.decode("latin-1")
        assert requests.count("/secret") == int(upgrade)
        assert "h2c" not in requests.lower() and "http2-settings" not in requests.lower()
        assert curl(f"http://{gate.address()}/after") == b"GET /after"
