"""What a `joblib.Parallel` is made of on its way: batches, items, and how long they take."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from run_once.joblib_outcomes import Failure, Settled, Value

if TYPE_CHECKING:
    from run_once.lease import Lease

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]

SHORT_ROUND_TRIPS: Final = 20
"""A call is short if it takes less than so many requests to the server."""

_NEWEST_SHARE: Final = 0.2
"""Weight of the newest call in the mean."""

_TRIPS_UNDER_WAY: Final = 4
"""Requests that a call waits for: its lookup and its settlement, each behind the one before."""

_MAX_PER_WORKER: Final = 1_000


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

    def fail(self, error: BaseException) -> None:
        """Settle all that is open with an error."""
        for index in range(len(self.calls)):
            self.settle(index, Failure(error))

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
        lease: It was claimed here, before it is run; None: its worker claims it.
        source_id: Fingerprint of the function's source; empty: not known.
        was_busy: Another held it when it was looked up.
        followers: Equal calls that get its outcome, too (`duplicates="once"`).
        tries: Attempts that failed here.
        last_failure: The last of them.
    """

    __slots__ = (
        "followers",
        "index",
        "job",
        "key",
        "last_failure",
        "lease",
        "source_id",
        "tries",
        "was_busy",
    )

    def __init__(self, job: Job, index: int, key: bytes, source_id: bytes) -> None:
        """Name an item."""
        self.job = job
        self.index = index
        self.key = key
        self.source_id = source_id
        self.lease: Lease | None = None
        self.was_busy = False
        self.followers: list[Item] = []
        self.tries = 0
        self.last_failure: Failure | None = None

    @property
    def call(self) -> Call:
        """The user's call."""
        return self.job.calls[self.index]


class Pace:
    """How long calls and requests take.

    A short call is claimed here, in the request that looks it up, and settled here, together with
    others: its worker asks the server for nothing. A long one is claimed by its worker when it
    starts, so that it is free for other machines until then.
    """

    def __init__(self) -> None:
        """Know nothing: calls count as long until one has run."""
        self._run_s: float | None = None
        self._trip_s: float | None = None

    def ran(self, run_s: float) -> None:
        """Note for how long a call ran, in seconds."""
        before_s = self._run_s
        self._run_s = run_s if before_s is None else before_s + _NEWEST_SHARE * (run_s - before_s)

    def asked(self, trip_s: float) -> None:
        """Note for how long a request took, in seconds; the fastest tells the round trip."""
        self._trip_s = trip_s if self._trip_s is None else min(self._trip_s, trip_s)

    @property
    def is_known(self) -> bool:
        """Tell whether a call has run."""
        return self._run_s is not None

    @property
    def is_short(self) -> bool:
        """Tell whether calls are short."""
        if self._run_s is None or self._trip_s is None:
            return False
        return self._run_s < SHORT_ROUND_TRIPS * self._trip_s

    def calls_per_worker(self, batch_size: int) -> int:
        """Give how many calls to have under way for each worker, so that it need not wait.

        Two batches as in joblib, or, over a slow network, what it runs while other calls are looked
        up and settled.
        """
        if not self.is_short or not self._run_s or not self._trip_s:
            return 2 * batch_size
        meanwhile = math.ceil(_TRIPS_UNDER_WAY * self._trip_s / self._run_s)
        return max(2 * batch_size, min(batch_size + meanwhile, _MAX_PER_WORKER))


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
