"""A reproducible byte stream in which a lost, doubled or moved block changes the digest."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

CHUNK = 64 * 1024
_BASE = 1024 * 1024
_STRIDE = 7919  # prime, so that blocks do not repeat before all offsets were used


class Pattern:
    """The stream named by `seed`; `chunks(n)` gives its first n bytes."""

    def __init__(self, seed: int) -> None:
        base = random.Random(seed).randbytes(_BASE)
        self._base = memoryview(base + base[:CHUNK])

    def chunks(self, length: int) -> Iterator[memoryview]:
        sent = 0
        block = 0
        while sent < length:
            size = min(CHUNK, length - sent)
            start = (block * _STRIDE) % _BASE
            yield self._base[start : start + size]
            sent += size
            block += 1


def digest(seed: int, length: int) -> str:
    """The digest of the first `length` bytes of the stream named by `seed`."""
    running = new_digest()
    for chunk in Pattern(seed).chunks(length):
        running.update(chunk)
    return running.hexdigest()


def new_digest() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=16)
