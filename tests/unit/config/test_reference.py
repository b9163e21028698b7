"""docs/configuration.md has every key there is, with its default, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tidegate import config
from tidegate.config import process_tables, reference
from tidegate.config.schema import REQUIRED, all_tables

DOCUMENT = Path(__file__).parents[3] / "docs" / "configuration.md"


def documented() -> dict[str, dict[str, list[str]]]:
    """Table title -> key -> cells, read from the page alone."""
    found: dict[str, dict[str, list[str]]] = {}
    for title, body in re.findall(
        r"<!-- keys: (.+?) -->\n(.*?)<!-- end -->", DOCUMENT.read_text(), re.DOTALL
    ):
        rows = [line.strip("|").split(" | ") for line in body.splitlines() if line.startswith("| `")]
        found[title] = {row[0].strip(" `"): [cell.strip() for cell in row] for row in rows}
    return found


def test_every_key_is_documented_and_every_documented_key_is_one() -> None:
    expected = {title: set(table.names) for title, table in reference.tables().items()}
    assert {title: set(keys) for title, keys in documented().items()} == expected


def test_documented_defaults_are_the_defaults() -> None:
    page = documented()
    for title, table in reference.tables().items():
        for key in table.keys:
            default = page[title][key.name][2]
            assert default == key.default_text
            assert (default == "required") == (key.default is REQUIRED)


def test_the_page_is_up_to_date() -> None:
    text = DOCUMENT.read_text()
    assert reference.refresh(text) == text, "run: python -m tidegate.config.reference docs/configuration.md"


def test_every_key_has_a_meaning() -> None:
    for table in all_tables(process_tables.PROCESS):
        assert table.doc.endswith((".", "!"))
        for key in table.keys:
            assert key.doc.endswith("."), f"{table.title} {key.name}"
            assert key.kind.label


def test_the_examples_of_the_page_are_good() -> None:
    examples = re.findall(r"```toml\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    whole = [text for text in examples if "[cluster" in text]
    assert len(whole) >= 2
    for text in whole:
        config.parse(text, "web.toml")


def test_the_errors_of_the_page_are_what_is_printed() -> None:
    shown = re.search(
        r"\$ tidegate check web.toml\n(.*?)\nweb.toml: 2 errors", DOCUMENT.read_text(), re.DOTALL
    )
    assert shown
    text = (
        'workrs = 2\n[[listener]]\naddress = "127.0.0.1:8080"\nprotocol = "tcp"\ncluster = "app"\n'
        'stale_after = 500\n[cluster.app]\nbackends = ["127.0.0.1:9000"]\n'
    )
    with pytest.raises(config.ConfigErrors) as caught:
        config.parse(text, "web.toml")
    assert "\n".join(map(str, caught.value.errors)) == shown[1]
