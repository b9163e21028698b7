"""Bad configuration files, each with what must be said of it.

A file begins with a line `#: LINE fragment of message or fix` for every error it has; LINE 0 is the file as
a whole. They stay bad: none relies on a feature that is still to be built. Use:

    from bad_configs.cases import CASES
    @pytest.mark.parametrize("case", CASES, ids=str)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """One file and its errors in the order of their lines: (line, fragment of message or fix)."""

    path: Path
    errors: tuple[tuple[int, str], ...]

    @property
    def text(self) -> str:
        return self.path.read_text("utf-8")

    def __str__(self) -> str:
        return self.path.stem


def _case(path: Path) -> Case:
    errors = []
    for line in path.read_text("utf-8", "replace").splitlines():
        if line.startswith("#: "):
            number, fragment = line[3:].split(" ", 1)
            errors.append((int(number), fragment))
    return Case(path, tuple(errors))


CASES = tuple(_case(path) for path in sorted(HERE.glob("*.toml")))
