"""The support table: what makes a run fail, and how runs become a page."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def support() -> Any:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        return importlib.import_module("devlib.support")
    finally:
        sys.path.remove(str(ROOT / "tools"))


def _feature(name: str, *, works: bool = True, required: bool = True, reason: str = "") -> dict[str, Any]:
    return {"feature": name, "works": works, "required": required, "reason": reason}


def _judge(support: Any, result: dict[str, Any] | None) -> Any:
    return support.judge("6.1", support.Outcome(result, 12.0, 60.0))


def test_run_passes_when_tests_and_required_features_do(support: Any) -> None:
    features = [_feature("steer"), _feature("wake", works=False, required=False, reason="silent")]
    run = _judge(support, {"status": 0, "kernel": "6.1.0-9", "doctor": {"features": features}})
    assert run.passed
    assert run.line() == "6.1.0-9: passed (up after 12 s, 60 s in all)"
    assert run.abilities() == "has steer; lacks wake (silent)"


@pytest.mark.parametrize(
    ("result", "fault"),
    [
        (None, "the guest gave no result"),
        (
            {"status": 1, "kernel": "6.1", "doctor": {"features": [_feature("a")]}},
            "the tests ended with status 1",
        ),
        ({"status": 0, "kernel": "6.1", "doctor": None}, "the guest's doctor did not report"),
        (
            {
                "status": 0,
                "kernel": "6.1",
                "doctor": {"features": [_feature("a", works=False, reason="gone")]},
            },
            "a must work there and does not: gone",
        ),
    ],
)
def test_run_fails(support: Any, result: dict[str, Any] | None, fault: str) -> None:
    run = _judge(support, result)
    assert not run.passed
    assert fault in run.faults
    assert "FAILED" in run.line()


def test_table_orders_kernels_by_version_and_says_how_an_absence_showed(support: Any) -> None:
    yes, no = {"works": True, "reason": ""}, {"works": False, "reason": "2 of 8 moved"}
    known = {
        "6.12": {"release": "6.12.90", "features": {"steer": yes, "migrate": yes, "splice": no}},
        "6.1": {"release": "6.1.0-56", "features": {"steer": yes, "migrate": no}},
    }
    assert support.table(known).splitlines() == [
        "| feature | 6.1.0-56 | 6.12.90 |",
        "| --- | --- | --- |",
        "| `steer` | yes | yes |",
        "| `migrate` | no (1) | yes |",
        "| `splice` | not tried | no (1) |",
        "",
        "1. 2 of 8 moved",
    ]


def test_page_keeps_what_is_around_its_table(support: Any) -> None:
    page = support.PAGE.read_text()
    placed = support.place(page, "| new |")
    assert "| new |" in placed
    assert placed.partition(support._BEGIN)[0] == page.partition(support._BEGIN)[0]
    assert placed.partition(support._END)[2] == page.partition(support._END)[2]
    assert support.place(placed, "| new |") == placed
    with pytest.raises(ValueError, match="lost the marks"):
        support.place("no marks", "")


def test_page_describes_every_feature_that_the_probes_know(support: Any) -> None:
    from tidegate.kernel import probes

    page = support.PAGE.read_text()
    assert [name for name in probes.Feature if f"| `{name}` |" not in page] == []
    assert set(probes.ABOUT) == set(probes.Feature)
