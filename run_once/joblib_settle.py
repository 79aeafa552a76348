"""Settles calls that were claimed in the parent: many in one request, as they come in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from run_once.joblib_jobs import Item
from run_once.lease import Lease
from run_once.task import Ran, Session, TaskOutcome, settle_ran
from run_once.threads import start_daemon

MAX_SETTLED: Final = 2_000
"""Calls in one request; what comes meanwhile goes into the next."""

_Settled: TypeAlias = Callable[[list[tuple[Item, Ran[Any], TaskOutcome[Any]]]], None]
_Unsettled: TypeAlias = Callable[[list[tuple[Item, Ran[Any]]], Exception], None]


class Settler:
    """A queue of calls that ran, and the thread that settles them."""

    def __init__(self, session: Session, settled: _Settled, unsettled: _Unsettled) -> None:
        """Prepare; the thread starts with the first call.

        Args:
            session: The server.
            settled: Told of calls that were settled, in the thread.
            unsettled: Told of calls that could not be, and why.
        """
        self._session = session
        self._settled = settled
        self._unsettled = unsettled
        # Not `with` of the condition itself: an interrupt in that can leave it locked.
        self._mutex = threading.RLock()
        self._changed = threading.Condition(self._mutex)
        self._queue: list[tuple[Item, Ran[Any]]] = []
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def put(self, ran: list[tuple[Item, Ran[Any]]]) -> None:
        """Queue calls; once closed they are dropped, and their leases run out or are released."""
        with self._mutex:
            if self._is_closed:
                return
            self._queue += ran
            if self._thread is None:
                self._thread = start_daemon(self._run, "run_once settler")
            self._changed.notify()

    def close(self) -> list[tuple[Lease, Ran[Any]]]:
        """Stop.

        Returns:
            What ran and is not settled yet.
        """
        with self._mutex:
            self._is_closed = True
            left, self._queue = self._queue, []
            self._changed.notify()
        return _with_leases(left)

    def _run(self) -> None:
        while True:
            with self._mutex:
                while not (self._queue or self._is_closed):
                    self._changed.wait()
                if self._is_closed:
                    return
                part, self._queue = self._queue[:MAX_SETTLED], self._queue[MAX_SETTLED:]
            try:
                outcomes = settle_ran(self._session, _with_leases(part))
            except Exception as error:
                self._unsettled(part, error)
                continue
            pairs = zip(part, outcomes, strict=True)
            try:
                self._settled([(item, ran, outcome) for (item, ran), outcome in pairs])
            except Exception as error:
                self._unsettled(part, error)


def _with_leases(part: list[tuple[Item, Ran[Any]]]) -> list[tuple[Lease, Ran[Any]]]:
    return [(item.lease, ran) for item, ran in part if item.lease is not None]
