"""`tidegate demo`: the proxy in front of backends that come with it."""

from __future__ import annotations

import ctypes
import ipaddress
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click

from tidegate.errors import OperatorError

_PR_SET_PDEATHSIG = 1
_READY_TIMEOUT_S = 60.0  # the BPF programs are compiled at start
_STOP_TIMEOUT_S = 15.0
_libc = ctypes.CDLL(None, use_errno=True)


class DemoError(OperatorError):
    """The demo could not start."""


@click.command()
@click.option("--workers", type=click.IntRange(1, 16), default=1, show_default=True, help="Worker processes.")
@click.option("--backends", type=click.IntRange(1, 8), default=2, show_default=True, help="Demo backends.")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Address to listen on; 0.0.0.0 is every IPv4 address of the host.",
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, help="Port to listen on (default: a free one)."
)
def command(workers: int, backends: int, host: str, port: int) -> None:
    """Run the proxy in front of demo backends, and print commands to try.

    Everything listens on 127.0.0.1 unless told otherwise, on free ports, with its files in a temporary
    directory. Ctrl-C ends it and leaves nothing behind.
    """
    _check(host)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    code = 0
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tidegate-demo-")))
        names = [chr(ord("a") + index) for index in range(backends)]
        addresses = [f"127.0.0.1:{stack.enter_context(_backend(name))}" for name in names]
        port = port or _free_port()
        config = directory / "tidegate.toml"
        control = directory / "control.sock"
        config.write_text(configuration(host, port, workers, addresses, str(control)))
        proxy = stack.enter_context(_proxy(config))
        click.echo(hints(host, port, str(config), str(control), addresses))
        try:
            code = proxy.wait()
        except KeyboardInterrupt:
            # once more while it drains: at once, please
            signal.signal(signal.SIGINT, lambda *_: proxy.send_signal(signal.SIGINT))
    if code:
        raise DemoError(f"tidegate ended with status {code}")
    click.echo("\nThe demo has ended; nothing is left behind.")


def configuration(host: str, port: int, workers: int, backends: list[str], control: str) -> str:
    """The demo's configuration file."""
    listed = ", ".join(f'"{address}"' for address in backends)
    return f"""\
# Written by `tidegate demo`; gone when it ends.
workers = {workers}
control = "{control}"

[[listener]]
name = "demo"
address = "{_bracketed(host)}:{port}"
protocol = "tcp"
cluster = "demo"
stale_after = "1s"                # a connection that waited longer in the kernel is refused

[cluster.demo]
backends = [{listed}]
"""


def hints(host: str, port: int, config: str, control: str, backends: list[str]) -> str:
    """What to try."""
    program = shlex.quote(_program())
    near = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://{_bracketed(near)}:{port}"
    option = f"--control {control}"
    return f"""
tidegate listens on {_bracketed(host)}:{port}, in front of {", ".join(backends)}.
Its configuration is {config}

In another terminal, try:

  curl {url}/

How long connections wait, and what was refused:

  {program} ages {port} {option}
  {program} status {option}

Make it stall for 3 seconds with clients waiting, and look:

  worker=$({program} workers {option} --json | grep -Po '"pid": \\K[0-9]+')
  kill -STOP $worker
  for i in 1 2 3 4 5; do curl -sS -m 10 {url}/$i & done; sleep 3
  {program} ages {port} {option} --connections
  kill -CONT $worker; wait
  {program} ages {port} {option}

Those that waited longer than a second were reset, not served late.

Ctrl-C ends the demo.
"""


def _check(host: str) -> None:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise click.BadParameter(
            f"{host!r} is no IP address: write 127.0.0.1 or 0.0.0.0", param_hint="--host"
        ) from None


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _program() -> str:
    """How the reader can call us."""
    called = sys.argv[0]
    if os.path.basename(called) == "tidegate" and os.access(called, os.X_OK):
        return "tidegate" if shutil.which("tidegate") == called else called
    return "tidegate"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _backend(name: str) -> Iterator[int]:
    child = subprocess.Popen(
        [sys.executable, "-m", "tidegate_tools.demo_backend", name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=_environment(),
        text=True,
    )
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line:
            raise DemoError(f"demo backend {name} did not start")
        yield int(line)
    finally:
        _end(child)


@contextmanager
def _proxy(config: Path) -> Iterator[subprocess.Popen[str]]:
    """`tidegate run`, from the moment it is ready; its log goes on to our stderr."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tidegate_tools", "run", str(config)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=_environment(),
        text=True,
        # Ctrl-C reaches the demo alone, which then lets the proxy drain
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )
    ready = threading.Event()
    reader = threading.Thread(target=_forward, args=(child, ready), daemon=True)
    reader.start()
    try:
        if not ready.wait(_READY_TIMEOUT_S) or child.poll() is not None:
            raise DemoError("the proxy did not start; its log above says why")
        yield child
    finally:
        child.terminate()
        try:
            child.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        reader.join(1.0)


def _forward(child: subprocess.Popen[str], ready: threading.Event) -> None:
    assert child.stderr is not None
    for line in child.stderr:
        click.echo(line, err=True, nl=False)
        if "event=ready" in line:
            ready.set()
    ready.set()  # it ended


def _end(child: subprocess.Popen[str]) -> None:
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            stream.close()
    try:
        child.wait(2.0)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _environment() -> dict[str, str]:
    """Ours, such that children import the same packages wherever those were found."""
    here = [path for path in sys.path if path]
    return os.environ | {"PYTHONPATH": os.pathsep.join(here), "PYTHONUNBUFFERED": "1"}
