"""The caller's iterable as a stream of chunks: read in order, a little ahead, once."""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Final, Generic, TypeVar

from run_once.clock import Clock
from run_once.errors import KeyTypeError
from run_once.keys import stored_key, stored_keys

ItemT = TypeVar("ItemT")

SLOW_READ_NS: Final = 50_000_000
"""Beyond what is needed at once, the caller's iterable is read ahead for so long only."""

BLOCK_KEYS: Final = 5_000
"""Chunks end where the place in the iterable is a multiple of this: a later run reads the same."""

DIGEST_BYTES: Final = 16

_QUICK_TYPES: Final = (list, tuple, range, dict, set, frozenset)
"""Iterables that are never slow: the clock need not be asked for each item."""


class Chunk(Generic[ItemT]):
    """Some items that follow each other, with their stored keys.

    Attributes:
        keys: Stored keys, each once.
        items: The caller's objects, in the same order.
        is_block: All of a block: from one multiple of `BLOCK_KEYS` to the next.
    """

    __slots__ = ("_at", "is_block", "items", "keys")

    def __init__(self, keys: list[bytes], items: list[ItemT], *, is_block: bool = False) -> None:
        self.keys = keys
        self.items = items
        self.is_block = is_block
        self._at = 0

    def __len__(self) -> int:
        return len(self.keys) - self._at

    @property
    def digest(self) -> bytes:
        """The digest of its keys, by which the server knows the block (see the wire's contract)."""
        return hashlib.blake2b(b"\xff".join(self.keys), digest_size=DIGEST_BYTES).digest()

    def take(self, size: int) -> tuple[list[bytes], list[ItemT]]:
        """Take from the front."""
        begin, self._at = self._at, min(self._at + size, len(self.keys))
        if begin == 0 and not self:
            return self.keys, self.items
        self.is_block = False
        return self.keys[begin : self._at], self.items[begin : self._at]


class Todo(Generic[ItemT]):
    """The chunks that were read and not asked for yet, in order."""

    def __init__(self) -> None:
        self._chunks: deque[Chunk[ItemT]] = deque()
        self._n_keys = 0

    def __len__(self) -> int:
        return self._n_keys

    def append(self, chunk: Chunk[ItemT]) -> None:
        """Put a chunk to the end."""
        if chunk:
            self._chunks.append(chunk)
            self._n_keys += len(chunk)

    def put_back(self, keys: list[bytes], items: list[ItemT]) -> None:
        """Put keys to the front."""
        if keys:
            self._chunks.appendleft(Chunk(keys, items))
            self._n_keys += len(keys)

    def blocks(self, limit: int) -> list[Chunk[ItemT]]:
        """Give the whole blocks at the front."""
        found: list[Chunk[ItemT]] = []
        for chunk in self._chunks:
            if not chunk.is_block or len(found) == limit:
                break
            found.append(chunk)
        return found

    def drop(self, chunk: Chunk[ItemT]) -> None:
        """Take a chunk out."""
        self._chunks.remove(chunk)
        self._n_keys -= len(chunk)

    def take(self, size: int) -> tuple[list[bytes], list[ItemT]]:
        """Take so many keys from the front, each once; a repetition is left out."""
        keys: list[bytes] = []
        items: list[ItemT] = []
        n_parts = 0
        while self._chunks and len(keys) < size:
            chunk = self._chunks[0]
            more_keys, more_items = chunk.take(size - len(keys))
            if not chunk:
                self._chunks.popleft()
            self._n_keys -= len(more_keys)
            keys, items = (
                (keys + more_keys, items + more_items) if keys else (more_keys, more_items)
            )
            n_parts += 1
        return without_repeated(keys, items) if n_parts > 1 else (keys, items)


