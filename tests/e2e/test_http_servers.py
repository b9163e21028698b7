"""Application servers behind the proxy, and client libraries and programs before it: each with each."""

from __future__ import annotations

import hashlib
import http.client
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from harness import apps, wrk
from harness.app_servers import AppServer, gunicorn, uvicorn
from harness.http_wire import HttpClient
from harness.proc import Tidegate, tcp_config
from harness.waiting import wait_until

MIB = 1 << 20
SERVERS: dict[str, Callable[[], AppServer]] = {
    "gunicorn": lambda: gunicorn(threads=8),
    "uvicorn-h11": lambda: uvicorn("h11"),
    "uvicorn-httptools": lambda: uvicorn("httptools"),
}


class Site:
    """A proxy before one server."""

    def __init__(self, gate: Tidegate, server: AppServer) -> None:
        self.gate = gate
        self.server = server
        self.url = f"http://{gate.address()}"


@pytest.fixture(scope="module", params=list(SERVERS))
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    with (
        SERVERS[request.param]() as server,
        Tidegate(tcp_config([server.address], protocol="http", front_timeout="60s")) as gate,
    ):
        yield Site(gate, server)


def told(fields: Any) -> dict[str, Any]:
    """What the server says it saw, by its answer's fields."""
    return apps.decode(fields["X-Seen"])


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_requests_keeps_its_connection(site: Site) -> None:
    before = site.gate.listener()["accepted"]
    content = os.urandom(300_000)
    with requests.Session() as session:
        session.trust_env = False
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"):
            answer = session.request(
                method, f"{site.url}/a%20b?q=1&r=", data=b"ab" if method != "HEAD" else None
            )
            assert answer.status_code == 200
            seen = told(answer.headers)
            assert (seen["method"], seen["target"]) == (method, "/a%20b?q=1&r=")
            assert seen["body"] == ("ab" if method != "HEAD" else "")
        answer = session.post(f"{site.url}/upload", data=content)
        assert told(answer.headers)["digest"] == digest(content)
        pieces = (content[at : at + 7000] for at in range(0, len(content), 7000))
        answer = session.post(f"{site.url}/upload", data=pieces)  # of no known length: chunked
        assert told(answer.headers)["digest"] == digest(content)
        answer = session.get(f"{site.url}/bytes/1000000")
        assert answer.content == apps.PATTERN * 15 + apps.PATTERN[: 1_000_000 % len(apps.PATTERN)]
        with session.get(f"{site.url}/bytes/100000000", stream=True) as partly:
            assert next(partly.iter_content(1000)) == apps.PATTERN[:1000]
        # the last one was left in the middle, which ends its connection; all others went over one
        assert session.get(f"{site.url}/").status_code == 200
    assert site.gate.listener()["accepted"] - before == 2


def test_http_client_in_one_connection(site: Site) -> None:
    client = http.client.HTTPConnection("127.0.0.1", site.gate.port(), timeout=20)
    for at in range(20):
        client.request("POST", f"/{at}", body=b"x" * at, headers={"X-At": str(at)})
        answer = client.getresponse()
        assert answer.read() == b"seen"
        seen = told(answer.headers)
        assert (seen["target"], seen["length"]) == (f"/{at}", at)
    client.request("POST", "/pieces", body=iter([b"ab", b"c" * 100_000, b"d"]), encode_chunked=True)
    answer = client.getresponse()
    assert answer.read() == b"seen"
    assert told(answer.headers)["digest"] == digest(b"ab" + b"c" * 100_000 + b"d")
    client.close()


def curl(*arguments: str, stdin: bytes | None = None) -> tuple[dict[str, str], str]:
    """The answer's fields, and what curl said under way."""
    done = subprocess.run(
        ["curl", "-sSv", "--max-time", "60", "-D", "-", "-o", "/dev/null", *arguments],
        input=stdin,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    head = done.stdout.decode("latin-1").strip().split("\r\n\r\n")[-1]
    fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:])
    return {name.title(): value for name, value in fields.items()}, done.stderr.decode()


@pytest.mark.parametrize("length", ["known", "chunked"])
def test_curl_waits_for_100_continue(site: Site, tmp_path: Path, length: str) -> None:
    """Curl would send its upload unasked after a second: it must be told, and by the server."""
    content = os.urandom(2 * MIB)
    (tmp_path / "upload").write_bytes(content)
    more = ["-T", str(tmp_path / "upload")] if length == "known" else ["-T", "-"]
    fields, said = curl(
        *["--expect100-timeout", "30", "-H", "Expect: 100-continue", *more, f"{site.url}/u"],
        stdin=content if length == "chunked" else None,
    )
    assert told(fields)["digest"] == digest(content)
    assert "< HTTP/1.1 100 " in said


def test_many_at_a_time(site: Site) -> None:
    content = os.urandom(200_000)

    def upload(at: int) -> None:
        with requests.Session() as session:
            session.trust_env = False
            for _ in range(3):
                answer = session.post(f"{site.url}/{at}", data=content)
                seen = told(answer.headers)
                assert (seen["target"], seen["digest"]) == (f"/{at}", digest(content))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(upload, range(16)))


def test_wrk_before_it(site: Site) -> None:
    seen = wrk.run(f"{site.url}/bytes/100", connections=8, seconds=1)
    assert seen.requests > 20 and seen.errors == 0


def peak_bytes(pid: int) -> int:
    """The most memory that the process has had so far (VmHWM)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


@pytest.mark.parametrize(
    "size",
    [64 * MIB, pytest.param(1024 * MIB, marks=[pytest.mark.soak, pytest.mark.timeout(900)])],
    ids=["64MiB", "1GiB"],
)
def test_a_large_upload_in_chunks_arrives_whole(site: Site, size: int) -> None:
    """And no more of it is in the proxy's memory than what it passes on at the moment."""
    (worker,) = site.gate.worker_pids()
    before = peak_bytes(worker)
    piece, sent = os.urandom(MIB), hashlib.sha256()

    def pieces() -> Iterator[bytes]:
        for at in range(size // MIB):
            data = at.to_bytes(8, "big") + piece[8:]
            sent.update(data)
            yield data

    client = http.client.HTTPConnection("127.0.0.1", site.gate.port(), timeout=600)
    client.request("POST", "/u", body=pieces(), encode_chunked=True)
    answer = client.getresponse()
    assert (answer.status, answer.read()) == (200, b"seen")
    client.close()
    seen = told(answer.headers)
    assert (seen["length"], seen["digest"]) == (size, sent.hexdigest())
    assert peak_bytes(worker) - before < 8 * MIB


def test_nothing_broke(site: Site) -> None:
    """Last: whatever the tests above did, no session failed, none is left."""
    wait_until(lambda: site.gate.listener()["sessions"] == 0, 5, "the sessions to end")
    listener = site.gate.listener()
    assert listener["ended"]["internal_error"] == 0
    assert site.gate.status()["workers"][0]["restarts"] == 0
    with HttpClient(site.gate.port()) as client:
        assert client.get("/").status == 200
