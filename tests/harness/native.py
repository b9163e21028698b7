"""Builds the C programs in src/ on demand, once per source text."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

_SOURCES = Path(__file__).parent / "src"


def compiler() -> str | None:
    return shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")


def build(name: str) -> Path:
    """The program made from src/NAME.c, from the cache when it was built before.

    Raises:
        RuntimeError: no C compiler, or it refused the source.
    """
    source = _SOURCES / f"{name}.c"
    tag = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    cache = Path(tempfile.gettempdir()) / f"tidegate-harness-{os.getuid()}"
    cache.mkdir(mode=0o755, exist_ok=True)
    if cache.stat().st_uid != os.getuid():
        raise RuntimeError(f"{cache} belongs to somebody else: what lies in it is not run")
    program = cache / f"{name}-{tag}"
    if program.exists():
        return program
    cc = compiler()
    if cc is None:
        raise RuntimeError("no C compiler: apt-get install gcc")
    unfinished = cache / f"{name}-{tag}.{os.getpid()}"
    done = subprocess.run(
        [cc, "-O2", "-Wall", "-Werror", "-o", str(unfinished), str(source)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{source.name}: {done.stderr}")
    unfinished.rename(program)
    return program
