"""tidegate doctor: what mends what is missing, and when it is content. The kernel: tests/kernel."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import pytest
from click.testing import CliRunner

from tidegate.kernel import floors, probes
from tidegate.supervisor import abilities
from tidegate_tools import doctor
from tidegate_tools.doctor import Check, Report

OLD, FLOOR, NEW = "5.15.0-119-generic", "6.1.0-56-cloud-amd64", "6.12.95+deb12-amd64"


@pytest.mark.parametrize(
    ("release", "numbers"),
    [(OLD, (5, 15)), (FLOOR, (6, 1)), (NEW, (6, 12)), ("6.18.44-fc-v657", (6, 18)), ("custom", (0, 0))],
)
def test_versions_are_compared_as_numbers(release: str, numbers: tuple[int, int]) -> None:
    assert floors.version(release) == numbers


def test_floor_is_said_with_the_kernel_that_is_too_old() -> None:
    assert "5.15.0-119-generic is older than 6.1" in floors.below_floor(OLD)
    assert floors.below_floor(FLOOR) == floors.below_floor(NEW) == ""


def test_features_are_required_from_their_kernel_on_and_the_wake_up_of_none() -> None:
    assert not probes.required(probes.Feature.STEER, OLD)
    assert probes.required(probes.Feature.STEER, FLOOR)
    assert not any(probes.required(probes.Feature.WAKE, release) for release in (OLD, FLOOR, NEW, "9.0"))


def _all(works: bool, **but: bool) -> list[probes.Result]:
    return [
        probes.Result(name, but.get(name, works), "" if but.get(name, works) else "seen")
        for name in probes.Feature
    ]


def _examined(monkeypatch: pytest.MonkeyPatch, checks: list[Check], found: list[probes.Result]) -> None:
    stand_ins: tuple[Callable[[], Check], ...] = tuple(lambda check=check: check for check in checks)
    monkeypatch.setattr(doctor, "_CHECKS", stand_ins)
    monkeypatch.setattr(abilities, "run_alone", lambda: found)
    monkeypatch.setattr(doctor.platform, "release", lambda: NEW)


def _run(*args: str) -> tuple[int, str]:
    done = CliRunner().invoke(doctor.command, list(args))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_all_there_is_status_0(monkeypatch: pytest.MonkeyPatch) -> None:
    _examined(monkeypatch, [Check("root", True, "yes"), Check("JIT", False, "off", needed=False)], _all(True))
    status, said = _run()
    assert status == 0
    assert "advice   JIT: off" in said


def test_missing_need_is_status_1_names_its_mend_and_tries_no_feature(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _examined(monkeypatch, [Check("BCC", False, "none", fix="apt-get install python3-bpfcc")], [])
    monkeypatch.setattr(abilities, "run_alone", lambda: pytest.fail("tried all the same"))
    status, said = _run()
    assert status == 1
    assert "MISSING  BCC: none" in said
    assert "fix: apt-get install python3-bpfcc" in said
    assert "not tried, for want of: BCC" in said
    report = json.loads(_run("--json")[1])
    assert not report["ok"]
    assert {each["reason"] for each in report["features"]} == {"not tried: BCC"}


@pytest.mark.parametrize(("broken", "status"), [("migrate", 1), ("wake_after_migration", 0)])
def test_feature_that_this_kernel_must_have_decides(
    monkeypatch: pytest.MonkeyPatch, broken: str, status: int
) -> None:
    _examined(monkeypatch, [Check("root", True, "yes")], _all(True, **{broken: False}))
    code, said = _run()
    assert code == status
    assert f"no       {broken}" in said
    assert "seen: seen" in said
    assert probes.ABOUT[probes.Feature(broken)].without in said


def test_report_judges_by_the_kernel_it_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.platform, "release", lambda: OLD)
    assert Report([Check("root", True, "")], _all(False)).ok
    monkeypatch.setattr(doctor.platform, "release", lambda: FLOOR)
    assert not Report([Check("root", True, "")], _all(False)).ok


def test_a_kernel_below_the_floor_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "uname", lambda: type("Uname", (), {"release": OLD}))
    kernel = doctor._kernel()
    assert (kernel.ok, kernel.needed) == (False, True)


def test_splicing_is_required_from_its_own_kernel_on() -> None:
    assert not probes.required(probes.Feature.SPLICE, FLOOR)
    assert probes.required(probes.Feature.SPLICE, NEW)


@pytest.mark.parametrize(
    ("packaged", "fix"),
    [
        (True, "apt-get install linux-headers-6.12.95+deb12-amd64"),
        (
            False,
            "apt-get install linux-headers-amd64 && mkdir -p /lib/modules/6.12.95+deb12-amd64 && ln -sfn ",
        ),
    ],
)
def test_headers_are_mended_by_the_kernels_own_or_by_links(
    monkeypatch: pytest.MonkeyPatch, packaged: bool, fix: str
) -> None:
    monkeypatch.setattr(doctor.platform, "release", lambda: NEW)
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/usr/bin/apt-cache")
    answer = subprocess.CompletedProcess([], 0 if packaged else 100)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: answer)
    check = doctor._headers()
    assert not check.ok
    assert check.fix.startswith(fix)
