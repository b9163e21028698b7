"""Child processes that never outlive the test: own session, killed with their parent, output kept."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv" / "bin" / "python"
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


def python_env(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment in which this checkout's packages and the harness import."""
    env = dict(os.environ)
    # TIDEGATE_USERSPACE: another build of the package, such as tools/devlib/compiled.py makes
    userspace = os.environ.get("TIDEGATE_USERSPACE", str(ROOT / "userspace"))
    env["PYTHONPATH"] = os.pathsep.join((userspace, str(ROOT / "tools"), str(ROOT / "tests")))
    env["PYTHONUNBUFFERED"] = "1"
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    env.update(extra or {})
    return env


def python() -> str:
    """The checkout's interpreter."""
    return str(PYTHON) if PYTHON.exists() else os.sys.executable  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Stat:
    """Fields of /proc/PID/stat that tests ask for."""

    state: str
    parent: int
    session: int
    cpu_s: float  # user + system
    rss_bytes: int


def stat(pid: int) -> Stat | None:
    """What /proc says of `pid`, or None when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return Stat(
        state=fields[0],
        parent=int(fields[1]),
        session=int(fields[3]),
        cpu_s=(int(fields[11]) + int(fields[12])) / _CLOCK_TICKS,
        rss_bytes=int(fields[21]) * os.sysconf("SC_PAGE_SIZE"),
    )


def alive(pid: int) -> bool:
    """Whether `pid` runs; a zombie that nobody has reaped yet does not."""
    seen = stat(pid)
    return seen is not None and seen.state not in "ZX"


def pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def session_pids(session: int) -> list[int]:
    """Living processes of that session."""
    found = []
    for pid in pids():
        seen = stat(pid)
        if seen is not None and seen.session == session and seen.state not in "ZX":
            found.append(pid)
    return found


def child_pids(parent: int) -> list[int]:
    found = []
    for pid in pids():
        seen = stat(pid)
        if seen is not None and seen.parent == parent and seen.state not in "ZX":
            found.append(pid)
    return sorted(found)


def cpu_seconds(of: Sequence[int]) -> float:
    """User and system time that these processes have used so far; the dead count nothing."""
    return sum(seen.cpu_s for seen in map(stat, of) if seen is not None)


class Child:
    """A started program. Its output goes to a file, which `output()` reads."""

    def __init__(
        self,
        argv: Sequence[str],
        output: Path,
        *,
        env: Mapping[str, str] | None = None,
        user: str = "",
        nofile: int = 0,
        cpus: Sequence[int] = (),
        stdin: int = subprocess.DEVNULL,
        stdout: int | None = None,
        cwd: Path | None = None,
    ) -> None:
        """`user` is changed to by setpriv, `nofile` limits open files, `cpus` pins; empty means as we are."""
        prefix: list[str] = []
        if cpus:
            prefix += ["taskset", "-c", ",".join(map(str, cpus))]
        if nofile:
            prefix += ["prlimit", f"--nofile={nofile}:{nofile}", "--"]
        # the kernel kills it when we die, however we die: nothing is left behind by an interrupted run
        prefix += ["setpriv", "--pdeathsig", "KILL"]
        if user:
            prefix += ["--reuid", user, "--regid", "nogroup", "--clear-groups", "--inh-caps=-all"]
        prefix += ["--"]
        self.output_path = output
        with output.open("ab") as sink:
            self.process = subprocess.Popen(
                [*prefix, *argv],
                stdin=stdin,
                stdout=sink if stdout is None else stdout,
                stderr=sink,
                env=dict(env) if env is not None else None,
                start_new_session=True,
                cwd=cwd,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def output(self) -> str:
        return self.output_path.read_text(errors="replace")

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout_s: float) -> int:
        """Its exit status.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """Ends it and all of its session, at once."""
        for pid in session_pids(self.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.kill()
        self.process.wait(10)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        wait_until(lambda: not session_pids(self.pid), 10, f"the session of {self.pid} to end")


@dataclass(slots=True)
class Stopped:
    """When a process stood still, by CLOCK_MONOTONIC (ns)."""

    signalled_ns: int  # just before SIGSTOP
    since_ns: int  # it was seen stopped
    until_ns: int = 0  # just before SIGCONT


@contextmanager
def stopped(*who: int) -> Iterator[Stopped]:
    """Holds processes by SIGSTOP while the block runs."""
    signalled_ns = time.monotonic_ns()
    for pid in who:
        os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: all((seen := stat(pid)) and seen.state == "T" for pid in who), 5, "SIGSTOP")
        span = Stopped(signalled_ns, time.monotonic_ns())
        yield span
        span.until_ns = time.monotonic_ns()
    finally:
        for pid in who:
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                continue


def machine_busy_seconds() -> float:
    """CPU time that the whole machine has used since boot, interrupts and kernel threads included."""
    fields = [int(text) for text in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    idle = fields[3] + fields[4]
    return (sum(fields[:8]) - idle) / _CLOCK_TICKS
