"""Relocation, and what an operator is told when compiling is not possible: no root needed."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

from tidegate.kernel import loader
from tidegate.kernel.loader import KernelUnavailable, MapNumber

_LD_MAP = struct.Struct("<BBhiBBhi")


def _ld_map(register: int, number: int) -> bytes:
    return _LD_MAP.pack(0x18, 0x10 | register, 0, number, 0, 0, 0, 0)


def _ld_imm(register: int, low: int, high: int) -> bytes:
    return _LD_MAP.pack(0x18, register, 0, low, 0, 0, 0, high)


EXIT = bytes.fromhex("9500000000000000")


def test_relocate_writes_fds_in_place_of_numbers() -> None:
    # the second half of a constant looks like a map load: it is none
    trap = struct.unpack("<i", bytes([0x18, 0x11, 0, 0]))[0]
    code = _ld_map(1, MapNumber.SLOTS) + _ld_imm(2, 2, trap) + _ld_map(3, MapNumber.AGES) + EXIT
    done = loader.relocate(code, {MapNumber.SLOTS: 77, MapNumber.AGES: 88, MapNumber.SOCKS: 99})
    assert done == _ld_map(1, 77) + _ld_imm(2, 2, trap) + _ld_map(3, 88) + EXIT


def test_relocate_without_a_map_it_needs() -> None:
    with pytest.raises(KeyError):
        loader.relocate(_ld_map(1, MapNumber.STAMPS) + EXIT, {MapNumber.SLOTS: 3})


def test_numbers_are_those_of_the_header() -> None:
    header = (loader.source_dir() / "common.h").read_text()
    numbers = {
        line.split()[1].removeprefix("MAP_"): int(line.split()[2])
        for line in header.splitlines()
        if line.startswith("#define MAP_")
    }
    assert numbers == {number.name: number.value for number in MapNumber}


def _interpreter(tmp_path: Path, name: str, answer: dict[str, object], stderr: str = "") -> str:
    script = tmp_path / name
    script.write_text(f"#!/bin/sh\ncat >/dev/null\necho '{stderr}' >&2\necho '{json.dumps(answer)}'\n")
    script.chmod(0o755)
    return str(script)


def test_without_bcc_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = _interpreter(tmp_path, "none", {"error": "no_bcc", "detail": "No module named bcc"})
    monkeypatch.setattr(loader, "_interpreters", lambda: [none, none])
    with pytest.raises(KernelUnavailable, match="bcc module is missing") as error:
        loader.compile_programs()
    assert error.value.fix == "apt-get install python3-bpfcc"


def test_another_interpreter_may_have_bcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = _interpreter(tmp_path, "none", {"error": "no_bcc"})
    has = _interpreter(tmp_path, "has", {"objects": {"sockops": "AAAA"}})
    monkeypatch.setattr(loader, "_interpreters", lambda: [none, has])
    assert loader.compile_programs((loader.SOCKOPS,)).code == {"sockops": b"\0\0\0"}


def test_without_headers_package_and_links_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"error": "no_headers", "detail": "Failed to compile BPF module"}
    lacking = _interpreter(tmp_path, "lacking", answer, "modprobe: FATAL: Module kheaders not found")
    monkeypatch.setattr(loader, "_interpreters", lambda: [lacking])
    with pytest.raises(KernelUnavailable, match="no kernel headers") as error:
        loader.compile_programs()
    release = os.uname().release
    assert f"linux-headers-{release}" in error.value.fix
    assert f"/lib/modules/{release}/build" in error.value.fix
    assert "kheaders not found" in error.value.detail


def test_a_compiler_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "dies"
    script.write_text("#!/bin/sh\nkill -9 $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(loader, "_interpreters", lambda: [str(script)])
    with pytest.raises(KernelUnavailable, match="do not compile") as error:
        loader.compile_programs()
    assert "status -9" in error.value.detail


def test_sources_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loader, "__file__", str(tmp_path / "tidegate" / "kernel" / "loader.py"))
    with pytest.raises(KernelUnavailable, match="sources are missing"):
        loader.source_dir()
    wheel = tmp_path / "tidegate" / "bpf"
    wheel.mkdir(parents=True)
    (wheel / "records.h").touch()
    assert loader.source_dir() == wheel
