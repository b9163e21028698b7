"""Where a field lies in a structure of the running kernel, from its own type information (BTF).

Headers need not match the kernel that runs; /sys/kernel/btf/vmlinux always does.
"""

from __future__ import annotations

import struct
from pathlib import Path

VMLINUX = Path("/sys/kernel/btf/vmlinux")
_MAGIC = 0xEB9F
_KIND_STRUCT = 4
_HEADER = struct.Struct("=HBBIIIII")
_TYPE = struct.Struct("=III")  # name, kind and number of members, size; a member: name, type, bit offset


def member_offset(structure: str, member: str, path: Path = VMLINUX) -> int | None:
    """Offset of a member, bytes; None without BTF, or when the kernel has no such member. 50 ms."""
    try:
        blob = path.read_bytes()
        magic, _version, _flags, header, types_at, types_size, strings_at, strings_size = _HEADER.unpack_from(
            blob
        )
    except (OSError, struct.error):
        return None
    if magic != _MAGIC:
        return None
    types = blob[header + types_at : header + types_at + types_size]
    strings = blob[header + strings_at : header + strings_at + strings_size]
    name = strings.find(b"\0" + structure.encode() + b"\0") + 1
    wanted = b"\0" + member.encode() + b"\0"
    # walking all types takes a quarter of a second: the name is searched for, and what has it checked
    pattern, at = struct.pack("=I", name), -1
    while name and (at := types.find(pattern, at + 1)) >= 0:
        if at % 4 or at + _TYPE.size > len(types):
            continue
        _, info, _size = _TYPE.unpack_from(types, at)
        if (info >> 24) & 0x1F != _KIND_STRUCT:
            continue
        count = info & 0xFFFF
        if at + _TYPE.size * (count + 1) > len(types):
            continue
        for index in range(1, count + 1):
            label, _kind, offset = _TYPE.unpack_from(types, at + _TYPE.size * index)
            if 0 < label < len(strings) and strings.startswith(wanted, label - 1):
                # with the kind flag set the upper byte is the width of a bit field
                return int((offset & 0xFFFFFF if info >> 31 else offset) // 8)
    return None
