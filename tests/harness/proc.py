"""A running tidegate, started from a configuration, stopped and checked for leftovers at the end."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from harness import toml
from harness.kernel_objects import KernelObjects, cgroup2_mounts, held_by
from harness.ports import free_port
from harness.processes import Child, alive, child_pids, python, python_env, session_pids
from harness.waiting import DeadlineError, wait_until
from tidegate.control.client import ControlUnreachable, call

_numbers = itertools.count(1)
Table = dict[str, Any]


def tcp_config(
    backends: Sequence[str],
    *,
    workers: int = 1,
    cluster: Table | None = None,
    top: Table | None = None,
    **listener: Any,
) -> Table:
    """One TCP listener named "front" on a free port, one cluster "back" with these backends."""
    host = listener.pop("host", "127.0.0.1")
    port = free_port(host)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return {
        "workers": workers,
        # tests leave sessions open when they end: what is to be seen of draining sets its own
        "drain_timeout": "2s",
        **(top or {}),
        "listener": [
            {"name": "front", "address": address, "protocol": "tcp", "cluster": "back", **listener},
        ],
        "cluster": {"back": {"backends": list(backends), **(cluster or {})}},
    }


class Tidegate:
    """`with Tidegate(config) as gate:` runs it from ready to clean end.

    The configuration gets a control socket and a cgroup instance of its own. Leaving the block stops it by
    SIGTERM, and asserts that no process, BPF object or cgroup is left. A test that killed the supervisor
    itself calls `forget_cgroup()` where an empty cgroup directory is allowed to stay.
    """

    def __init__(
        self,
        config: Table | str,
        *,
        user: str = "",
        nofile: int = 0,
        env: Mapping[str, str] | None = None,
        cpus: Sequence[int] = (),
        ready_timeout_s: float = 20.0,
        stop_timeout_s: float = 15.0,
        instance: str = "",
        may_raise: bool = False,
    ) -> None:
        """`user` runs all of it as that user; `nofile` is RLIMIT_NOFILE; `instance` names the cgroup. An
        exception in the log fails the test, unless it `may_raise`.
        """
        self._temporary = tempfile.TemporaryDirectory(prefix="tg-e2e-")
        self.directory = Path(self._temporary.name)
        self.instance = instance or f"e2e-{os.getpid()}-{next(_numbers)}"
        self.control = str(self.directory / "control.sock")
        self.config_path = self.directory / "tidegate.toml"
        self._config = config
        self._user = user
        self._nofile = nofile
        self._env = dict(env or {})
        self._cpus = cpus
        self._ready_timeout_s = ready_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._child: Child | None = None
        self._objects = KernelObjects()
        self._cgroup_may_stay = False
        self._may_raise = may_raise
        self._successor = 0  # pid of the supervisor that took over by an upgrade
        self.exit_status: int | None = None

    # life

    def __enter__(self) -> Self:
        self.write_config(self._config)
        if self._user:
            os.chown(self.directory, pwd.getpwnam(self._user).pw_uid, -1)
        else:
            self.directory.chmod(0o755)  # workers without privileges may look for files named in it
        self._child = Child(
            [python(), "-m", "tidegate_tools.main", "run", str(self.config_path)],
            self.directory / "log",
            env=python_env(self._env),
            user=self._user,
            nofile=self._nofile,
            cpus=self._cpus,
        )
        try:
            wait_until(self._ready_or_dead, self._ready_timeout_s, "event=ready")
            if self._child.process.poll() is not None:
                raise AssertionError(f"tidegate ended with {self._child.process.returncode}")
            self._objects = self.objects_held()
        except BaseException as error:
            error.add_note(f"--- log of tidegate\n{self.log()}")
            self._child.kill()
            self._temporary.cleanup()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        try:
            self._objects.add(self.objects_held())
            if error is None:
                if self.alive():
                    self.stop()
                self.assert_nothing_left()
                if not self._may_raise:
                    assert "Traceback (most recent call last)" not in self.log(), "it logged an exception"
        except BaseException as failure:
            error = failure
            raise
        finally:
            if error is not None:
                error.add_note(f"--- log of tidegate (last lines)\n{self.log()[-6000:]}")
                self._end_quietly()
            self.child.kill()
            self._temporary.cleanup()

    def _end_quietly(self) -> None:
        """After a failure: at once, but by a signal first, so that it can clean up after itself."""
        if self.child.process.poll() is None:
            self.child.signal(signal.SIGINT)
            try:
                self.child.wait(5)
            except subprocess.TimeoutExpired:
                return

    def _ready_or_dead(self) -> bool:
        return "event=ready" in self.log() or self.child.process.poll() is not None

    def stop(self, signals: Sequence[int] = (signal.SIGTERM,)) -> int:
        """Sends each signal once and waits; the exit status.

        Raises:
            AssertionError: it did not end within the limit (it is killed then).
        """
        for number in signals:
            os.kill(self.supervisor_pid, number)
        return self.wait()

    def wait(self) -> int:
        """Waits for its end; the exit status. Raises AssertionError as `stop` does."""
        try:
            self.exit_status = self.child.wait(self._stop_timeout_s)
            if self._successor:  # nobody's child of ours: it has no exit status to collect
                wait_until(lambda: not alive(self._successor), self._stop_timeout_s, "the successor's end")
        except (subprocess.TimeoutExpired, DeadlineError):
            held = {pid: Path(f"/proc/{pid}/wchan").read_text() for pid in session_pids(self.child.pid)}
            self.child.kill()
            raise AssertionError(
                f"still running {self._stop_timeout_s:g} s after the signal: {held}"
            ) from None
        return self.exit_status

    def upgrade(self, timeout_s: float = 20.0) -> int:
        """SIGUSR2, and waits until a successor answers and the old supervisor has ended; the new pid."""
        old = self.supervisor_pid
        self._objects.add(self.objects_held())
        os.kill(old, signal.SIGUSR2)

        def taken_over() -> int:
            try:
                pid = int(self.status()["pid"])
            except ControlUnreachable:
                return 0
            return pid if pid != old else 0

        self._successor = wait_until(taken_over, timeout_s, "a successor to answer")
        wait_until(lambda: not alive(old), timeout_s, "the predecessor to end")
        return self._successor

    def kill_everything(self) -> None:
        """Kills the supervisor and every worker by SIGKILL, at once."""
        self._objects.add(self.objects_held())
        for pid in [self.supervisor_pid, *self.worker_pids()]:
            os.kill(pid, signal.SIGKILL)
        self.child.wait(10)

    def forget_cgroup(self) -> None:
        """The test has an argument why the cgroup directory may outlive it."""
        self._cgroup_may_stay = True

    # what it is

    @property
    def child(self) -> Child:
        if self._child is None:
            raise RuntimeError("not started")
        return self._child

    @property
    def supervisor_pid(self) -> int:
        return self._successor or self.child.pid

    def worker_pids(self) -> list[int]:
        """By worker index when the control socket answers, else the supervisor's children."""
        try:
            workers = self.status()["workers"]
        except ControlUnreachable:
            return child_pids(self.supervisor_pid)
        return [worker["pid"] for worker in sorted(workers, key=lambda w: w["index"])]

    def address(self, listener: str = "front") -> str:
        """As configured, "host:port"."""
        config = self._config
        assert isinstance(config, dict), "only for configurations given as a dictionary"
        for entry in config["listener"]:
            if entry.get("name", entry["address"]) == listener:
                return str(entry["address"])
        raise KeyError(listener)

    def port(self, listener: str = "front") -> int:
        return int(self.address(listener).rpartition(":")[2])

    def status(self, timeout_s: float = 5.0) -> Table:
        return self.call("status", timeout_s=timeout_s)

    def call(self, verb: str, args: Table | None = None, timeout_s: float = 5.0) -> Table:
        return call(self.control, verb, args, timeout_s=timeout_s)

    def listener(self, name: str = "front") -> Table:
        """That listener's entry in `status`."""
        for entry in self.status()["listeners"]:
            if entry["name"] == name:
                return dict(entry)
        raise KeyError(name)

    def log(self) -> str:
        return self.child.output()

    def events(self, name: str) -> list[dict[str, str]]:
        """Log lines with event=NAME, as their keys and values (quoted values keep no quotes)."""
        found = []
        for line in self.log().splitlines():
            fields = _fields(line)
            if fields.get("event") == name:
                found.append(fields)
        return found

    # what it leaves

    def write_config(self, config: Table | str) -> None:
        """Writes the file it reads: for the start, or before a reload."""
        if isinstance(config, str):
            text = config
        else:
            text = toml.dumps({"control": self.control, "cgroup": self.instance, **config})
        self._config = config
        self.config_path.write_text(text)
        self.config_path.chmod(0o644)

    def cgroups(self) -> list[Path]:
        """Directories of this instance in the cgroup tree, whatever the mount."""
        found = []
        for mount in cgroup2_mounts():
            found += [path for path in mount.glob(f"**/tidegate/{self.instance}") if path.is_dir()]
        return found

    def objects_held(self) -> KernelObjects:
        """BPF objects open in its processes now."""
        return held_by(session_pids(self.child.pid))

    @property
    def objects_seen(self) -> KernelObjects:
        """BPF objects it was ever seen to hold."""
        return self._objects

    def assert_nothing_left(self) -> None:
        """No process, no BPF program, map or link, no cgroup.

        The kernel frees them after the last holder is reaped, which is not the moment of our wait(2)
        returning: a second is given.
        """
        session = self.child.pid
        wait_until(lambda: not session_pids(session), 5, "its processes to end")
        if os.geteuid() == 0:
            wait_until(
                lambda: not self._objects.remaining(), 2, f"BPF objects to go: {self._objects.remaining()}"
            )
        if not self._cgroup_may_stay:
            assert not self.cgroups(), f"cgroup left: {self.cgroups()}"

    def alive(self) -> bool:
        return alive(self.supervisor_pid)


def _fields(line: str) -> dict[str, str]:
    """key=value pairs of one log line; a value may be quoted as JSON strings are."""
    fields: dict[str, str] = {}
    rest = line.partition(" ")[2]
    while rest:
        key, found, rest = rest.partition("=")
        if not found:
            break
        if rest.startswith('"'):
            end = 1
            while end < len(rest) and rest[end] != '"':
                end += 2 if rest[end] == "\\" else 1
            fields[key] = rest[1:end]
            rest = rest[end + 1 :].lstrip(" ")
        else:
            fields[key], _, rest = rest.partition(" ")
    return fields


def run_tidegate(*arguments: str, timeout_s: float = 30.0) -> subprocess.CompletedProcess[str]:
    """The `tidegate` command with these arguments, to its end."""
    return subprocess.run(
        [python(), "-m", "tidegate_tools.main", *arguments],
        capture_output=True,
        text=True,
        env=python_env(),
        timeout=timeout_s,
        check=False,
    )


def has(program: str) -> bool:
    return shutil.which(program) is not None
