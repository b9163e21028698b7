"""The systemd unit of docs/install.md, on a systemd that runs the machine: a guest's."""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.backends import NativeBackend
from harness.ports import free_port
from harness.waiting import wait_until

_NAME = "tidegate-documented"
_PAGE = Path(__file__).parents[2] / "docs/install.md"
_LISTENER = """\
[[listener]]
address = "127.0.0.1:{port}"
protocol = "http"
cluster = "app"
[cluster.app]
backends = ["{backend}"]
"""


def _systemctl(*words: str) -> str:
    done = subprocess.run(["systemctl", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr + _journal()
    return done.stdout.strip()


def _journal() -> str:
    return subprocess.run(
        ["journalctl", "--no-pager", "-u", _NAME], capture_output=True, text=True, timeout=60, check=False
    ).stdout


def _main_pid() -> int:
    return int(_systemctl("show", "-P", "MainPID", _NAME))


@pytest.fixture
def unit(tmp_path: Path) -> Iterator[Path]:
    """The documented unit, with this checkout's program and a configuration of ours; yields the latter."""
    found = re.search(r"```ini\n(.*?)```", _PAGE.read_text(), re.DOTALL)
    assert found is not None
    configuration = tmp_path / "tidegate.toml"
    text = found[1].replace("/opt/tidegate/bin/", f"{Path(sys.executable).parent}/")
    text = text.replace("/etc/tidegate/tidegate.toml", str(configuration))
    place = Path(f"/etc/systemd/system/{_NAME}.service")
    place.write_text(text)
    try:
        _systemctl("daemon-reload")
        yield configuration
    finally:
        subprocess.run(["systemctl", "stop", _NAME], timeout=120, check=False)
        place.unlink()
        _systemctl("daemon-reload")


@pytest.mark.root
def test_the_documented_unit(unit: Path) -> None:
    with NativeBackend("http") as backend:
        port = free_port()
        good = _LISTENER.format(port=port, backend=backend.address)
        unit.write_text(good)

        def served() -> bool:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
                return bool(answer.status == 200)

        _systemctl("start", _NAME)
        assert served(), _journal()
        first = _main_pid()
        group = _systemctl("show", "-P", "ControlGroup", _NAME)
        inside = Path("/sys/fs/cgroup" + group) / "tidegate"
        assert [path for path in inside.iterdir() if path.is_dir()], "its cgroup is below the service's"

        _systemctl("reload", _NAME)
        unit.write_text("workers = 'many'\n")
        refused = subprocess.run(["systemctl", "reload", _NAME], capture_output=True, timeout=60)
        assert refused.returncode != 0
        assert served()
        unit.write_text(good)

        program = Path(sys.executable).parent / "tidegate"
        subprocess.run([program, "upgrade"], check=True, timeout=120, capture_output=True)
        wait_until(lambda: _main_pid() != first, 60, "systemd to follow the upgrade")
        second = _main_pid()
        assert served()
        # for longer than WatchdogSec, which its successor has to feed: a restart would be another process
        usec = int(re.sub(r"\D", "", _systemctl("show", "-P", "WatchdogTimestampMonotonic", _NAME)))
        wait_until(
            lambda: int(_systemctl("show", "-P", "WatchdogTimestampMonotonic", _NAME)) > usec + 12_000_000,
            60,
            "the watchdog to be fed for longer than its limit",
        )
        assert _main_pid() == second
        assert _systemctl("show", "-P", "NRestarts", _NAME) == "0"

        _systemctl("stop", _NAME)
        assert _systemctl("show", "-P", "Result", _NAME) == "success", _journal()
        assert not Path("/run/tidegate").exists()
