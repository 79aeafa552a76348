"""Parked waits: woken when a key settles or a lease runs out, bounded in number."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from typing import Final

from distlock_server.limits import MAX_WAITED_KEYS, MAX_WAITS, OverloadError
from distlock_server.pending import Watch
from distlock_server.table import Table

LOOK_PAUSE_PER_KEY_S: Final = 20e-6
"""A wait looks at its keys again no sooner than this long per key: many changes cost one look."""

SHARED_LOOK_S: Final = 1.0
"""How often a wait looks by itself where other servers may change its keys."""


class Parked:
    """One wait between two looks at its keys."""

    def __init__(self, loop: asyncio.AbstractEventLoop, n_keys: int) -> None:
        """Start with nothing to look at."""
        self._loop = loop
        self._pause_s = n_keys * LOOK_PAUSE_PER_KEY_S
        self._woken: asyncio.Future[None] | None = None
        self._changed = False

    def wake(self, _watch: Watch | None = None) -> None:
        """Have the keys looked at again."""
        self._changed = True
        self._resolve()

    async def sleep(self, timeout_s: float) -> None:
        """Return after the timeout, or soon after a wake since the last sleep."""
        if not self._changed:
            self._woken = self._loop.create_future()
            timer = self._loop.call_later(max(timeout_s, 0.001), self._resolve)
            try:
                await self._woken
            finally:
                timer.cancel()
                self._woken = None
        if self._changed:
            await asyncio.sleep(min(self._pause_s, max(timeout_s, 0)))
        self._changed = False

    def _resolve(self) -> None:
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)


class Waits:
    """All parked waits of a server."""

    def __init__(
        self, table: Table, *, max_waits: int = MAX_WAITS, max_keys: int = MAX_WAITED_KEYS
    ) -> None:
        """Park waits on a table whose `Notify` is a `LoopNotify`.

        Args:
            table: The table.
            max_waits: Waits parked at once.
            max_keys: Keys of those, taken together.
        """
        self._table = table
        self._max_waits = max_waits
        self._max_keys = max_keys
        self._n_keys = 0
        self._parked: set[Parked] = set()
        self.is_closing = False

    @contextlib.contextmanager
    def park(self, keys: Sequence[bytes]) -> Iterator[Parked]:
        """Watch keys for as long as the context lasts.

        Raises:
            OverloadError: Too many waits are parked.
        """
        if len(self._parked) >= self._max_waits or self._n_keys + len(keys) > self._max_keys:
            raise OverloadError(
                f"the server is overloaded: {len(self._parked)} waits for {self._n_keys} keys are "
                "parked; look the keys up now and then instead"
            )
        parked = Parked(asyncio.get_running_loop(), len(keys))
        watch = self._table.watch(keys, parked.wake)
        self._parked.add(parked)
        self._n_keys += len(keys)
        try:
            yield parked
        finally:
            self._n_keys -= len(keys)
            self._parked.discard(parked)
            self._table.unwatch(watch)

    def wake_all(self) -> None:
        """Have every wait look at its keys now."""
        for parked in list(self._parked):
            parked.wake()

    def close(self) -> None:
        """Have every wait, present or coming, answer at once with what it finds."""
        self.is_closing = True
        self.wake_all()
