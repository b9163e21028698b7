"""From C to loaded programs: compiled by a short-lived child, relocated and loaded by raw bpf(2).

Programs name maps by number (bpf/common.h); `Objects.load` writes map fds in their place. So compiled
once, a program can be loaded again later for another set of maps, without a compiler.
"""

from __future__ import annotations

import base64
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from tidegate.errors import OperatorError
from tidegate.kernel import bpf, records
from tidegate.kernel.bpf import AttachType, ProgType
from tidegate.kernel.kernel_types import member_offset

_COMPILE_TIMEOUT_S = 60.0
_VERIFIER_LOG_BYTES = 4 << 20
_LD_IMM64 = 0x18
_PSEUDO_MAP_FD = 1


class KernelUnavailable(OperatorError):
    """The kernel half cannot run here. `detail` holds the compiler's or the verifier's own words."""

    def __init__(self, message: str, fix: str = "", detail: str = "") -> None:
        super().__init__(message, fix)
        self.detail = detail


class MapNumber(IntEnum):
    """The numbers by which bpf/common.h names maps."""

    STAMPS = 1
    SLOTS = 2
    AGES = 3
    LISTENERS = 4
    MOVED = 5
    GROUP = 6
    SOCKS = 7
    SPLICED = 8
    SPLICE_INDEX = 9
    SPLICE_FLOWS = 10
    SPLICE_SOURCES = 11  # not named by the program, but the map it is attached to
    SPLICE_BELL = 12


@dataclass(frozen=True, slots=True)
class Program:
    """A source file of bpf/ and what its one function is."""

    name: str
    kind: ProgType
    attach: AttachType
    load_attach: bool = True  # whether the attach type is part of loading

    @property
    def function(self) -> str:
        return f"tidegate_{self.name}"


SOCKOPS = Program("sockops", ProgType.SOCK_OPS, AttachType.CGROUP_SOCK_OPS, load_attach=False)
GETSOCKOPT = Program("getsockopt", ProgType.CGROUP_SOCKOPT, AttachType.CGROUP_GETSOCKOPT)
STEER = Program("steer", ProgType.SK_REUSEPORT, AttachType.SK_REUSEPORT_SELECT_OR_MIGRATE)
SPLICE = Program("splice", ProgType.SK_SKB, AttachType.SK_SKB_STREAM_VERDICT)
PROGRAMS = (SOCKOPS, GETSOCKOPT, STEER, SPLICE)


def source_dir() -> Path:
    """Where the C is: beside the package in a wheel, bpf/ of the checkout otherwise."""
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "bpf", package.parent.parent / "bpf"):
        if (candidate / "records.h").is_file():
            return candidate
    raise KernelUnavailable("the BPF sources are missing from this installation", "reinstall tidegate")


def _interpreters() -> list[str]:
    """Ours, then the system's: a venv without system packages cannot see Debian's bcc."""
    found = [sys.executable or "/usr/bin/python3"]
    if os.path.exists("/usr/bin/python3") and "/usr/bin/python3" not in found:
        found.append("/usr/bin/python3")
    return found


