"""The caller's iterable as a stream of (stored key, item): read in order, a little ahead, once."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Generic, TypeVar

from run_once.clock import Clock
from run_once.errors import KeyTypeError
from run_once.keys import stored_key

ItemT = TypeVar("ItemT")

SLOW_READ_NS: Final = 50_000_000
"""Beyond the chunk size, the caller's iterable is read ahead for so long only."""


class KeySource(Generic[ItemT]):
    """Reads items and gives them their stored keys.

    Attributes:
        total: Number of items, where the iterable knows it; else None.
        is_exhausted: The iterable has ended, or raised.
        error: What it raised, for when what it gave before is handed out; None: nothing.
    """

    def __init__(
        self,
        items: Iterable[ItemT],
        make_key: Callable[[ItemT], bytes],
        *,
        clock: Clock,
        shuffle: random.Random | None = None,
    ) -> None:
        """Begin to read.

        Args:
            items: The caller's iterable, endless ones included.
            make_key: Gives an item's stored key.
            clock: Tells when reading is slow.
            shuffle: Puts the items, all read into memory, in random order; None: as they come.
        """
        if shuffle is not None:
            items = list(items)
            shuffle.shuffle(items)
        self.total = _length(items)
        self.is_exhausted = False
        self.error: Exception | None = None
        self._items: Iterator[ItemT] = iter(items)
        self._make_key = make_key
        self._clock = clock

    def read(self, window: dict[bytes, ItemT], size: int, prompt_size: int) -> None:
        """Read until the window holds `size` keys, or the iterable ends, or it is slow.

        A key that is in the window already is read over.

        Args:
            window: Stored key -> item, added to in order.
            size: Wanted number of keys in the window.
            prompt_size: So many are waited for, however slow the iterable is.
        """
        if self.is_exhausted or len(window) >= size:
            return
        started_ns = self._clock.now_ns()
        for item in self._read_on():
            window.setdefault(self._make_key(item), item)
            if len(window) >= size:
                return
            is_slow = self._clock.now_ns() - started_ns > SLOW_READ_NS
            if is_slow and len(window) >= prompt_size:
                return
        self.is_exhausted = True

    def _read_on(self) -> Iterator[ItemT]:
        """Go on with the caller's iterable, up to its end or its error."""
        while True:
            try:
                item = next(self._items)
            except StopIteration:
                return
            except Exception as error:  # noqa: BLE001 (kept: it must not cost what came before)
                self.error = error
                return
            yield item


def key_maker(
    key: Callable[[Any], str | int] | None, version: int, namespace: str
) -> Callable[[Any], bytes]:
    """Make the function that gives an item's stored key.

    Args:
        key: The user's function from an item to its key; None: the item is its key.
        version: Version of the work.
        namespace: The namespace.
    """
    if key is None:
        return lambda item: stored_key(item, version, namespace)
    function = key

    def make(item: Any) -> bytes:
        made = function(item)
        if isinstance(made, bytes):
            raise KeyTypeError(f"key= gave bytes for {item!r:.100}: decode them to a string")
        return stored_key(made, version, namespace)

    return make


def _length(items: Iterable[Any]) -> int | None:
    """Count the items if that needs no reading."""
    try:
        return len(items)  # type: ignore[arg-type]  # most have a length, generators have none
    except TypeError:
        return None
