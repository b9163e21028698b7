"""The optional compiled build: which modules it takes together. Building it, and running tests on it, is
`tools/devlib/compiled.py --test`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]
USERSPACE = ROOT / "userspace"


def hot_modules() -> set[str]:
    sys.path.insert(0, str(ROOT / "tools" / "devlib"))
    try:
        compiled: ModuleType = importlib.import_module("compiled")
    finally:
        sys.path.pop(0)
    return {f"tidegate.{package}.{name}" for package, names in compiled.HOT.items() for name in names.split()}


HOT = hot_modules()


def classes() -> list[tuple[str, type]]:
    """Every class of the sessions, with its module: only these inherit over module borders."""
    found = []
    for path in sorted((USERSPACE / "tidegate" / "session").glob("*.py")):
        module = importlib.import_module(f"tidegate.session.{path.stem}")
        found += [(module.__name__, one) for one in vars(module).values() if inspect.isclass(one)]
    return [(module, one) for module, one in found if one.__module__ == module]


@pytest.mark.parametrize("module", sorted(HOT))
def test_what_is_compiled_exists(module: str) -> None:
    path = USERSPACE / (module.replace(".", "/") + ".py")
    assert ast.parse(path.read_text())


def test_a_class_and_what_it_inherits_from_are_compiled_together() -> None:
    """An interpreted class between compiled ones: their methods refuse its objects."""
    apart = [
        f"{module}.{one.__name__} and {base.__module__}.{base.__name__}"
        for module, one in classes()
        for base in one.__bases__
        if base.__module__.startswith("tidegate.") and (module in HOT) != (base.__module__ in HOT)
    ]
    assert apart == []