def _run_compiler(request: str) -> dict[str, object]:
    script = str(Path(__file__).resolve().parent / "compiler.py")
    answer: dict[str, object] = {}
    for interpreter in _interpreters():
        try:
            done = subprocess.run(
                # -I: the script's own directory must not shadow what bcc imports
                [interpreter, "-I", script],
                input=request,
                capture_output=True,
                text=True,
                timeout=_COMPILE_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired as error:
            raise KernelUnavailable(f"compiling BPF took more than {_COMPILE_TIMEOUT_S:.0f} s") from error
        try:
            answer = json.loads(done.stdout)
        except ValueError:
            answer = {"error": "compile", "detail": f"the compiler ended with status {done.returncode}"}
        answer["detail"] = f"{answer.get('detail', '')}\n{done.stderr}".strip()
        if answer.get("error") != "no_bcc":
            break
    return answer


def _explain(answer: Mapping[str, object]) -> KernelUnavailable:
    detail = str(answer.get("detail", ""))
    release = os.uname().release
    match answer.get("error"):
        case "no_bcc":
            return KernelUnavailable(
                "Python's bcc module is missing", "apt-get install python3-bpfcc", detail
            )
        case "no_headers":
            return KernelUnavailable(
                f"no kernel headers for {release}: BCC cannot compile",
                f"apt-get install linux-headers-{release}; where no such package exists, install "
                f"linux-headers-amd64 and link /lib/modules/{release}/build to its "
                f"/usr/src/linux-headers-*-amd64 and /lib/modules/{release}/source to the -common one "
                "beside it (tools/dev setup does)",
                detail,
            )
        case _:
            return KernelUnavailable("the BPF programs do not compile here", "tidegate doctor", detail)


@dataclass(frozen=True, slots=True)
class Objects:
    """Compiled programs, not yet tied to maps."""

    code: Mapping[str, bytes]

    def load(self, program: Program, maps: Mapping[MapNumber, int]) -> int:
        """Loads a program over maps {MapNumber: fd}; its fd. KernelUnavailable when the kernel refuses."""
        insns = relocate(self.code[program.name], maps)
        attach = program.attach if program.load_attach else AttachType.NONE
        try:
            fd, _ = bpf.prog_load(program.kind, insns, program.function, attach)
        except OSError as error:
            raise _refused(program, insns, attach, error) from error
        return fd


def _refused(program: Program, insns: bytes, attach: AttachType, error: OSError) -> KernelUnavailable:
    if isinstance(error, PermissionError) and os.geteuid() != 0:
        return KernelUnavailable("loading BPF needs root", "run tidegate as root (workers drop it)")
    log = ""
    try:
        fd, log = bpf.prog_load(program.kind, insns, program.function, attach, _VERIFIER_LOG_BYTES)
        os.close(fd)
    except OSError as again:
        log = getattr(again, "verifier_log", "")
    reason = next((line for line in reversed(log.splitlines()) if line and "processed" not in line), "")
    return KernelUnavailable(
        f"the kernel refuses {program.name}.c: {error.strerror}{': ' + reason if reason else ''}",
        "tidegate doctor says what this kernel lacks; Linux 5.14 or newer is needed",
        log,
    )


def relocate(code: bytes, maps: Mapping[MapNumber, int]) -> bytes:
    """Replaces the numbers of maps by fds. KeyError for a map that is not given."""
    out = bytearray(code)
    at = 0
    while at < len(out):
        opcode, registers = out[at], out[at + 1]
        if opcode == _LD_IMM64:
            if registers >> 4 == _PSEUDO_MAP_FD:
                (number,) = struct.unpack_from("<i", out, at + 4)
                struct.pack_into("<i", out, at + 4, maps[MapNumber(number)])
            at += 8  # it takes two instruction slots
        at += 8
    return bytes(out)


def splice_offsets() -> dict[str, int | None]:
    """Where splice.c finds what it reads of the kernel's sockets, by the names it has for it; 0.1 s."""
    return {
        "TCP_BYTES_ACKED": member_offset("tcp_sock", "bytes_acked"),
        "TCP_BYTES_RECEIVED": member_offset("tcp_sock", "bytes_received"),
        "TCP_RCV_NXT": member_offset("tcp_sock", "rcv_nxt"),
        "SK_SNDBUF": member_offset("sock", "sk_sndbuf"),
    }


def compile_programs(programs: Iterable[Program] = PROGRAMS, defines: Iterable[str] = ()) -> Objects:
    """Compiles in a child process, 0.3 to 1 s. KernelUnavailable with the reason and the mend."""
    directory = source_dir()
    wanted = list(programs)
    # as one text: most of the time goes to the headers
    parts = [f'#line 1 "{p.name}.c"\n{(directory / f"{p.name}.c").read_text()}' for p in wanted]
    request = {
        "cflags": [
            f"-I{directory}",
            "-Wno-macro-redefined",
            *(f"-D{name}={offset or 0}" for name, offset in splice_offsets().items()),
            *(f"-D{define}" for define in defines),
        ],
        "text": "\n".join([*parts, '#line 1 "records.py"', records.static_asserts()]),
        "functions": {p.name: p.function for p in wanted},
    }
    answer = _run_compiler(json.dumps(request))
    objects = answer.get("objects")
    if not isinstance(objects, dict):
        raise _explain(answer)
    return Objects({name: base64.b64decode(code) for name, code in objects.items()})
