"""The hot modules as C, by mypyc: an optional build beside the checkout, never in it.

    .venv/bin/python tools/devlib/compiled.py [DIRECTORY] [--test]      (default: build/compiled)

DIRECTORY then holds a copy of the checkout's packages with the modules below compiled; put its `userspace`
first on PYTHONPATH to run it. `--test` runs the unit tests of those packages on it. The pure form is what is
installed, and what the tests run otherwise.
Needs gcc and Python's headers (apt: gcc python3-dev).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# What runs for every request. A call from one compiled module to another is a call in C. What a class here
# inherits from must be here too, and what inherits from it: tests/unit/frame/test_compiled.py.
HOT = {
    "http": "request fields head headers response answering reader chunked forwarded stamps routes errors "
    "edits cookies paths limits proxyproto",
    "session": "http_state http_front http_exchange http_response http_bodies http_splice http_back "
    "http_shared http http_upgrade plain_sockets tcp_state tcp_connect tcp tcp_guard",
    "loop": "timers reactor slab",
    "cluster": "backend balance policies pool ejection retry inflight sticky",
    "metrics": "histogram",
    "accept": "listener queue admission",
}


def build(target: Path) -> Path:
    """Make the build anew; the directory for PYTHONPATH. Raises CalledProcessError, with its output."""
    shutil.rmtree(target, ignore_errors=True)
    userspace = target / "userspace"
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "build")
    shutil.copytree(ROOT / "userspace", userspace, ignore=ignore)
    for name in ("bpf", "tools"):
        (target / name).symlink_to(ROOT / name)
    modules = [f"tidegate/{package}/{name}.py" for package, names in HOT.items() for name in names.split()]
    subprocess.run(
        [sys.executable, "-m", "mypyc", "--ignore-missing-imports", *modules],
        cwd=userspace,
        env={**os.environ, "MYPYPATH": str(userspace)},
        check=True,
        capture_output=True,
        text=True,
    )
    shutil.rmtree(userspace / "build")
    return userspace


def test(userspace: Path) -> int:
    """The unit tests of the compiled packages, on that build; pytest's exit status."""
    paths = [str(ROOT / "tests" / "unit" / package) for package in HOT]
    env = {**os.environ, "PYTHONPATH": str(userspace)}
    return subprocess.run([sys.executable, "-m", "pytest", "-q", *paths], cwd=ROOT, env=env).returncode


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    options.add_argument("directory", nargs="?", type=Path, default=ROOT / "build" / "compiled")
    options.add_argument(
        "--test", action="store_true", help="run the unit tests of the compiled packages on it"
    )
    given = options.parse_args()
    try:
        userspace = build(given.directory)
    except subprocess.CalledProcessError as error:
        print(error.stdout[-4000:], error.stderr[-4000:], sep="\n", file=sys.stderr)
        return 1
    print(userspace)
    return test(userspace) if given.test else 0


if __name__ == "__main__":
    sys.exit(main())
