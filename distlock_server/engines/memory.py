"""An engine in memory, for tests and simulation; it also stands in for shared engines there."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Sequence
from typing import ClassVar

from distlock_server.clock import Clock
from distlock_server.engines.keyvalue import Batch, KeyValueEngine


class MemoryStore:
    """The map itself. It outlives the engines over it, as a disk outlives processes."""

    def __init__(self) -> None:
        """Start empty."""
        self.commit_lock = threading.Lock()
        self._mutex = threading.Lock()
        self._entries: dict[bytes, bytes] = {}
        self._keys: list[bytes] = []

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Read entries, all at one moment."""
        with self._mutex:
            return [self._entries.get(key) for key in keys]

    def write(self, batch: Batch) -> None:
        """Write entries, all at one moment."""
        with self._mutex:
            for key, value in batch.items():
                if value is None:
                    if self._entries.pop(key, None) is not None:
                        del self._keys[bisect.bisect_left(self._keys, key)]
                else:
                    if key not in self._entries:
                        bisect.insort(self._keys, key)
                    self._entries[key] = value

    def range(self, start: bytes, end: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        """List entries with start <= key < end, at most `limit`."""
        with self._mutex:
            first = bisect.bisect_left(self._keys, start)
            last = min(bisect.bisect_left(self._keys, end), first + limit)
            return [(key, self._entries[key]) for key in self._keys[first:last]]


class MemoryEngine(KeyValueEngine):
    """An engine over a `MemoryStore`."""

    kind: str = "memory"
    _errors: ClassVar[tuple[type[Exception], ...]] = ()

    def __init__(
        self,
        store: MemoryStore | None = None,
        *,
        shared: bool = False,
        clock: Clock | None = None,
    ) -> None:
        """Open a store.

        Args:
            store: Where entries are; several engines may be over one. None: a new one.
            shared: Behave like an engine that several servers use at once.
            clock: The engine's own time, read with every read; required if `shared`.
        """
        assert shared == (clock is not None), "a shared engine has its own clock, others have none"
        self._store = store or MemoryStore()
        super().__init__("memory", self._store.commit_lock)
        self.shared = shared
        self._clock = clock

    def _now_ns(self) -> int:
        return 0 if self._clock is None else self._clock.now_ns()

    def _get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return self._store.get(keys)

    def _write(self, batch: Batch) -> None:
        self._store.write(batch)

    def _range(self, start: bytes, end: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        return self._store.range(start, end, limit)

    def _close(self) -> None:
        """Keep the store: another engine may be opened over it."""
