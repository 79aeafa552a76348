"""A table over memory, stepped by hand under a clock that is moved by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from distlock_server import batch, state
from distlock_server.clock import ManualClock
from distlock_server.engines.base import Meta, Swap
from distlock_server.engines.memory import MemoryEngine, MemoryStore
from distlock_server.pending import Pending, Watch
from distlock_server.state import Answer
from distlock_server.table import Table

SECOND = 10**9
TTL = 10 * SECOND
ID = b"i" * 16
OTHER = b"o" * 16


class Told:
    """Keeps what the table tells, call by call."""

    def __init__(self) -> None:
        self.groups: list[list[Pending[Any]]] = []
        self.changes: list[list[Watch]] = []
        self.deaths: list[BaseException] = []

    def answered(self, answered: Sequence[Pending[Any]]) -> None:
        """Keep the answers of a group."""
        self.groups.append(list(answered))

    def changed(self, watches: Sequence[Watch]) -> None:
        """Keep watches."""
        self.changes.append(list(watches))

    def died(self, error: BaseException) -> None:
        """Keep the error."""
        self.deaths.append(error)


class CountingEngine(MemoryEngine):
    """Counts commits, and does what a test wants before each."""

    def __init__(self, store: MemoryStore | None = None, **more: Any) -> None:
        super().__init__(store, **more)
        self.n_commits = 0
        self.before: Callable[[], None] = lambda: None

    def commit(self, swaps: Sequence[Swap], meta: Meta) -> Any:
        """Count and commit."""
        self.n_commits += 1
        self.before()
        return super().commit(swaps, meta)


class Setup:
    """A table with its parts."""

    def __init__(self, store: MemoryStore | None = None, clock: ManualClock | None = None) -> None:
        self.clock = clock or ManualClock()
        self.store = store or MemoryStore()
        self.told = Told()
        self.engine = CountingEngine(self.store)
        self.table = Table(self.engine, self.clock, self.told)
        self.engine.n_commits = 0

    def claim(
        self, *keys: bytes, claim_id: bytes = ID, ttl: int = TTL, **more: Any
    ) -> Pending[Any]:
        """Queue a claim."""
        command = state.Claim(claim_id, ttl, **more)
        return self.table.submit(
            list(keys), partial(batch.claim, keys=keys, command=command, max_grants=0)
        )

    def apply(self, key: bytes, command: batch.Change) -> Answer:
        """Queue a command, commit, and give its answer."""
        run = partial(batch.apply_each, commands=[(key, command)])
        pending = self.table.submit([key], run)
        self.table.step_once()
        return pending.result().items[0].answer

    def hold(self, key: bytes, **more: Any) -> int:
        """Claim a key, commit, and give the token."""
        pending = self.claim(key, **more)
        self.table.step_once()
        item = pending.result().items[0]
        assert item.answer is Answer.GRANTED
        return int(item.record.token)

    def reopened(self) -> Setup:
        """Give a new table over the same store, as after a crash."""
        return Setup(self.store, self.clock)
