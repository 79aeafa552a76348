"""From the event loop to the committer and back.

The table runs requests in the committer's thread; handlers await them on the event loop. Answers
come back with one wake-up of the loop per commit group, however many requests it held.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from distlock_server.failpoints import reach
from distlock_server.group import Group
from distlock_server.limits import MAX_QUEUED_KEYS, MAX_QUEUED_REQUESTS, OverloadError
from distlock_server.pending import Pending, Rank, Watch
from distlock_server.space import Space
from distlock_server.table import Table

T = TypeVar("T")


class LoopNotify:
    """The table's `Notify` for an event loop: runs each context, a callable, on the loop."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, on_death: Callable[[BaseException], None]
    ) -> None:
        """Post to a loop.

        Args:
            loop: The loop; it may be closed before the table is.
            on_death: Called in the committer's thread when the storage failed.
        """
        self._loop = loop
        self._on_death = on_death
        self._posted: deque[Sequence[Pending[Any]] | Sequence[Watch]] = deque()
        self._is_scheduled = False

    def answered(self, answered: Sequence[Pending[Any]]) -> None:
        """Post the answers of one group."""
        self._post(answered)

    def changed(self, watches: Sequence[Watch]) -> None:
        """Post the watches whose keys changed."""
        self._post(watches)

    def died(self, error: BaseException) -> None:
        """Tell the owner that the server must end."""
        self._on_death(error)

    def _post(self, items: Sequence[Pending[Any]] | Sequence[Watch]) -> None:
        self._posted.append(items)
        # Cleared before the drain reads: what is appended later than that schedules another.
        if self._is_scheduled:
            return
        self._is_scheduled = True
        try:
            self._loop.call_soon_threadsafe(self._drain)
        except RuntimeError:
            # The loop is closed: nobody waits any more.
            self._posted.clear()

    def _drain(self) -> None:
        self._is_scheduled = False
        while self._posted:
            for item in self._posted.popleft():
                cast("Callable[[object], None]", item.context)(item)


class _Load:
    """What is under way.

    Attributes:
        n_requests: Requests.
        n_keys: Keys of those.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self.n_requests = 0
        self.n_keys = 0


class Calls:
    """Requests on their way through the table, bounded in number.

    Each rank is counted by itself: claims that fill their bound keep no renewal out.
    """

    def __init__(
        self,
        table: Table,
        space: Space | None = None,
        *,
        max_requests: int = MAX_QUEUED_REQUESTS,
        max_keys: int = MAX_QUEUED_KEYS,
    ) -> None:
        """Carry requests to a table whose `Notify` is a `LoopNotify`.

        Args:
            table: The table.
            space: The free space for changes. None: there is no limit.
            max_requests: Requests of one rank under way at once.
            max_keys: Keys of those, taken together.
        """
        self._table = table
        self._space = space or Space()
        self._max_requests = max_requests
        self._max_keys = max_keys
        self._loads = {rank: _Load() for rank in Rank}

    async def run(
        self, keys: Sequence[bytes], run: Callable[[Group], T], *, rank: Rank = Rank.OTHER
    ) -> T:
        """Run a function in the committer and await its answer.

        Args:
            keys: The keys it touches.
            run: See `Table.submit`.
            rank: What it does: renewals and the ends of leases go first under load, and go on with
                little space.

        Returns:
            What it returned, once everything that rests on it is on disk.

        Raises:
            OverloadError: Too much is waiting, or the disk is nearly full; nothing was changed.
            Exception: What the function raised, or `Table.submit` lists.
        """
        load = self._loads[rank]
        if load.n_requests >= self._max_requests or load.n_keys >= self._max_keys:
            raise OverloadError(
                f"the server is overloaded: {load.n_requests} requests with {load.n_keys} keys "
                "are waiting; try again in a second"
            )
        done: asyncio.Future[Pending[T]] = asyncio.get_running_loop().create_future()

        def take(pending: Pending[T]) -> None:
            load.n_requests -= 1
            load.n_keys -= len(keys)
            if not done.done():  # cancelled: the caller is gone, the change stands
                done.set_result(pending)

        load.n_requests += 1
        load.n_keys += len(keys)
        guarded = self._space.guarded(run, ends_leases=rank is not Rank.OTHER)
        self._table.submit(keys, guarded, take, rank=rank)
        answered = await done
        reach("reply.made")
        return answered.result()
