"""Batches of one `joblib.Parallel` on their way: look up, run what is missing, wait for the rest.

joblib calls `submit` under its lock, so `submit` only queues. A dispatcher thread looks keys up,
many in one request, hands cold items to the inner backend, and parks items that are in flight on
another machine; a waiter thread sits in a long poll for those: they hold no worker. joblib's
callback is called from these threads, or from the inner backend's, never from `submit`.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from run_once.joblib_failures import Failures
from run_once.joblib_lookup import MAX_WAIT_S, MIN_WAIT_S, Busy, Cold, Found, Lookups
from run_once.joblib_outcomes import Elsewhere, Failure, Outcome, Settled, Value
from run_once.joblib_report import Tally
from run_once.joblib_worker import RemoteCall, TaskOptions

if TYPE_CHECKING:
    from run_once.task import Session

logger = logging.getLogger("run_once")


Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Job:
    """One batch of joblib's, and what became of its items."""

    def __init__(self, batch: Any, callback: Callable[[Job], None]) -> None:
        """Take a batch; `callback` is joblib's, called once with this job."""
        self.batch = batch
        self.calls: list[Call] = list(batch.items)
        self._callback = callback
        self._outcomes: list[Settled | None] = [None] * len(self.calls)
        self._left = len(self.calls)
        self._lock = threading.Lock()
        self.had_cold = False

    def settle(self, index: int, outcome: Settled) -> None:
        """Note an item's outcome; the last one hands the job back to joblib."""
        with self._lock:
            if self._outcomes[index] is not None:
                return
            self._outcomes[index] = outcome
            self._left -= 1
            is_last = self._left == 0
        if is_last:
            self._callback(self)

    def values(self) -> list[Any]:
        """Give the values in order.

        Raises:
            BaseException: The first item's error, with the worker's traceback as its cause.
        """
        values = []
        for outcome in self._outcomes:
            if isinstance(outcome, Failure):
                raise outcome.with_cause()
            values.append(outcome.value if isinstance(outcome, Value) else outcome)
        return values


class Item:
    """One call of a job, with its key.

    Attributes:
        was_busy: Another held it when it was looked up.
        followers: Equal calls that get its outcome, too (`duplicates="once"`).
        tries: Attempts that failed here.
        last_failure: The last of them.
    """

    __slots__ = ("followers", "index", "job", "key", "last_failure", "tries", "was_busy")

    def __init__(self, job: Job, index: int, key: bytes) -> None:
        """Name an item."""
        self.job = job
        self.index = index
        self.key = key
        self.was_busy = False
        self.followers: list[Item] = []
        self.tries = 0
        self.last_failure: Failure | None = None


