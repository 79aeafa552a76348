"""Calls that are to be run: queued as batches, wrapped, and given to the inner backend.

It gets no more at once than joblib itself would give it. What a worker may have claimed is known by
the claim's id until its batch has come back.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Protocol

from run_once.joblib_jobs import Call, Item, Job
from run_once.joblib_worker import ClaimedCall, RemoteCall, TaskOptions

if TYPE_CHECKING:
    from run_once.task import Session

BATCHES_PER_WORKER: Final = 2
"""As many as joblib itself gives: one runs, one waits."""


class Inner(Protocol):
    """What the dispatcher needs of the backend that runs the calls."""

    def run(
        self,
        job: Job,
        calls: list[Call],
        done: Callable[[list[Any]], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        """Run wrapped calls of one job as one batch; `done` or `failed` is called, once."""
        ...

    def batch_size(self) -> int:
        """Give the number of cold items that make one batch."""
        ...

    def n_workers(self) -> int:
        """Give the number of workers."""
        ...


class Running:
    """The batches that wait for the inner backend, and those that it has.

    Attributes:
        claims: (claim id, keys) of what workers may have claimed.
    """

    def __init__(
        self,
        inner: Inner,
        session: Session,
        options: TaskOptions,
        mutex: threading.RLock,
        changed: threading.Condition,
        *,
        take: Callable[[list[Item], list[Any]], None],
        fail: Callable[[list[Item], BaseException], None],
    ) -> None:
        """Begin with nothing.

        Args:
            inner: Runs batches.
            session: The server.
            options: What all calls have in common.
            mutex: Guards what is here.
            changed: The condition on it, told when there is room.
            take: Called with items and what workers answered for them.
            fail: Called with items of which nothing runs any more.
        """
        self.claims: dict[bytes, list[bytes]] = {}
        self._inner = inner
        self._session = session
        self._options = options
        self._mutex = mutex
        self._changed = changed
        self._take = take
        self._fail = fail
        self._waiting: deque[list[Item]] = deque()
        self._n_running = 0
        self._is_closed = False
        # Held while the inner backend is given a batch: it must get none after its end. A garbage
        # collector may end the call in any thread, so also in one that holds it.
        self._handing_over = threading.RLock()

    def put(self, items: list[Item]) -> None:
        """Queue items as batches, each of one job."""
        by_job: dict[int, list[Item]] = {}
        for item in items:
            by_job.setdefault(id(item.job), []).append(item)
        size = max(1, self._inner.batch_size())
        for alike in by_job.values():
            for first in range(0, len(alike), size):
                self._waiting.append(alike[first : first + size])

    def has_room(self) -> bool:
        """Tell whether a batch can be handed over.

        The inner backend gets no more at once than joblib itself would give it: what is queued here
        is not pickled yet, and an abort leaves it alone.
        """
        max_running = BATCHES_PER_WORKER * self._inner.n_workers()
        return bool(self._waiting) and self._n_running < max_running

    def hand_over(self) -> None:
        """Give the inner backend what it has room for."""
        while True:
            with self._mutex:
                if self._is_closed or not self.has_room():
                    return
                items = self._waiting.popleft()
                self._n_running += 1
            self._run(items)

    def stop(self) -> None:
        """Hand nothing more over; the caller holds the lock."""
        self._is_closed = True

    def close(self) -> list[tuple[bytes, list[bytes]]]:
        """Forget what waits and what runs; give the claims of what ran."""
        with self._handing_over, self._mutex:
            self._is_closed = True
            self._waiting.clear()
            claims = list(self.claims.items())
            self.claims.clear()
            return claims

    def _run(self, items: list[Item]) -> None:
        claim_id = os.urandom(16)
        calls = [self._wrapped(item, claim_id) for item in items]
        to_claim = [item.key for item in items if item.lease is None]

        def done(outcomes: list[Any]) -> None:
            with self._mutex:
                self.claims.pop(claim_id, None)
            self._make_room()
            self._take(items, outcomes)

        def failed(error: BaseException) -> None:
            # It stays in flight: a worker that was killed holds its key until the call is aborted.
            self._make_room()
            self._fail(items, error)

        with self._handing_over:
            with self._mutex:
                if self._is_closed:
                    return
                if to_claim:
                    self.claims[claim_id] = to_claim
            try:
                self._inner.run(items[0].job, calls, done, failed)
            except BaseException as error:
                failed(error)

    def _wrapped(self, item: Item, claim_id: bytes) -> Call:
        func, args, kwargs = item.call
        if item.lease is None:
            wrapped = RemoteCall(func, item.source_id, item.key, claim_id, self._options)
            return wrapped, args, kwargs
        item.lease.start()
        grant, options = item.lease.grant, self._claimed_options
        return ClaimedCall(func, item.source_id, grant, options), args, kwargs

    @cached_property
    def _claimed_options(self) -> TaskOptions:
        """Options for workers that need not ask the server for anything."""
        limits = self._session.client.limits()
        return replace(self._options, max_inline_bytes=limits.max_inline_result_bytes)

    def _make_room(self) -> None:
        with self._mutex:
            self._n_running -= 1
            self._changed.notify_all()
