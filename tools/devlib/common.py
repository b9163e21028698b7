"""What the build of images and the runs in them share: the cache folder, the working tree, quiet commands."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_NOT_CARRIED = frozenset(
    (
        *(".git", ".venv", ".vagrant", "__pycache__", "node_modules", "dist", "build"),
        *(".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", ".import_linter_cache"),
    )
)


class BuildError(Exception):
    """The build cannot go on; the message says why and what mends it."""


def installation() -> str:
    """The part of pyproject.toml that an installation depends on, as tools/dev has it in its stamp."""
    return (ROOT / "pyproject.toml").read_text().partition("\n[tool.ruff]\n")[0]


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/tidegate or ~/.cache/tidegate, made if need be."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(base) / "tidegate"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def end_on_signals() -> None:
    """Lets SIGTERM and SIGHUP end us as an exception does, so that what is to be undone is undone."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))


def say(text: str) -> None:
    print(f"tools/dev: {text}", flush=True)


def run(argv: Sequence[str], what: str, cwd: Path | None = None) -> None:
    """Runs a noisy command in silence.

    Raises:
        BuildError: it did not end with 0; its last lines are in the message.
    """
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=cwd, check=False
    )
    if done.returncode != 0:
        tail = "\n".join(done.stdout.decode(errors="replace").splitlines()[-40:])
        raise BuildError(f"{what} failed (status {done.returncode}): {' '.join(argv)}\n{tail}")


def digest(*parts: object) -> str:
    text = json.dumps([str(part) for part in parts])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sweep(cache: Path) -> None:
    """Removes what killed runs left in the cache. The caller holds its lock: nobody is building."""
    for left in cache.glob("building.*"):
        shutil.rmtree(left, ignore_errors=True)
    for left in cache.glob("run-*.*"):
        pid = left.name.removeprefix("run-").partition(".")[0]
        if not Path("/proc", pid).exists():
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def scratch(parent: Path, name: str) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replace(cache: Path, prefix: str, made: Path, final: Path) -> None:
    """Puts what was made in its place; what it replaces, and what older inputs made, goes."""
    for old in cache.glob(f"{prefix}*"):
        shutil.rmtree(old, ignore_errors=True)
    made.rename(final)


def carried() -> Iterator[Path]:
    """The files of the working tree that a guest gets: all but caches, environments and git's own."""
    for folder, folders, files in os.walk(ROOT):
        folders[:] = sorted(set(folders) - _NOT_CARRIED)
        for name in sorted(files):
            yield Path(folder, name)


def carry_tree(into: Path) -> None:
    """Copies the working tree to a folder."""
    for path in carried():
        target = into / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target, follow_symlinks=False)


def carry_tar(file: Path, extra: dict[str, str]) -> None:
    """Packs the working tree, and `extra` small files, as a tar that a guest reads straight from a disk."""
    with tarfile.open(file, "w") as tar:
        for path in carried():
            tar.add(path, str(path.relative_to(ROOT)), recursive=False)
    with scratch(file.parent, "extra") as folder, tarfile.open(file, "a") as tar:
        for name, text in extra.items():
            (folder / "file").write_text(text)
            tar.add(folder / "file", name)