class Inner(Protocol):
    """What the dispatcher needs of the backend that runs the calls."""

    def run(
        self,
        job: Job,
        calls: list[Call],
        done: Callable[[list[Outcome]], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        """Run wrapped calls of one job as one batch; `done` or `failed` is called, once."""
        ...

    def batch_size(self) -> int:
        """Give the number of cold items that make one batch."""
        ...

    def max_batches(self) -> int:
        """Give the number of batches that may be with the inner backend at once."""
        ...


class Dispatcher:
    """The way of every batch of one `Parallel`."""

    def __init__(
        self,
        *,
        session: Session,
        lookups: Lookups,
        inner: Inner,
        make_key: Callable[[Call], bytes],
        options: TaskOptions,
        failures: Failures,
        tally: Tally,
        joins_equal: bool = False,
    ) -> None:
        """Make a dispatcher; its threads start with the first job.

        Args:
            session: The server.
            lookups: Asks it.
            inner: Runs what is to be run.
            make_key: Gives a call's key.
            options: What all calls have in common.
            failures: Judges calls that fail.
            tally: Counts.
            joins_equal: Calls with one key are run once, and all get the outcome.
        """
        self._session = session
        self._lookups = lookups
        self._inner = inner
        self._make_key = make_key
        self._options = options
        self._failures = failures
        self._tally = tally
        self._leaders: dict[bytes, Item] | None = {} if joins_equal else None
        self._later: list[tuple[float, int, Item]] = []
        self._serial = itertools.count()
        self._condition = threading.Condition()
        self._jobs: deque[Job] = deque()
        self._again: deque[Item] = deque()
        self._busy: dict[bytes, list[Item]] = {}
        self._in_flight: dict[bytes, list[bytes]] = {}
        self._cold: deque[list[Item]] = deque()
        self._n_running = 0
        self._threads: list[threading.Thread] = []
        self._closed = False
        # Held while the inner backend is given a batch: it must get none after its end. A garbage
        # collector may end the call in any thread, so also in one that holds it.
        self._handing_over = threading.RLock()

    def submit(self, job: Job) -> None:
        """Queue a job; returns at once."""
        with self._condition:
            if not self._threads and not self._closed:
                for target in (self._dispatch, self._wait):
                    thread = threading.Thread(target=target, name="run_once", daemon=True)
                    self._threads.append(thread)
                    thread.start()
            self._jobs.append(job)
            self._condition.notify_all()

    def close(self) -> list[tuple[bytes, list[bytes]]]:
        """Stop: nothing is looked up or run any more.

        Returns:
            (claim id, keys) of what is still with workers.
        """
        with self._condition:
            self._closed = True
        with self._handing_over, self._condition:
            self._jobs.clear()
            self._again.clear()
            self._busy.clear()
            self._cold.clear()
            self._later.clear()
            left = list(self._in_flight.items())
            self._in_flight.clear()
            self._condition.notify_all()
        return left

    def free(self, left: Sequence[tuple[bytes, list[bytes]]]) -> None:
        """Give back what killed workers held.

        The parent chose their claim ids: repeating a claim tells the token, with which to release.
        """
        self._session.free_claims(left, lease_s=self._options.lease_s)

    # -- the dispatcher thread ---------------------------------------------------------------------

    def _dispatch(self) -> None:
        while True:
            with self._condition:
                while not (self._jobs or self._again or self._closed or self._has_room()):
                    self._condition.wait(self._until_later_s())
                    self._take_later()
                if self._closed:
                    return
                jobs, items = list(self._jobs), list(self._again)
                self._jobs.clear()
                self._again.clear()
            for job in jobs:
                items += self._items_of(job)
            if items:
                self._look_up(items)
            self._hand_over()

    def _until_later_s(self) -> float | None:
        """Give the time until a failed call is tried again; None: there is none."""
        return max(0.0, self._later[0][0] - time.monotonic()) if self._later else None

    def _take_later(self) -> None:
        while self._later and self._later[0][0] <= time.monotonic():
            self._again.append(heapq.heappop(self._later)[2])

    def _items_of(self, job: Job) -> list[Item]:
        items = []
        for index, call in enumerate(job.calls):
            if self._closed:
                return []
            try:
                item = Item(job, index, self._make_key(call))
            except Exception as error:
                job.settle(index, Failure(error))
                continue
            if not self._follows(item):
                items.append(item)
        return items

    def _follows(self, item: Item) -> bool:
        """Join an item to an equal one that is on its way; tell whether there is one."""
        if self._leaders is None:
            return False
        with self._condition:
            leader = self._leaders.setdefault(item.key, item)
            if leader is not item:
                leader.followers.append(item)
        return leader is not item

    def _settle(self, item: Item, outcome: Settled) -> None:
        """End an item, and those that follow it."""
        items = [item]
        if self._leaders is not None:
            with self._condition:
                self._leaders.pop(item.key, None)
            items += item.followers
        for each in items:
            self._tally.note(each.key, outcome, was_busy=item.was_busy)
            each.job.settle(each.index, outcome)

    def _settle_failure(self, item: Item, failure: Failure) -> None:
        """End an item whose call failed, or have it tried again later."""
        verdict = self._failures.judge(item, failure)
        if not isinstance(verdict, float):
            self._settle(item, verdict)
            return
        with self._condition:
            if not self._closed:
                due_s = time.monotonic() + verdict
                heapq.heappush(self._later, (due_s, next(self._serial), item))
                self._condition.notify_all()

    def _look_up(self, items: list[Item]) -> None:
        try:
            found = self._lookups.find([item.key for item in items])
        except Exception as error:
            for item in items:
                self._settle(item, Failure(error))
            return
        self._split([item for item in items if self._sort(item, found[item.key])])

    def _sort(self, item: Item, found: Found) -> bool:
        """Settle or park an item; tell whether it is to be run."""
        if isinstance(found, Cold):
            item.job.had_cold = True
            return True
        if isinstance(found, Busy):
            item.was_busy = True
            with self._condition:
                self._busy.setdefault(item.key, []).append(item)
                self._condition.notify_all()
            return False
        self._settle(item, found)
        return False

    def _split(self, cold: list[Item]) -> None:
        """Queue cold items as batches for the inner backend, each of one job."""
        by_job: dict[int, list[Item]] = {}
        for item in cold:
            by_job.setdefault(id(item.job), []).append(item)
        size = max(1, self._inner.batch_size())
        for items in by_job.values():
            for first in range(0, len(items), size):
                self._cold.append(items[first : first + size])

    def _has_room(self) -> bool:
        """Tell whether a batch can be handed over.

        The inner backend gets no more at once than joblib itself would give it: what is queued here
        is not pickled yet, and an abort leaves it alone.
        """
        return bool(self._cold) and self._n_running < self._inner.max_batches()

    def _hand_over(self) -> None:
        while True:
            with self._condition:
                if self._closed or not self._has_room():
                    return
                items = self._cold.popleft()
                self._n_running += 1
            self._run_batch(items)

    def _run_batch(self, items: list[Item]) -> None:
        claim_id = os.urandom(16)
        calls: list[Call] = []
        for item in items:
            func, args, kwargs = item.job.calls[item.index]
            calls.append((RemoteCall(func, item.key, claim_id, self._options), args, kwargs))

        def done(outcomes: list[Outcome]) -> None:
            self._landed(claim_id)
            for item, outcome in zip(items, outcomes, strict=True):
                if isinstance(outcome, Elsewhere):
                    self._queue_again([item])
                elif isinstance(outcome, Failure):
                    self._settle_failure(item, outcome)
                else:
                    self._settle(item, outcome)

        def failed(error: BaseException) -> None:
            # It stays in flight: a worker that was killed holds its key until the call is aborted.
            self._make_room()
            for item in items:
                self._settle(item, Failure(error))

        with self._handing_over:
            with self._condition:
                if self._closed:
                    return
                self._in_flight[claim_id] = [item.key for item in items]
            try:
                self._inner.run(items[0].job, calls, done, failed)
            except BaseException as error:
                failed(error)

    def _landed(self, claim_id: bytes) -> None:
        with self._condition:
            self._in_flight.pop(claim_id, None)
        self._make_room()

    def _make_room(self) -> None:
        with self._condition:
            self._n_running -= 1
            self._condition.notify_all()

    def _queue_again(self, items: Sequence[Item]) -> None:
        with self._condition:
            if not self._closed:
                self._again.extend(items)
                self._condition.notify_all()

    # -- the waiter thread -------------------------------------------------------------------------

    def _wait(self) -> None:
        known: set[bytes] = set()
        poll_s = MIN_WAIT_S
        while True:
            with self._condition:
                while not (self._busy or self._closed):
                    self._condition.wait()
                if self._closed:
                    return
                keys = list(self._busy)
            # Keys come in bursts, and one that comes during a poll joins only the next one.
            poll_s = min(2 * poll_s, MAX_WAIT_S) if known.issuperset(keys) else MIN_WAIT_S
            known = set(keys)
            try:
                free = self._lookups.wait(keys, poll_s)
            except Exception as error:
                self._settle_busy(keys, error)
                continue
            with self._condition:
                items = [item for key in free for item in self._busy.pop(key, [])]
            self._queue_again(items)

    def _settle_busy(self, keys: Sequence[bytes], error: BaseException) -> None:
        with self._condition:
            items = [item for key in keys for item in self._busy.pop(key, [])]
        for item in items:
            self._settle(item, Failure(error))


class HitSizer:
    """Batch size while keys turn out to be done: large, and kept out of joblib's statistics."""

    MAX_SIZE = 1024

    def __init__(self) -> None:
        """Start with joblib's own size."""
        self._size = 1

    def batch_size(self, inner_size: int) -> int:
        """Give the larger of the inner backend's size and the size grown on hits."""
        return max(inner_size, self._size)

    def completed(self, job: Job) -> None:
        """Learn from a job: all hits doubles the size, anything cold starts over."""
        self._size = 1 if job.had_cold else min(self.MAX_SIZE, 2 * max(self._size, len(job.calls)))
