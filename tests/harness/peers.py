"""The other proxies, from Debian, each as a context manager with a generated configuration.

All of them relay from a free loopback port to one backend, log nothing per connection, and stop with the
block. `pids` are the processes that serve, for signals and for CPU time.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from harness.ports import free_port, wait_listening
from harness.processes import Child, child_pids
from harness.waiting import wait_until

_STREAM_MODULE = Path("/usr/lib/nginx/modules/ngx_stream_module.so")


class Peer:
    """A proxy that runs while the block does."""

    name = "peer"

    def __init__(self, backend: str, *, cpus: Sequence[int] = ()) -> None:
        """`backend` is "host:port"; `cpus` pins every process of the proxy."""
        self.backend = backend
        self.host = "127.0.0.1"
        self.port = free_port()
        self._cpus = cpus
        self._temporary = tempfile.TemporaryDirectory(prefix="tg-peer-")
        self.directory = Path(self._temporary.name)
        self.children: list[Child] = []

    def __enter__(self) -> Self:
        try:
            self._start()
            wait_listening(self.port)
        except BaseException as error:
            error.add_note(f"--- output of {self.name}\n{self.output()}")
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self._stop()

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def pids(self) -> list[int]:
        """The processes that serve."""
        return [child.pid for child in self.children]

    def output(self) -> str:
        return "\n".join(child.output() for child in self.children)

    def _start(self) -> None:
        raise NotImplementedError

    def _run(self, argv: Sequence[str]) -> Child:
        child = Child(argv, self.directory / f"log{len(self.children)}", cpus=self._cpus)
        self.children.append(child)
        return child

    def _stop(self) -> None:
        for child in self.children:
            child.kill()
        self._temporary.cleanup()


class HAProxy(Peer):
    """HAProxy in mode tcp or http: `threads` in each of `processes`.

    nbproc is gone since 2.5: several processes are several HAProxies whose listeners share the port by
    SO_REUSEPORT, which HAProxy sets by itself.
    """

    def __init__(
        self,
        backend: str,
        *,
        mode: str = "tcp",
        threads: int = 1,
        processes: int = 1,
        splice: bool = False,
        reuse: str = "always",
        extra: str = "",
        master: bool = False,
        cpus: Sequence[int] = (),
    ) -> None:
        """`master` runs it under a master process, which `reload()` needs."""
        super().__init__(backend, cpus=cpus)
        self.name = f"haproxy {mode}"
        if threads > 1:
            self.name += f" {threads} threads"
        if processes > 1:
            self.name += f" {processes} processes"
        self._mode = mode
        self._threads = threads
        self._processes = processes
        self._splice = splice
        self._reuse = reuse
        self._extra = extra
        self._master = master

    @property
    def pids(self) -> list[int]:
        if self._master:
            return [pid for child in self.children for pid in child_pids(child.pid)]
        return super().pids

    def reload(self) -> None:
        """SIGUSR2: the master starts new workers, which take the listeners over."""
        for child in self.children:
            child.signal(signal.SIGUSR2)

    def _start(self) -> None:
        config = self.directory / "haproxy.cfg"
        mode_lines = {
            "tcp": "  option splice-auto\n" if self._splice else "",
            "http": f"  option http-keep-alive\n  http-reuse {self._reuse}\n",
        }[self._mode]
        config.write_text(
            f"global\n  nbthread {self._threads}\n  maxconn 4000\n"
            f"defaults\n  mode {self._mode}\n"
            f"  timeout connect 3s\n  timeout client 60s\n  timeout server 60s\n"
            f"{mode_lines}  {self._extra}\n"
            f"frontend f\n  bind {self.address}\n  default_backend b\n"
            f"backend b\n  server s {self.backend}\n"
        )
        for _ in range(self._processes):
            # -W last: -db alone would switch the master mode off
            self._run(["haproxy", "-db", "-f", str(config), *(["-W"] if self._master else [])])
        # each process opens a listener of its own: all of them must be there before the load is
        wait_until(lambda: _listeners(self.port) >= self._processes, 10, "every HAProxy to listen")


class Nginx(Peer):
    """nginx as a stream proxy, or as an http one with kept-alive connections to the backend."""

    def __init__(
        self,
        backend: str,
        *,
        mode: str = "stream",
        workers: int = 1,
        reuseport: bool = False,
        keepalive: int = 128,
        cpus: Sequence[int] = (),
    ) -> None:
        super().__init__(backend, cpus=cpus)
        self.name = f"nginx {mode}"
        if workers > 1:
            self.name += f" {workers} workers"
        if reuseport:
            self.name += " reuseport"
        self._mode = mode
        self._workers = workers
        self._reuseport = reuseport
        self._keepalive = keepalive

    @property
    def pids(self) -> list[int]:
        return [pid for child in self.children for pid in child_pids(child.pid)]

    def reload(self) -> None:
        """SIGHUP: new workers on the same listeners, the old ones finish."""
        for child in self.children:
            child.signal(signal.SIGHUP)

    def _start(self) -> None:
        listen = f"listen {self.address}{' reuseport' if self._reuseport else ''} backlog=4096;"
        if self._mode == "stream":
            load = f"load_module {_STREAM_MODULE};\n" if _STREAM_MODULE.exists() else ""
            body = (
                f"stream {{\n  server {{ {listen} proxy_pass {self.backend}; proxy_timeout 60s;"
                " tcp_nodelay on; }\n}\n"
            )
        else:
            load = ""
            paths = "".join(
                f"  {name}_temp_path {self.directory}/{name};\n"
                for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
            )
            body = (
                f"http {{\n  access_log off;\n{paths}"
                f"  upstream b {{ server {self.backend}; keepalive {self._keepalive};"
                " keepalive_requests 1000000; }\n"
                f"  keepalive_requests 1000000;\n"
                f"  server {{ {listen} location / {{ proxy_pass http://b; proxy_http_version 1.1;"
                ' proxy_set_header Connection ""; } }\n}\n'
            )
        config = self.directory / "nginx.conf"
        config.write_text(
            f"{load}worker_processes {self._workers};\ndaemon off;\nworker_rlimit_nofile 20000;\n"
            f"pid {self.directory}/pid;\nerror_log stderr error;\n"
            f"events {{ worker_connections 8192; }}\n{body}"
        )
        self.directory.chmod(0o755)
        for path in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"):
            (self.directory / path).mkdir(exist_ok=True)
            (self.directory / path).chmod(0o777)
        child = self._run(["nginx", "-e", "stderr", "-p", str(self.directory), "-c", str(config)])
        wait_until(lambda: len(child_pids(child.pid)) >= self._workers, 10, "nginx workers")


def available() -> dict[str, bool]:
    """Which peers this machine has."""
    return {name: shutil.which(name) is not None for name in ("haproxy", "nginx", "wrk", "curl")}


def _listeners(port: int) -> int:
    """How many sockets listen on `port`."""
    needle = f":{port:04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return sum(1 for line in lines if line.split()[1].endswith(needle) and line.split()[3] == "0A")
