"""Markers, and what makes a session fail besides its tests: see frame/skips.py and frame/leaks.py.

root            needs root
bpf             needs a kernel that loads our programs, and what compiles them
feature(name)   needs a feature of the kernel, by the name that tidegate's probes give it
vm              belongs to the short set that is also run on other kernels (bpf tests do anyway)
soak            the long form: only by `-m soak` or by its own name
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest
from frame import features, leaks
from frame.skips import HOST, KERNEL, Skips

_skips = pytest.StashKey[Skips]()
_notes = pytest.StashKey[list[str]]()
_session = pytest.StashKey[str]()
_cgroups = pytest.StashKey[frozenset[Path]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "feature(name): needs a kernel feature, by the name tidegate's probes give it"
    )
    config.addinivalue_line("markers", "vm: belongs to the short set that is run on other kernels too")
    config.stash[_skips] = Skips()
    config.stash[_notes] = []
    config.stash[_session] = os.environ[leaks.SESSION_VARIABLE] = uuid.uuid4().hex
    config.stash[_cgroups] = frozenset(leaks.instance_cgroups(features.cgroup2_mount()))


def _needs(item: pytest.Item) -> str | None:
    """Why this test cannot run here, or None."""
    if item.get_closest_marker("bpf") and (missing := features.missing_for_bpf()):
        return HOST + missing
    if item.get_closest_marker("root") and (missing := features.missing_for_root()):
        return HOST + missing
    for marker in item.iter_markers("feature"):
        name = marker.args[0]
        known = features.kernel_features()
        if name not in known:
            raise pytest.UsageError(
                f"{item.nodeid}: no feature {name!r}; tidegate's probes know {', '.join(known)}"
            )
        if known[name]:
            return f"{KERNEL}{name}: {known[name]}"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    by_name = any("::" in argument for argument in config.args)
    if not by_name and "soak" not in str(config.getoption("markexpr")):
        soak = [item for item in items if item.get_closest_marker("soak")]
        if soak:
            config.hook.pytest_deselected(items=soak)
            items[:] = [item for item in items if not item.get_closest_marker("soak")]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    # here, not at collection: deselected tests must not make us try what only they need
    if reason := _needs(item):
        pytest.skip(reason)


class _Watch:
    """Counts skips as they are reported."""

    def __init__(self, skips: Skips) -> None:
        self.skips = skips

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skips.add(_reason(report.longrepr), bpf="bpf" in report.keywords)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.skips.add(_reason(report.longrepr), bpf=False)


def _reason(longrepr: object) -> str:
    return str(longrepr[2]) if isinstance(longrepr, tuple) else str(longrepr)


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.pluginmanager.register(_Watch(session.config.stash[_skips]))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    notes = config.stash[_notes]
    skips = config.stash[_skips]
    notes += skips.faults(
        can_load_bpf=bool(skips.bpf) and features.missing_for_bpf() is None,
        ci=os.environ.get("CI") == "true",
    )
    name = config.stash[_session]
    since = leaks.start_ticks()
    left = leaks.settle(lambda: leaks.left_processes(name, since, os.getpid()))
    notes += [f"left behind: {process}" for process in left]
    mount = features.cgroup2_mount()
    if not leaks.other_sessions(os.getpid()):
        cgroups = leaks.settle(
            lambda: sorted(
                path
                for path in leaks.instance_cgroups(mount) - config.stash[_cgroups]
                if not leaks.of_another(path.name, os.getpid())
            )
        )
        notes += [f"left behind: cgroup {path}" for path in cgroups]
    if notes and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash[_skips].lines():
        terminalreporter.section("skipped, by what was missing")
        for line in lines:
            terminalreporter.write_line(line)
    if notes := config.stash[_notes]:
        terminalreporter.section("the session failed", red=True, bold=True)
        for line in notes:
            terminalreporter.write_line(line)
