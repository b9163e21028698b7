"""The mirrors against the header, as gcc lays it out; tcp_info's offsets against the system's header."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from tidegate.kernel import loader, records, tcp_info

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")

_PRELUDE = "#include <stddef.h>\n#include <stdio.h>\n#include <linux/types.h>\n"


def _run_c(tmp_path: Path, source: str) -> str:
    program = tmp_path / "print"
    (tmp_path / "print.c").write_text(source)
    command = ["gcc", "-std=gnu11", f"-I{loader.source_dir()}", "-o", program, tmp_path / "print.c"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return subprocess.run([program], check=True, capture_output=True, text=True).stdout


def test_every_size_and_offset_is_the_header_s(tmp_path: Path) -> None:
    prints, expected = [], []
    for record in records.SHARED:
        tag = records.c_name(record)
        prints.append(f'printf("{tag} %zu\\n", sizeof(struct {tag}));')
        expected.append(f"{tag} {ctypes.sizeof(record)}")
        for name, offset, size in records.layout(record):
            prints.append(
                f'printf("{tag}.{name} %zu %zu\\n", offsetof(struct {tag}, {name}),'
                f" sizeof(((struct {tag} *)0)->{name}));"
            )
            expected.append(f"{tag}.{name} {offset} {size}")
    for name, value in records.CONSTANTS.items():
        prints.append(f'printf("{name} %llu\\n", (unsigned long long){name});')
        expected.append(f"{name} {int(value)}")
    body = "\n".join(prints)
    out = _run_c(tmp_path, f'{_PRELUDE}#include "records.h"\nint main(void) {{\n{body}\nreturn 0;\n}}\n')
    assert out.splitlines() == expected


def test_no_struct_or_constant_of_the_header_is_unmirrored() -> None:
    header = (loader.source_dir() / "records.h").read_text()
    structs = {line.split()[1] for line in header.splitlines() if line.startswith("struct ") and "{" in line}
    defines = {line.split()[1] for line in header.splitlines() if line.startswith("#define ")}
    assert structs == {records.c_name(record) for record in records.SHARED}
    assert defines - {"TIDEGATE_RECORDS_H"} == set(records.CONSTANTS)


def test_a_differing_mirror_does_not_compile(tmp_path: Path) -> None:
    asserts = records.static_asserts()
    source = f'{_PRELUDE}#include "records.h"\n%s\nint main(void) {{ return 0; }}\n'
    assert _run_c(tmp_path, source % asserts) == ""
    wrong = asserts.replace("struct slot, arrived) == 64", "struct slot, arrived) == 72")
    assert wrong != asserts
    with pytest.raises(subprocess.CalledProcessError) as failed:
        _run_c(tmp_path, source % wrong)
    assert "slot.arrived" in failed.value.stderr


def test_slots_keep_to_cache_lines() -> None:
    assert ctypes.sizeof(records.Slot) == 128
    assert records.Slot.arrived.offset == 64
    assert ctypes.sizeof(records.AgeHistogram) % 64 == 0
    assert ctypes.sizeof(records.QueueAgeAnswer) == records.QUEUE_AGE_SIZE


def test_tcp_info_offsets(tmp_path: Path) -> None:
    fields = {
        "tcpi_state": tcp_info.TCPI_STATE,
        "tcpi_unacked": tcp_info.TCPI_UNACKED,
        "tcpi_sacked": tcp_info.TCPI_SACKED,
        "tcpi_last_data_recv": tcp_info.TCPI_LAST_DATA_RECV,
        "tcpi_last_ack_recv": tcp_info.TCPI_LAST_ACK_RECV,
    }
    body = "".join(f'printf("%zu\\n", offsetof(struct tcp_info, {name}));\n' for name in fields)
    source = f"{_PRELUDE}#include <linux/tcp.h>\nint main(void) {{\n{body}return 0;\n}}\n"
    assert [int(line) for line in _run_c(tmp_path, source).split()] == list(fields.values())
