"""Requests in the table's queue, watches on keys, and who is told of them."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar, cast

from distlock_server.group import Group

T = TypeVar("T")


class TableClosedError(Exception):
    """The table is shutting down; ask again, the server may come back."""


class TableRunningError(Exception):
    """A group is run just now, and nothing else can be done at once; ask again in a moment."""


class StorageError(Exception):
    """The disk refused a write; its outcome is unknown, and the server must end."""


class ContendedError(Exception):
    """Other servers kept changing the same keys."""


class Rank(enum.IntEnum):
    """What a request does, in the order in which the committer takes what waits."""

    RENEWAL = 0
    ENDING = 1
    OTHER = 2


class Pending(Generic[T]):
    """A request in the queue, and later its answer.

    Attributes:
        keys: The keys it may touch.
        value: What its function returned.
        error: What went wrong instead; None if nothing did.
        revision: The store revision its answer rests on.
        context: The submitter's own, untouched.
        rank: Who goes first; see `queues.py`.
    """

    __slots__ = ("context", "error", "keys", "lost_swaps", "rank", "revision", "run", "value")

    def __init__(
        self,
        keys: Sequence[bytes],
        run: Callable[[Group], T],
        context: object,
        *,
        rank: Rank,
    ) -> None:
        """Make a request; see `Table.submit`."""
        self.keys = keys
        self.run = run
        self.context = context
        self.rank = rank
        self.value: T | None = None
        self.error: BaseException | None = None
        self.revision = 0
        self.lost_swaps = 0

    def result(self) -> T:
        """Give the value.

        Raises:
            BaseException: What went wrong.
        """
        if self.error is not None:
            raise self.error
        return cast("T", self.value)


class Notify(Protocol):
    """Tells the outside what is ready; called in the committer's thread, must not block."""

    def answered(self, answered: Sequence[Pending[Any]]) -> None:
        """Take the answers of one group."""
        ...

    def changed(self, watches: Sequence[Watch]) -> None:
        """Take the watches of which a key is no longer under the lease it was under."""
        ...

    def died(self, error: BaseException) -> None:
        """Take the error that ended the committer: the process must end."""
        ...


class Watch:
    """Somebody waiting for some keys; `context` is the watcher's own."""

    __slots__ = ("context", "keys")

    def __init__(self, keys: Sequence[bytes], context: object) -> None:
        """Watch these keys."""
        self.keys = keys
        self.context = context
