"""A ring buffer in which BPF programs leave 32-bit numbers for userspace (Documentation/bpf/ringbuf.rst)."""

from __future__ import annotations

import mmap
import os
import struct

from tidegate.kernel.slots import map_words

_BUSY, _DISCARDED = 1 << 31, 1 << 30
_HEADER = struct.Struct("=III")  # length and flags, page offset; then the number


class Bell:
    """The reader of such a buffer; `fileno()` is readable while something is in it. Owns the fd."""

    def __init__(self, fd: int, size: int) -> None:
        """`size` of the map, bytes. OSError when it cannot be mapped."""
        self._fd = fd
        self._mask = size - 1
        self._consumer = map_words(fd, 8)
        # data is mapped twice in a row: no record ever wraps. Read-only, as the kernel demands
        pages = mmap.mmap(fd, mmap.PAGESIZE + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=mmap.PAGESIZE)
        self._producer = memoryview(pages)[:8].cast("Q")
        self._data = memoryview(pages)[mmap.PAGESIZE :]

    def fileno(self) -> int:
        return self._fd

    def take(self) -> list[int]:
        """What has been left since the last call, oldest first."""
        found = []
        at = self._consumer[0]
        while at < self._producer[0]:
            header, _page, number = _HEADER.unpack_from(self._data, at & self._mask)
            if header & _BUSY:
                break  # it is being written: its end makes the fd readable again
            if not header & _DISCARDED:
                found.append(number)
            at += 8 + (((header & ~_DISCARDED) + 7) & ~7)
            self._consumer[0] = at
        return found

    def close(self) -> None:
        os.close(self._fd)
