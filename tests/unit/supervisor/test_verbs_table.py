"""The table of verbs and the page about them say the same."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tidegate.control.server import Verb
from tidegate.supervisor.verbs import Verbs
from tidegate.supervisor.verbs_change import RuntimeChanges

PAGE = (Path(__file__).parents[3] / "docs" / "control.md").read_text()
# what looks only; all else changes something and must be audited
READS = {"help", "status", "workers", "listeners", "clusters", "sessions", "zombies", "errors", "events"}
READS.add("state.save")


@pytest.fixture(scope="module")
def verbs() -> dict[str, Verb]:
    supervisor: Any = SimpleNamespace(config=None)
    supervisor.changes = RuntimeChanges(supervisor)
    return Verbs(cast(Any, supervisor)).table()


def documented() -> dict[str, str]:
    rows = re.findall(r"^\| `([a-z.]+)` \|(.*?)\|(.*?)\|$", PAGE, re.MULTILINE)
    return {name: arguments for name, arguments, _ in rows}


def test_the_page_has_every_verb_with_its_arguments(verbs: dict[str, Verb]) -> None:
    page = documented()
    assert set(page) == set(verbs)
    for name, verb in verbs.items():
        named = set(re.findall(r"`([a-z_]+)`", page[name]))
        if name == "sessions.kill":  # "the filters of `sessions`"
            assert named == {"token", "sessions", "all"}
            continue
        assert named == {arg.name for arg in verb.args}, name


def test_what_changes_something_is_audited(verbs: dict[str, Verb]) -> None:
    assert {name for name, verb in verbs.items() if not verb.mutates} == READS


def test_everything_says_what_it_is(verbs: dict[str, Verb]) -> None:
    for verb in verbs.values():
        assert verb.doc.endswith(".")
        assert all(arg.doc for arg in verb.args)