class KeySource(Generic[ItemT]):
    """Reads items and gives them their stored keys.

    Attributes:
        total: Number of items, where the iterable knows it; else None.
        is_exhausted: The iterable has ended, or raised, or gave an item without a usable key.
        is_quick: It never blocks: a list or the like.
        is_slow: The last read was cut short, as the iterable took its time.
        error: What was raised, for when what came before is handed out; None: nothing.
    """

    def __init__(
        self,
        items: Iterable[ItemT],
        make_keys: Callable[[Sequence[Any]], list[bytes]],
        *,
        clock: Clock,
        shuffle: random.Random | None = None,
    ) -> None:
        """Begin to read.

        Args:
            items: The caller's iterable, endless ones included.
            make_keys: Gives items' stored keys.
            clock: Tells when reading is slow.
            shuffle: Puts the items, all read into memory, in random order; None: as they come.
        """
        if shuffle is not None:
            items = list(items)
            shuffle.shuffle(items)
        self.total = _length(items)
        self.is_exhausted = False
        self.is_slow = False
        self.error: Exception | None = None
        self.is_quick = type(items) in _QUICK_TYPES
        self._items: Iterator[ItemT] = iter(items)
        self._n_read = 0
        self._make_keys = make_keys
        self._clock = clock

    def read(self, size: int, prompt_size: int) -> Chunk[ItemT]:
        """Read on, up to the end of the block at most.

        Args:
            size: Wanted number of items.
            prompt_size: So many are waited for, however slow the iterable is.

        Returns:
            What was read; a key that comes twice is in it once.
        """
        begin = self._n_read
        size = min(size, BLOCK_KEYS - begin % BLOCK_KEYS)
        items = self._read_items(size, prompt_size)
        self._n_read += len(items)
        is_block = len(items) == BLOCK_KEYS
        try:
            keys = self._make_keys(items)
        except Exception as error:  # noqa: BLE001 (kept: it must not cost what came before)
            keys, self.error, self.is_exhausted = self._good_keys(items), error, True
            items, is_block = items[: len(keys)], False
        keys, items = without_repeated(keys, items)
        return Chunk(keys, items, is_block=is_block)

    def _read_items(self, size: int, prompt_size: int) -> list[ItemT]:
        self.is_slow = False
        items: list[ItemT] = []
        try:
            if self.is_quick:
                items += islice(self._items, size)
            else:
                self._read_timed(items, size, prompt_size)
        except Exception as error:  # noqa: BLE001 (kept: it must not cost what came before)
            self.error = error
            self.is_exhausted = True
        self.is_exhausted = self.is_exhausted or (len(items) < size and not self.is_slow)
        return items

    def _read_timed(self, items: list[ItemT], size: int, prompt_size: int) -> None:
        """Read one by one, and look at the clock."""
        now_ns = self._clock.now_ns
        late_ns = now_ns() + SLOW_READ_NS
        for item in self._items:
            items.append(item)
            is_late = now_ns() > late_ns
            if len(items) >= size or (is_late and len(items) >= prompt_size):
                self.is_slow = is_late
                return

    def _good_keys(self, items: list[ItemT]) -> list[bytes]:
        """Give the keys up to the first item that has none."""
        keys: list[bytes] = []
        for item in items:
            try:
                keys += self._make_keys([item])
            except Exception:  # noqa: BLE001 (it was kept before)
                break
        return keys


def key_maker(
    key: Callable[[Any], str | int] | None, version: int, namespace: str
) -> Callable[[Sequence[Any]], list[bytes]]:
    """Make the function that gives items' stored keys.

    Args:
        key: The user's function from an item to its key; None: the item is its key.
        version: Version of the work.
        namespace: The namespace.
    """
    if key is None:
        return lambda items: stored_keys(items, version, namespace)
    function = key

    def make(item: Any) -> bytes:
        made = function(item)
        if isinstance(made, bytes):
            raise KeyTypeError(f"key= gave bytes for {item!r:.100}: decode them to a string")
        return stored_key(made, version, namespace)

    return lambda items: [make(item) for item in items]


def without_repeated(keys: list[bytes], items: list[ItemT]) -> tuple[list[bytes], list[ItemT]]:
    """Leave out the second and later ones of each key."""
    if len(set(keys)) == len(keys):
        return keys, items
    first: dict[bytes, ItemT] = {}
    for key, item in zip(keys, items, strict=True):
        first.setdefault(key, item)
    return list(first), list(first.values())


def _length(items: Iterable[Any]) -> int | None:
    """Count the items if that needs no reading."""
    try:
        return len(items)  # type: ignore[arg-type]  # most have a length, generators have none
    except TypeError:
        return None
