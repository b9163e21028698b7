"""Counters in shared memory: one memfd, rows of 64-bit words, a directory that says which row is whose.

The supervisor creates the segment before it forks and allocates every row; workers inherit the mapping and
write their rows by plain stores of aligned words: no lock, no syscall, nothing lost when one is killed.
*Each word has exactly one writer.* A row belongs to one worker (or to the supervisor, worker -1); two
processes that run as the same worker at once, as around an upgrade, need a segment each.

Layout, in words: a head, a directory of fixed-size entries, the rows, each on its own cache lines:

    head   magic, version, fingerprint of the metric list, words in all, entries in all, entries in use,
           first free word, retirements so far
    entry  sequence << 8 | state, offset and words of the row, when retired, bytes of the key, key (JSON)

When a listener, backend or worker goes, its rows are *retired*: gauges are cleared, counters stay and count
again when the same key comes back. A retired row is handed to another key only when no room is left, and
only once all rows with its labels are retired: a sum over the workers of a living listener never drops.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Self

from tidegate.errors import OperatorError
from tidegate.metrics.histogram import observe as observe
from tidegate.metrics.names import Kind, Scope, fingerprint, layout

SUPERVISOR: Final = -1  # RowKey.worker of rows that the supervisor writes

WORD: Final = 8  # bytes
_LINE: Final = 8  # words of a cache line: rows of two workers share none
_MAGIC: Final = int.from_bytes(b"tidegate", "little")
_VERSION: Final = 1

_HEAD_WORDS: Final = 8
_H_MAGIC, _H_VERSION, _H_FINGERPRINT, _H_WORDS, _H_ENTRIES, _H_USED, _H_FREE, _H_CLOCK = range(8)

_ENTRY_WORDS: Final = 64
_E_STATE, _E_OFFSET, _E_WORDS, _E_RETIRED, _E_KEY_BYTES, _E_KEY = range(6)
KEY_LIMIT: Final = (_ENTRY_WORDS - _E_KEY) * WORD

_WRITING, _LIVE, _RETIRED = range(3)
_WORDS_PER_ENTRY: Final = 256  # one directory entry for this many words, when only a size is given


class SegmentMismatch(OperatorError):
    """The memory is not a segment, or one of a version with other metrics."""


class SegmentFull(OperatorError):
    """No room for another row."""


@dataclass(frozen=True, slots=True)
class RowKey:
    """Whose counters: `labels` are the values of `scope.label_names`."""

    scope: Scope
    worker: int
    labels: tuple[str, ...] = ()

    def encode(self) -> bytes:
        return json.dumps([self.scope.value, self.worker, *self.labels], ensure_ascii=False).encode(
            "utf-8", "surrogateescape"
        )

    @classmethod
    def decode(cls, data: bytes) -> RowKey:
        scope, worker, *labels = json.loads(data.decode("utf-8", "surrogateescape"))
        return cls(Scope(scope), int(worker), tuple(str(label) for label in labels))


@dataclass(frozen=True, slots=True)
class RowSnapshot:
    """A row's words at one moment: each is exact, though a writer may have been between two of them."""

    key: RowKey
    retired: bool
    words: tuple[int, ...]


class Row:
    """One row in shared memory. Indexes come from the scope's layout."""

    __slots__ = ("_entry", "key", "offset", "retired", "words")

    def __init__(self, key: RowKey, words: memoryview, offset: int, entry: int, retired: bool) -> None:
        self.key = key
        self.words = words  # of "Q": words[i] += 1 is the hot path
        self.offset = offset  # in the segment, in words: what a worker attaches by
        self.retired = retired
        self._entry = entry

    def observe(self, index: int, value_ns: int) -> None:
        """Add one value to the histogram at `index`."""
        observe(self.words, index, value_ns)

    def reset_gauges(self) -> None:
        """Nothing is under way in this row any more: its writer is gone. Counters stay."""
        at = layout(self.key.scope)
        for metric in at.metrics:
            if metric.kind is Kind.GAUGE:
                for value in metric.values or ("",):
                    self.words[at.index(metric.name, value)] = 0


