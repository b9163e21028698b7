"""Programs of others on both sides: curl, wrk, nghttp, Python's clients; nginx, HAProxy, http.server."""

# ruff: noqa: SIM117 - a proxy, then its clients: two levels say more than one line

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from harness import wrk
from harness.backends import NativeBackend
from harness.http_wire import ScriptedBackend, Wire, read_head
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


@contextlib.contextmanager
def wsgi_server(directory: Path) -> Iterator[str]:
    """gunicorn, two threads, keep-alive."""
    pytest.importorskip("gunicorn")
    port = free_port()
    (directory / "tidegate_app.py").write_text(
        "import hashlib, json\n"
        "def app(environ, start_response):\n"
        "    body = environ['wsgi.input'].read() if environ.get('HTTP_TRANSFER_ENCODING') or "
        "environ.get('CONTENT_LENGTH') else b''\n"
        "    start_response('200 OK', [('Content-Type', 'application/json')])\n"
        "    yield json.dumps({'method': environ['REQUEST_METHOD'], 'path': environ['PATH_INFO'],\n"
        "        'length': len(body), 'digest': hashlib.sha256(body).hexdigest()}).encode()\n"
    )
    command = [
        sys.executable,
        "-m",
        "gunicorn",
        "-b",
        f"127.0.0.1:{port}",
        "--threads",
        "2",
        "tidegate_app:app",
    ]
    child = Child(command, directory / "gunicorn.log", env={**os.environ, "PYTHONPATH": str(directory)})
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


class Digests:
    """Answers with what came: its length and digest, read piece by piece."""

    def __call__(self, wire: Wire) -> None:
        wire.recording = False  # gigabytes
        while True:
            head = read_head(wire)
            if head.get("expect"):
                wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            digest, length = hashlib.sha256(), 0
            if head.get("transfer-encoding"):
                while size := int(wire.until(b"\r\n"), 16):
                    digest.update(wire.exactly(size))
                    length += size
                    wire.exactly(2)
                wire.until(b"\r\n")
            else:
                left = int(head.get("content-length") or 0)
                while left:
                    piece = wire.exactly(min(left, 65536))
                    digest.update(piece)
                    length += len(piece)
                    left -= len(piece)
            body = json.dumps({"length": length, "digest": digest.hexdigest()}).encode()
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


@pytest.mark.parametrize("chunked", [False, True])
def test_uploads_by_curl_expecting_100(directory: Path, chunked: bool) -> None:
    content = os.urandom(BIG // 4)
    (directory / "upload").write_bytes(content)
    with ScriptedBackend(Digests()) as backend, proxy(backend.address) as gate:
        more = ["-H", "Transfer-Encoding: chunked"] if chunked else []
        for _ in range(2):
            answer = json.loads(
                curl(
                    "-H",
                    "Expect: 100-continue",
                    *more,
                    "-T",
                    str(directory / "upload"),
                    f"http://{gate.address()}/u",
                )
            )
            assert answer == {"length": len(content), "digest": hashlib.sha256(content).hexdigest()}


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_gigabyte_up_in_chunks() -> None:
    size, piece = 1 << 30, os.urandom(1 << 20)
    with ScriptedBackend(Digests()) as backend, proxy(backend.address) as gate:
        client = http.client.HTTPConnection("127.0.0.1", gate.port(), timeout=300)
        client.request("POST", "/u", body=(piece for _ in range(size // len(piece))), encode_chunked=True)
        assert json.loads(client.getresponse().read())["length"] == size
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


def test_gunicorn_behind(directory: Path) -> None:
    with wsgi_server(directory) as server, proxy(server) as gate:
        base = f"http://{gate.address()}"
        content = os.urandom(300_000)
        (directory / "upload").write_bytes(content)

        def upload(at: int) -> None:
            answer = json.loads(curl("--data-binary", f"@{directory / 'upload'}", f"{base}/{at}"))
            assert answer["path"] == f"/{at}"
            assert answer["digest"] == hashlib.sha256(content).hexdigest()

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(upload, range(12)))
