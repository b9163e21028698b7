"""The list of events, the code that logs them and the page that describes them say the same."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tidegate.cluster.balance import ClusterEvent
from tidegate.events import EventKind, replace_table
from tidegate.supervisor.verbs_events import event_name

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "control.md"
# a logger's own methods, by which of their arguments is the name
NAME_AT = {"event": (1, 2), "error": (0,), "warning": (0,), "info": (0,), "debug": (0,), "exception": (0,)}
LOGGERS = {"_log", "_limited", "_audit", "_abnormal", "_failed", "limited", "logs"}


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, ast.expr]]:
    """Each logging call, and the argument that names its event."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = node.func.value
        name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
        if name not in LOGGERS or node.func.attr not in NAME_AT:
            continue
        at = NAME_AT[node.func.attr]
        yield node, node.args[at[-1] if name == "logs" else at[0]]


def literals(node: ast.AST, function: ast.AST) -> set[str]:
    """What a name can be: itself, or what is assigned to it in its function."""
    if isinstance(node, ast.Constant):
        return {str(node.value)}
    if isinstance(node, ast.Name):
        found: set[str] = set()
        for assigned in ast.walk(function):
            if isinstance(assigned, ast.Assign) and ast.unparse(assigned.targets[0]) == node.id:
                values = [assigned.value]
                if isinstance(assigned.value, ast.IfExp):
                    values = [assigned.value.body, assigned.value.orelse]
                found |= {str(ast.literal_eval(value)) for value in values}
        assert found, f"what can {node.id} be?"
        return found
    assert ast.unparse(node) == "event.value", f"an event named by {ast.unparse(node)}"
    return {event.value for event in ClusterEvent}


def logged() -> set[str]:
    names = {"log_lost", "suppressed"}  # logs.py says these of itself
    for path in (ROOT / "userspace" / "tidegate").rglob("*.py"):
        if path.name == "logs.py":
            continue
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                for _, name in calls(function):
                    names |= literals(name, function)
    return names


def test_what_is_logged_is_listed_and_what_is_listed_is_logged() -> None:
    assert logged() == {kind.value for kind in EventKind}


def test_the_page_is_made_from_the_list() -> None:
    page = PAGE.read_text("utf-8")
    assert replace_table(page) == page, "run python -m tidegate.events docs/control.md"
    with pytest.raises(ValueError, match="lacks"):
        replace_table("# lost\n")


@pytest.mark.parametrize("kind", EventKind)
def test_each_has_one_sentence(kind: EventKind) -> None:
    assert kind.name == kind.value.upper()
    assert kind.doc.endswith(".")
    assert "|" not in kind.doc


def test_an_argument_names_one_of_them() -> None:
    assert event_name("worker_died") == "worker_died"
    with pytest.raises(ValueError, match="did you mean worker_died"):
        event_name("worker_dies")
    for other in (3, "", None, ["ready"]):
        with pytest.raises(ValueError, match="unknown event"):
            event_name(other)


def test_an_unknown_event_is_named() -> None:
    with pytest.raises(ValueError, match="unknown event 'nosuch'"):
        event_name("nosuch")
