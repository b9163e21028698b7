"""A slab: objects in numbered places, reached by tokens that die with them.

A token is `generation << 32 | index`. What outlives an object (a timer, a control request, a log line) keeps
its token and asks `get()`: when the object is gone, or its place belongs to another one by now, the answer
is None, never a stranger.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

INDEX_BITS = 32
INDEX_MASK = (1 << INDEX_BITS) - 1
GENERATION_STEP = 1 << INDEX_BITS
TOKEN_LIMIT = 1 << 64  # tokens fit a __u64, so that they can stand in records shared with the kernel side


class SlabFull(Exception):
    """Every place is taken; nothing was inserted."""


class Slab(Generic[T]):
    """At most `capacity` objects, none of them None.

    insert, get and remove are O(1). The place freed last is filled first, so that the memory in use stays
    small and warm. Generations start at 1 (no token is 0) and wrap after 2^32 - 1 uses of one place: a token
    would have to be kept across all of them to be mistaken for a live one.
    """

    __slots__ = ("_free", "_objects", "_tokens", "capacity")

    def __init__(self, capacity: int) -> None:
        if not 0 < capacity <= INDEX_MASK:
            raise ValueError(f"slab capacity must be 1..{INDEX_MASK}, not {capacity}")
        self.capacity = capacity
        self._objects: list[T | None] = []
        self._tokens: list[int] = []  # of the object in place i; of the next one where the place is free
        self._free: list[int] = []

    def insert(self, obj: T) -> int:
        """Place `obj` and return its token. Raises SlabFull."""
        if self._free:
            index = self._free.pop()
            self._objects[index] = obj
        else:
            index = len(self._objects)
            if index >= self.capacity:
                raise SlabFull(f"all {self.capacity} places are taken")
            self._objects.append(obj)
            self._tokens.append(GENERATION_STEP | index)
        return self._tokens[index]

    def get(self, token: int) -> T | None:
        """The object this token was given for, or None when it was removed (or never existed)."""
        index = token & INDEX_MASK
        if index < len(self._tokens) and self._tokens[index] == token:
            return self._objects[index]
        return None

    def remove(self, token: int) -> T | None:
        """Take the object out and return it; None when this token leads nowhere any more."""
        index = token & INDEX_MASK
        tokens, objects = self._tokens, self._objects
        if index >= len(tokens) or tokens[index] != token:
            return None
        obj = objects[index]
        if obj is None:
            return None
        objects[index] = None
        token += GENERATION_STEP
        tokens[index] = token if token < TOKEN_LIMIT else GENERATION_STEP | index
        self._free.append(index)
        return obj

    @property
    def full(self) -> bool:
        return not self._free and len(self._objects) >= self.capacity

    def __len__(self) -> int:
        return len(self._objects) - len(self._free)

    def __bool__(self) -> bool:
        """True even when empty: a slab is not a value."""
        return True

    def __iter__(self) -> Iterator[tuple[int, T]]:
        """(token, object) of everything alive, by place.

        Inserting and removing while iterating is allowed: what is removed before its turn is not seen,
        what is inserted may or may not be, and nothing is seen twice.
        """
        for index, obj in enumerate(self._objects):
            if obj is not None:
                yield self._tokens[index], obj
