"""The caller's iterable as a stream of pieces: read in order, a little ahead, once."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Final, Generic, TypeVar

from run_once.clock import Clock
from run_once.errors import KeyTypeError
from run_once.keys import stored_key, stored_keys
from run_once.todo import Piece, without_repeated

ItemT = TypeVar("ItemT")

SLOW_READ_NS: Final = 50_000_000
"""Beyond what is needed at once, the caller's iterable is read ahead for so long only."""

BLOCK_READ_NS: Final = 4 * SLOW_READ_NS
"""An iterable that gives a whole block within this time is read up to the block's end."""

BLOCK_KEYS: Final = 5_000
"""Blocks end where the place in the iterable is a multiple of this: a later run reads the same."""

MIN_BLOCK_KEYS: Final = 100
"""The last block of a list is one only if it has so many keys."""

_QUICK_TYPES: Final = (list, tuple, range, dict, set, frozenset)
"""Iterables that are never slow: the clock need not be asked for each item."""


class KeySource(Generic[ItemT]):
    """Reads items and gives them their stored keys.

    Attributes:
        total: Number of items, where the iterable knows it; else None.
        is_exhausted: The iterable has ended, or raised, or gave an item without a usable key.
        is_quick: It never blocks: a list or the like.
        block_keys: Length of a block.
        is_slow: The last read was cut short, as the iterable took its time.
        is_cheap: Reading a whole block costs next to nothing: it is quick, and its items are keys.
        error: What was raised, for when what came before is handed out; None: nothing.
    """

    def __init__(
        self,
        items: Iterable[ItemT],
        make_keys: Callable[[Sequence[Any]], list[bytes]],
        *,
        clock: Clock,
        shuffle: random.Random | None = None,
        has_quick_keys: bool = True,
        block_keys: int = BLOCK_KEYS,
        min_block_keys: int = MIN_BLOCK_KEYS,
    ) -> None:
        """Begin to read.

        Args:
            items: The caller's iterable, endless ones included.
            make_keys: Gives items' stored keys.
            clock: Tells when reading is slow.
            shuffle: Puts the items, all read into memory, in random order; None: as they come.
            has_quick_keys: `make_keys` costs next to nothing.
            block_keys: Length of a block.
            min_block_keys: The last block may be so short.
        """
        if shuffle is not None:
            items = list(items)
            shuffle.shuffle(items)
        self.total = _length(items)
        self.is_exhausted = False
        self.is_slow = False
        self.error: Exception | None = None
        self.is_quick = type(items) in _QUICK_TYPES
        self.is_cheap = self.is_quick and has_quick_keys
        self.block_keys = block_keys
        self._min_block_keys = min_block_keys
        self._items: Iterator[ItemT] = iter(items)
        self._n_read = 0  # of this block
        self._known_keys: set[bytes] = set()  # of this block, if it is read in pieces
        self._is_begun = False
        self._item_ns: float = SLOW_READ_NS
        self._block_ns = 0
        self._make_keys = make_keys
        self._clock = clock

    def read(self, size: int, prompt_size: int) -> Piece[ItemT]:
        """Read on, up to the end of the block at most.

        Args:
            size: Wanted number of items.
            prompt_size: So many are waited for, however slow the iterable is.

        Returns:
            What was read; a key that comes twice in it, or in its block, comes once.
        """
        began_ns = self._clock.now_ns()
        is_first = not self._n_read
        size = min(size, self.block_keys - self._n_read)
        items = self._read_items(size, prompt_size)
        n_items = len(items)
        self._n_read += n_items
        try:
            keys = self._make_keys(items)
        except Exception as error:  # noqa: BLE001 (kept: it must not cost what came before)
            keys, self.error, self.is_exhausted = self._good_keys(items), error, True
            items = items[: len(keys)]
        self._note_time(n_items, self._clock.now_ns() - began_ns)
        keys, items = without_repeated(keys, items)
        if not is_first and self._block_ns > BLOCK_READ_NS:
            self._known_keys = set()
            piece = Piece(keys, items, is_first=True, is_block=False)
        else:
            keys, items = self._without_known(keys, items)
            piece = Piece(keys, items, is_first, self._is_block())
        if self._is_end():
            self._n_read = self._block_ns = 0
        return piece

    @property
    def n_quickly(self) -> int:
        """How many items can be read, and given their keys, without anybody noticing."""
        return min(self.block_keys, round(SLOW_READ_NS / max(self._item_ns, 1)))

    @property
    def is_in_block(self) -> bool:
        """Whether a block was begun to be read."""
        return self._n_read > 0

    @property
    def is_block_quick(self) -> bool:
        """Whether the block, or the rest of it, is read soon enough for it to be waited for."""
        left_ns = (self.block_keys - self._n_read) * self._item_ns
        return self._block_ns + left_ns <= BLOCK_READ_NS

    def _is_end(self) -> bool:
        """Tell whether a block ends here."""
        return self._n_read == self.block_keys or self.is_exhausted

    def _is_block(self) -> bool:
        """Tell whether what was read since a block began is all of it."""
        is_whole = self._n_read >= self._min_block_keys and self.error is None
        return is_whole and self._is_end()

    def _note_time(self, n_items: int, took_ns: int) -> None:
        """Take in how long reading took; before the first item the caller may have much to do."""
        if n_items:
            self._item_ns = took_ns / n_items
        if self._is_begun:
            self._block_ns += took_ns
        self._is_begun = True

    def _without_known(
        self, keys: list[bytes], items: list[ItemT]
    ) -> tuple[list[bytes], list[ItemT]]:
        """Leave out what the block has already; remember the rest, unless the block ends."""
        known = self._known_keys
        if known and not known.isdisjoint(keys):
            left = [place for place, key in enumerate(keys) if key not in known]
            keys, items = [keys[place] for place in left], [items[place] for place in left]
        if self._is_end():
            self._known_keys = set()
        else:
            known.update(keys)
        return keys, items

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
        now_ns, append = self._clock.now_ns, items.append
        late_ns = now_ns() + SLOW_READ_NS
        for item in islice(self._items, size):
            append(item)
            if now_ns() > late_ns and len(items) >= prompt_size:
                self.is_slow = True
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


def _length(items: Iterable[Any]) -> int | None:
    """Count the items if that needs no reading."""
    try:
        return len(items)  # type: ignore[arg-type]  # most have a length, generators have none
    except TypeError:
        return None
