"""The smallest BTF that describes a map: sk_storage demands it, and `bpftool map dump` shows names by it."""

from __future__ import annotations

import ctypes
import struct

from tidegate.kernel import records

_MAGIC = 0xEB9F
_KIND_INT, _KIND_ARRAY, _KIND_STRUCT = 1, 3, 4


class _Builder:
    def __init__(self) -> None:
        self._types: list[bytes] = []
        self._strings = b"\0"

    def _name(self, name: str) -> int:
        offset = len(self._strings)
        self._strings += name.encode() + b"\0"
        return offset

    def _add(self, blob: bytes) -> int:
        self._types.append(blob)
        return len(self._types)

    def integer(self, name: str, size: int) -> int:
        return self._add(struct.pack("<IIII", self._name(name), _KIND_INT << 24, size, size * 8))

    def array(self, element: int, index: int, count: int) -> int:
        return self._add(struct.pack("<IIIIII", 0, _KIND_ARRAY << 24, 0, element, index, count))

    def structure(self, name: str, size: int, members: list[tuple[str, int, int]]) -> int:
        """`members` are (name, type id, offset in bytes)."""
        head = struct.pack("<III", self._name(name), (_KIND_STRUCT << 24) | len(members), size)
        body = b"".join(struct.pack("<III", self._name(m), kind, at * 8) for m, kind, at in members)
        return self._add(head + body)

    def blob(self) -> bytes:
        types = b"".join(self._types)
        size = len(types)
        header = struct.pack("<HBBIIIII", _MAGIC, 1, 0, 24, 0, size, size, len(self._strings))
        return header + types + self._strings


def describe(record: type[ctypes.Structure]) -> tuple[bytes, int, int]:
    """(BTF, type id of a 32-bit key, type id of the record) for structs of u32, u64 and arrays of them."""
    builder = _Builder()
    word = {4: builder.integer("u32", 4), 8: builder.integer("u64", 8)}
    members = []
    kinds = {field[0]: field[1] for field in record._fields_}
    for name, offset, size in records.layout(record):
        kind = kinds[name]
        if issubclass(kind, ctypes.Array):
            element = ctypes.sizeof(kind._type_)  # type: ignore[arg-type]
            type_id = builder.array(word[element], word[4], size // element)
        else:
            type_id = word[size]
        members.append((name, type_id, offset))
    value = builder.structure(records.c_name(record), ctypes.sizeof(record), members)
    return builder.blob(), word[4], value
