"""The requests that wait for the committer: renewals go first, then the ends of leases.

A slow disk makes the queue long. What keeps a lease alive then waits for the group that is being
written and no longer, what ends one for its like, while claims wait their turn. The order among
requests of one rank is that of their arrival. Between ranks it need not be: none of them has been
answered, so nobody can rely on any order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from distlock_server.pending import Pending, Rank

_SHARE: Final = 2
"""While others wait behind, a rank takes at most this part of the room in a group: one half."""


class Queue:
    """The queue; not safe for threads by itself."""

    def __init__(self) -> None:
        """Start empty."""
        self._ranks: tuple[deque[Pending[Any]], ...] = tuple(deque() for _ in Rank)

    def __len__(self) -> int:
        return sum(map(len, self._ranks))

    def put(self, pending: Pending[Any]) -> None:
        """Take a request, behind all of its rank."""
        self._ranks[pending.rank].append(pending)

    def put_back(self, again: Sequence[Pending[Any]]) -> None:
        """Take requests that were taken before, in front of all of their rank."""
        for pending in reversed(again):
            self._ranks[pending.rank].appendleft(pending)

    def take(self, max_keys: int) -> list[Pending[Any]]:
        """Give the next group.

        Args:
            max_keys: Keys that it may name; a single larger request is a group. Each rank that
                waits has at least one request in it: none starves.
        """
        batch: list[Pending[Any]] = []
        waiting = [rank for rank in self._ranks if rank]
        room = max_keys
        for rank in waiting:
            share = room if rank is waiting[-1] else room // _SHARE
            room -= _move(rank, batch, share)
        return batch

    def clear(self) -> list[Pending[Any]]:
        """Give all that waits and forget it."""
        left = [pending for rank in self._ranks for pending in rank]
        for rank in self._ranks:
            rank.clear()
        return left


def _move(rank: deque[Pending[Any]], batch: list[Pending[Any]], max_keys: int) -> int:
    """Move one request into a group, and more while they fit; count the keys."""
    batch.append(rank.popleft())
    n_keys = len(batch[-1].keys)
    while rank and n_keys + len(rank[0].keys) <= max_keys:
        batch.append(rank.popleft())
        n_keys += len(batch[-1].keys)
    return n_keys
