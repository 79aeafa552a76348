"""The server's disk, and an engine whose commit is durable only once it has returned."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from distlock_server import codec
from distlock_server.engines.base import decode_counter
from distlock_server.engines.keyvalue import Batch
from distlock_server.engines.memory import MemoryEngine, MemoryStore
from tests.simulation.schedule import MS, Schedule

FAST_MS: Final = (0, 0, 0, 1, 2, 2, 3, 5, 8, 200)
SLOW_MS: Final = (5, 20, 50, 120, 250)
"""How long a sync takes."""


class CrashError(Exception):
    """The server's process ended in the midst of what it did."""


class Disk:
    """What outlives the server's process.

    Attributes:
        sync_ms: How long a sync may take.
        synced: What a power cut leaves.
        writing: The batch that is on its way; a power cut leaves it wholly or not at all, since a
            torn tail is no batch.
    """

    def __init__(self, rng: random.Random) -> None:
        self.sync_ms = rng.choice((FAST_MS, FAST_MS, SLOW_MS))
        self.synced = MemoryStore()
        self.writing: Batch | None = None

    def revision(self) -> int:
        """Give the store revision that a power cut would leave."""
        return decode_counter(self.synced.get([codec.REVISION_KEY])[0])

    def cut_power(self, rng: random.Random) -> None:
        """Decide what becomes of the batch that is being written."""
        if self.writing is not None and rng.random() < 0.5:
            self.synced.write(self.writing)
        self.writing = None


class SimEngine(MemoryEngine):
    """An engine over a disk; others go on while it syncs."""

    def __init__(
        self, disk: Disk, schedule: Schedule, rng: random.Random, is_dead: Callable[[], bool]
    ) -> None:
        super().__init__(disk.synced)
        self._disk = disk
        self._schedule = schedule
        self._rng = rng
        self._is_dead = is_dead
        self.is_open = False

    def _write(self, batch: Batch) -> None:
        """Write; what arrives meanwhile is handled by the server's other threads."""
        if self.is_open:  # else the server starts or ends: nobody else is there
            self._disk.writing = batch
            sync_ns = self._rng.choice(self._disk.sync_ms) * MS
            if sync_ns:
                self._schedule.wait(self._is_dead, sync_ns, events_only=True)
            if self._is_dead():
                raise CrashError
            self._disk.writing = None
        super()._write(batch)