def row_words(scope: Scope) -> int:
    """Words a row takes in the segment, up to whole cache lines."""
    return -(-layout(scope).words // _LINE) * _LINE


class Segment:
    """The mapping. Only one process at a time, the supervisor, may call `row` and `retire`."""

    def __init__(self, fd: int, memory: mmap.mmap) -> None:
        self.fd = fd  # owned: closed by close()
        self._memory = memory
        self._bytes = memoryview(memory)
        self._words = self._bytes.cast("Q")
        self._rows: dict[RowKey, Row] = {}
        self._seen = (-1, -1)  # the version of the directory that `_rows` was read from
        self._orphans: list[Row] = []  # their memory went to other keys

    @classmethod
    def sized_for(cls, rows: Mapping[Scope, int]) -> Self:
        """A new segment with room for that many rows of each scope. Raises OSError.

        Memory that no row uses yet costs nothing, so leave room for what reloads will bring: it cannot grow.
        """
        entries = sum(rows.values())
        words = _HEAD_WORDS + entries * _ENTRY_WORDS
        return cls.create(words + sum(row_words(scope) * count for scope, count in rows.items()), entries)

    @classmethod
    def create(cls, words: int, entries: int = 0, name: str = "tidegate-metrics") -> Self:
        """A new segment of `words` words in all, for at most `entries` rows (0: by size). Raises OSError."""
        entries = entries or max(1, words // _WORDS_PER_ENTRY)
        first = _HEAD_WORDS + entries * _ENTRY_WORDS
        words = max(words, first + _LINE)
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, words * WORD)
            # an attacher's mapping can then never fault on memory that was cut off
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            memory = mmap.mmap(fd, words * WORD, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError:
            os.close(fd)
            raise
        segment = cls(fd, memory)
        head = (_MAGIC, _VERSION, fingerprint(), words, entries, 0, first, 0)
        for index, word in enumerate(head):
            segment._words[index] = word
        return segment

    @classmethod
    def attach(cls, fd: int, *, read_only: bool = False) -> Self:
        """Map a segment that another process created; a duplicate of `fd` is kept.

        Raises SegmentMismatch when it is none, or one whose metrics are not ours, and OSError.
        """
        size = os.fstat(fd).st_size
        if size < _HEAD_WORDS * WORD:
            raise _mismatch("it is too small")
        protection = mmap.PROT_READ if read_only else mmap.PROT_READ | mmap.PROT_WRITE
        own = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        try:
            segment = cls(own, mmap.mmap(own, size, mmap.MAP_SHARED, protection))
        except OSError:
            os.close(own)
            raise
        try:
            segment._check(size)
            segment._refresh()
        except Exception:
            segment.close()
            raise
        return segment

    def close(self) -> None:
        """Unmap; rows of this object must not be used afterwards."""
        for row in (*self._rows.values(), *self._orphans):
            row.words.release()
        self._rows.clear()
        self._orphans.clear()
        self._words.release()
        self._bytes.release()
        self._memory.close()
        os.close(self.fd)

    def row(self, key: RowKey) -> Row:
        """The row of that key: as it stands, revived, or new and zero. Raises SegmentFull, ValueError."""
        row = self._rows.get(key)
        if row is not None:
            if row.retired:
                self._set_state(row, _LIVE, retired_at=0)
            return row
        if len(key.labels) != len(key.scope.label_names):
            raise ValueError(f"{key.scope} rows are named by {key.scope.label_names}, not by {key.labels}")
        encoded = key.encode()
        if len(encoded) > KEY_LIMIT:
            raise SegmentFull(
                f"the names {', '.join(key.labels)} are too long for the metrics directory",
                f"keep the names of one {key.scope} below {KEY_LIMIT - 32} bytes",
            )
        words, head = row_words(key.scope), self._words
        offset, entry = head[_H_FREE], head[_H_USED]
        if entry < head[_H_ENTRIES] and offset + words <= head[_H_WORDS]:
            head[_H_FREE] = offset + words
            self._write_entry(entry, key, encoded, offset, words)
            head[_H_USED] = entry + 1
        else:
            old = self._reusable(key)
            offset, entry = old.offset, old._entry
            self._orphans.append(self._rows.pop(old.key))
            self._write_entry(entry, key, encoded, offset, words, clear=old)
        row = self._rows[key] = Row(key, self._words[offset : offset + words], offset, entry, retired=False)
        self._seen = self._version()  # our own change: nothing to read again
        return row

    def retire(self, key: RowKey) -> None:
        """Its listener, backend or worker is gone. Only once nobody writes the row any more."""
        row = self._rows[key]
        if row.retired:
            return
        row.reset_gauges()
        self._words[_H_CLOCK] += 1
        self._set_state(row, _RETIRED, retired_at=self._words[_H_CLOCK])

    def find(self, key: RowKey) -> Row | None:
        """The row of that key, live or retired, if it was ever allocated."""
        if self._version() != self._seen:
            self._refresh()
        return self._rows.get(key)

    def _version(self) -> tuple[int, int]:
        """Changes whenever the directory does."""
        return self._words[_H_USED], self._words[_H_CLOCK]

    def row_at(self, offset: int) -> Row:
        """The row at that offset, told by the supervisor. Raises KeyError when no row begins there."""
        self._refresh()
        for row in self._rows.values():
            if row.offset == offset:
                return row
        raise KeyError(offset)

    def rows(self) -> list[Row]:
        """All rows, in the order of the directory."""
        self._refresh()
        return sorted(self._rows.values(), key=lambda row: row._entry)

    def snapshot(self) -> tuple[RowSnapshot, ...]:
        """A copy of every row, retired ones included."""
        return tuple(
            RowSnapshot(row.key, row.retired, tuple(row.words[: layout(row.key.scope).words]))
            for row in self.rows()
        )

    # the directory

    def _entry_at(self, entry: int) -> int:
        return _HEAD_WORDS + entry * _ENTRY_WORDS

    def _write_entry(
        self, entry: int, key: RowKey, encoded: bytes, offset: int, words: int, clear: Row | None = None
    ) -> None:
        """Fill an entry so that a reader sees the old key, none, or the new one, never a mixture."""
        base, all_words = self._entry_at(entry), self._words
        sequence = (all_words[base + _E_STATE] >> 8) + 1
        all_words[base + _E_STATE] = sequence << 8 | _WRITING
        if clear is not None:
            for index in range(len(clear.words)):
                clear.words[index] = 0
        all_words[base + _E_OFFSET] = offset
        all_words[base + _E_WORDS] = words
        all_words[base + _E_RETIRED] = 0
        all_words[base + _E_KEY_BYTES] = len(encoded)
        start = (base + _E_KEY) * WORD
        self._bytes[start : start + len(encoded)] = encoded
        all_words[base + _E_STATE] = (sequence + 1) << 8 | _LIVE
        all_words[_H_CLOCK] += 1

    def _set_state(self, row: Row, state: int, retired_at: int) -> None:
        base = self._entry_at(row._entry)
        self._words[base + _E_RETIRED] = retired_at
        self._words[base + _E_STATE] = (self._words[base + _E_STATE] >> 8) + 1 << 8 | state
        self._words[_H_CLOCK] += 1
        row.retired = state == _RETIRED
        self._seen = self._version()

    def _reusable(self, key: RowKey) -> Row:
        """The row of this scope retired longest ago whose labels no live row bears. Raises SegmentFull."""
        rows = [row for row in self._rows.values() if row.key.scope is key.scope]
        living = {row.key.labels for row in rows if not row.retired}
        candidates = [row for row in rows if row.key.labels not in living]
        if not candidates:
            raise SegmentFull(
                f"no room for the counters of another {key.scope}",
                "restart tidegate: the room is measured at start by the configuration it starts with",
            )
        return min(candidates, key=lambda row: self._words[self._entry_at(row._entry) + _E_RETIRED])

    def _read_entries(self) -> Iterator[tuple[int, RowKey, int, int, bool]]:
        all_words = self._words
        for entry in range(all_words[_H_USED]):
            base = self._entry_at(entry)
            for _attempt in range(3):
                before = all_words[base + _E_STATE]
                offset, words, length = (
                    all_words[base + field] for field in (_E_OFFSET, _E_WORDS, _E_KEY_BYTES)
                )
                start = (base + _E_KEY) * WORD
                encoded = bytes(self._bytes[start : start + min(length, KEY_LIMIT)])
                if before & 0xFF != _WRITING and all_words[base + _E_STATE] == before:
                    yield entry, RowKey.decode(encoded), offset, words, before & 0xFF == _RETIRED
                    break

    def _refresh(self) -> None:
        """Take over what the supervisor changed since."""
        # before reading: what changes meanwhile is found by the next look
        self._seen = self._version()
        rows: dict[RowKey, Row] = {}
        for entry, key, offset, words, retired in self._read_entries():
            known = self._rows.get(key)
            if known is not None and known.offset == offset:
                known.retired = retired
                rows[key] = known
            elif offset + words <= len(self._words):
                rows[key] = Row(key, self._words[offset : offset + words], offset, entry, retired)
        self._orphans += [row for row in self._rows.values() if rows.get(row.key) is not row]
        self._rows = rows

    def _check(self, size: int) -> None:
        head = self._words
        if head[_H_MAGIC] != _MAGIC:
            raise _mismatch("it is not a tidegate segment")
        if head[_H_VERSION] != _VERSION or head[_H_FINGERPRINT] != fingerprint():
            raise _mismatch("it was made by a version that counts other things")
        if head[_H_WORDS] * WORD != size or self._entry_at(head[_H_ENTRIES]) > head[_H_WORDS]:
            raise _mismatch("its head is damaged")
        if head[_H_USED] > head[_H_ENTRIES]:
            raise _mismatch("its head is damaged")


def _mismatch(why: str) -> SegmentMismatch:
    return SegmentMismatch(f"the metrics segment cannot be used: {why}", "use the tidegate that created it")
