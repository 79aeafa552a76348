"""Batches of one `joblib.Parallel` on their way: look up, run what is missing, wait for the rest.

joblib calls `submit` under its lock, so `submit` only queues. One thread makes keys; two others
look them up, many in one request, hand cold items to the inner backend, and park items that are in
flight on another machine; one more sits in a long poll for those: they hold no worker; the settler
completes what was claimed here. joblib's callback is called from these threads, or from the
inner backend's, never from `submit`.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from run_once.joblib_failures import Failures
from run_once.joblib_jobs import Call, Item, Job, Pace
from run_once.joblib_lookup import MAX_WAIT_S, MIN_WAIT_S, Busy, Cold, Found, Lookups
from run_once.joblib_outcomes import Elsewhere, Failure, Outcome, Settled, Value
from run_once.joblib_report import Tally
from run_once.joblib_running import Inner, Running
from run_once.joblib_settle import Settler
from run_once.joblib_worker import InResult, TaskOptions
from run_once.task import Ran
from run_once.threads import start_daemon

if TYPE_CHECKING:
    from run_once.lease import Lease
    from run_once.task import Session, TaskOutcome

logger = logging.getLogger("run_once")

MAX_LOOKED_UP: Final = 2_000
"""Keys in one request: while it is answered, the keys of the next are made."""

N_DISPATCHERS: Final = 2
"""While the answer to one request is read, the server works at the next."""

WORTH_A_REQUEST: Final = 256
"""Fewer keys wait for the request that is under way, to go together with others."""

FEW: Final = 64
"""Keys in one request of which some may be claimed before a call has run."""


class Left(NamedTuple):
    """What a dispatcher that was closed still holds.

    Attributes:
        claims: (claim id, keys) of what workers may have claimed.
        leases: What was claimed here and did not come to its end.
        ran: What was claimed here and ran, but is not settled.
    """

    claims: list[tuple[bytes, list[bytes]]]
    leases: list[Lease]
    ran: list[tuple[Lease, Ran[Any]]]


class Dispatcher:
    """The way of every batch of one `Parallel`."""

    def __init__(
        self,
        *,
        session: Session,
        lookups: Lookups,
        inner: Inner,
        make_key: Callable[[Call], tuple[bytes, bytes]],
        options: TaskOptions,
        failures: Failures,
        tally: Tally,
        pace: Pace,
        joins_equal: bool = False,
    ) -> None:
        """Make a dispatcher; its threads start when they are needed.

        Args:
            session: The server.
            lookups: Asks it.
            inner: Runs what is to be run.
            make_key: Gives a call's key, and the fingerprint of its source.
            options: What all calls have in common.
            failures: Judges calls that fail.
            tally: Counts.
            pace: Measures.
            joins_equal: Calls with one key are run once, and all get the outcome.
        """
        self._session = session
        self._lookups = lookups
        self._inner = inner
        self._make_key = make_key
        self._options = options
        self._failures = failures
        self._tally = tally
        self._pace = pace
        self._settler = Settler(session, self._settled, self._unsettled)
        self._leaders: dict[bytes, Item] | None = {} if joins_equal else None
        self._serial = itertools.count()
        # Not `with` of the condition itself: an interrupt in that can leave it locked.
        self._mutex = threading.RLock()
        self._condition = threading.Condition(self._mutex)
        self._threads: dict[str, threading.Thread] = {}
        self._open_jobs: weakref.WeakSet[Job] = weakref.WeakSet()
        self._closed = False
        # The way of an item: jobs, new, perhaps free, running; with stops at busy and later.
        self._jobs: deque[Job] = deque()
        self._new: deque[Item] = deque()
        self._free: deque[Item] = deque()  # short, and to be claimed here when there is room
        self._busy: dict[bytes, list[Item]] = {}
        self._later: list[tuple[float, int, Item]] = []
        self._leases: dict[bytes, Lease] = {}
        self._n_asking = 0
        self._running = Running(
            inner,
            session,
            options,
            self._mutex,
            self._condition,
            take=self._take_answers,
            fail=self._take_failure,
        )

    def submit(self, job: Job) -> None:
        """Queue a job; returns at once."""
        with self._mutex:
            self._start("keys", self._make_keys)
            for number in range(N_DISPATCHERS):
                self._start(f"dispatcher {number}", self._dispatch)
            self._open_jobs.add(job)
            self._jobs.append(job)
            self._condition.notify_all()

    def close(self) -> Left:
        """Stop: nothing is looked up or run any more."""
        with self._mutex:
            self._closed = True
            self._running.stop()
        ran = self._settler.close()
        claims = self._running.close()
        with self._mutex:
            for queue in (self._jobs, self._new, self._free, self._busy, self._later):
                queue.clear()
            settling = {lease.key for lease, _ in ran}
            leases = [lease for key, lease in self._leases.items() if key not in settling]
            self._leases.clear()
            self._condition.notify_all()
        return Left(claims, leases, ran)

    def _start(self, name: str, target: Callable[[], None]) -> None:
        """Start a thread if it does not run."""
        if name not in self._threads and not self._closed:
            guarded = partial(self._guarded, target)
            self._threads[name] = start_daemon(guarded, f"run_once {name}")

    def _guarded(self, target: Callable[[], None]) -> None:
        """Run a thread's work; if it breaks, nobody shall wait for ever for what it left."""
        try:
            target()
        except Exception as error:
            self._broke(error)

    def _broke(self, error: Exception) -> None:
        logger.error("run_once broke in a thread of Parallel: please report it", exc_info=error)
        with self._mutex:
            jobs = list(self._open_jobs)
        for job in jobs:
            job.fail(error)

    # -- the thread that makes keys ----------------------------------------------------------------

    def _make_keys(self) -> None:
        while True:
            with self._mutex:
                while not (self._jobs or self._closed):
                    self._condition.wait()
                if self._closed:
                    return
                job = self._jobs.popleft()
            items = self._items_of(job)
            with self._mutex:
                self._new.extend(items)
                self._condition.notify_all()

    def _items_of(self, job: Job) -> list[Item]:
        items = []
        for index, call in enumerate(job.calls):
            if self._closed:
                return []
            try:
                item = Item(job, index, *self._make_key(call))
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
        with self._mutex:
            leader = self._leaders.setdefault(item.key, item)
            if leader is not item:
                leader.followers.append(item)
        return leader is not item

    # -- the dispatcher threads --------------------------------------------------------------------

    def _dispatch(self) -> None:
        while True:
            with self._mutex:
                while not (self._closed or self._has_work()):
                    self._condition.wait(self._until_later_s())
                    self._take_later()
                if self._closed:
                    return
                items = self._take_new() if self._may_ask() else []
                self._n_asking += bool(items)
            if items:
                try:
                    self._look_up(items)
                finally:
                    with self._mutex:
                        self._n_asking -= 1
            self._running.hand_over()

    def _has_work(self) -> bool:
        return self._may_ask() or self._running.has_room()

    def _may_ask(self) -> bool:
        """Tell whether there is something to look up that need not wait for a request's end."""
        if self._n_asking:
            return len(self._new) >= WORTH_A_REQUEST
        return bool(self._new) or (
            bool(self._free) and (not self._pace.is_short or self._max_claims() > 0)
        )

    def _take_new(self) -> list[Item]:
        """Take items to look up: new ones, and free ones for which there is room now."""
        # What was free for a short call is for the workers to claim once calls are long.
        n_free = (
            min(len(self._free), self._max_claims()) if self._pace.is_short else len(self._free)
        )
        items = [self._free.popleft() for _ in range(n_free)]
        while self._new and len(items) < MAX_LOOKED_UP:
            items.append(self._new.popleft())
        return items

    def _max_claims(self) -> int:
        """Give how many calls may be claimed here now: those that workers will soon ask for.

        The first ones of all, too, of which nothing is known: workers wait for them.
        """
        if not self._pace.is_known:
            return max(0, self._inner.n_workers() - len(self._leases) - len(self._running.claims))
        if not self._pace.is_short:
            return 0
        wanted = self._pace.calls_per_worker(max(1, self._inner.batch_size()))
        return max(0, 2 * wanted * self._inner.n_workers() - len(self._leases))

    def _until_later_s(self) -> float | None:
        """Give the time until a failed call is tried again; None: there is none."""
        return max(0.0, self._later[0][0] - time.monotonic()) if self._later else None

    def _take_later(self) -> None:
        while self._later and self._later[0][0] <= time.monotonic():
            self._new.append(heapq.heappop(self._later)[2])

    def _look_up(self, items: list[Item]) -> None:
        is_short = self._pace.is_short
        # Many keys at once are mostly done: joblib's batches have grown on hits.
        is_few = self._pace.is_known or len(items) <= FEW
        max_claims = self._max_claims() if is_few else 0
        started_s = time.monotonic()
        try:
            found = self._lookups.find([item.key for item in items], max_claims=max_claims)
        except Exception as error:
            for item in items:
                self._settle(item, Failure(error))
            return
        self._pace.asked(time.monotonic() - started_s)
        self._keep_leases(found)
        cold = [item for item in items if self._sort(item, found[item.key])]
        if is_short:
            with self._mutex:
                self._free.extend(item for item in cold if item.lease is None)
            cold = [item for item in cold if item.lease is not None]
        self._running.put(cold)

    def _keep_leases(self, found: dict[bytes, Found]) -> None:
        """Note what was claimed; give it back if the call ended meanwhile."""
        leases = {
            key: each.lease for key, each in found.items() if isinstance(each, Cold) and each.lease
        }
        with self._mutex:
            is_closed = self._closed
            if not is_closed:
                self._leases.update(leases)
        if is_closed:
            self._session.release(list(leases.values()))

    def _sort(self, item: Item, found: Found) -> bool:
        """Settle or park an item; tell whether it is to be run."""
        if isinstance(found, Cold):
            item.job.had_cold = True
            item.lease = found.lease
            return True
        if isinstance(found, Busy):
            item.was_busy = True
            with self._mutex:
                self._start("waiter", self._wait)
                self._busy.setdefault(item.key, []).append(item)
                self._condition.notify_all()
            return False
        if isinstance(found, Failure):
            found = self._failures.judge_found(item, found)
        self._settle(item, found)
        return False

    def _take_answers(self, items: list[Item], outcomes: list[Any]) -> None:
        """Take what came back, in a thread of the inner backend, which must live on."""
        try:
            self._take_outcomes(items, outcomes)
        except Exception as error:
            self._broke(error)

    def _take_failure(self, items: list[Item], error: BaseException) -> None:
        """End items of which nothing runs any more."""
        for item in items:
            self._settle(item, Failure(error))
        # joblib must not wait for the rest of the job, which may wait for other machines, or for
        # room that these items' leases take up.
        items[0].job.fail(error)

    def _take_outcomes(self, items: list[Item], outcomes: list[Outcome | Ran[Any]]) -> None:
        """Take what workers answer."""
        ran: list[tuple[Item, Ran[Any]]] = []
        for item, outcome in zip(items, outcomes, strict=True):
            if isinstance(outcome, Ran):
                ran.append((item, outcome))
            elif isinstance(outcome, Elsewhere):
                self._queue_again(item)
            elif isinstance(outcome, Failure):
                self._settle_failure(item, outcome)
            else:
                self._pace.ran(outcome.run_s)
                self._settle(item, outcome)
        if ran:
            self._settler.put(ran)

    # -- ends of items, in whichever thread --------------------------------------------------------

    def _settle(self, item: Item, outcome: Settled) -> None:
        """End an item, and those that follow it."""
        items = [item]
        if self._leaders is not None:
            with self._mutex:
                self._leaders.pop(item.key, None)
            items += item.followers
        for each in items:
            self._tally.note(each.key, outcome, was_busy=item.was_busy, source_id=each.source_id)
            each.job.settle(each.index, outcome)

    def _settle_failure(self, item: Item, failure: Failure) -> None:
        """End an item whose call failed, or have it tried again later."""
        verdict = self._failures.judge(item, failure)
        if not isinstance(verdict, float):
            self._settle(item, verdict)
            return
        with self._mutex:
            if not self._closed:
                due_s = time.monotonic() + verdict
                heapq.heappush(self._later, (due_s, next(self._serial), item))
                self._condition.notify_all()

    def _queue_again(self, item: Item) -> None:
        """Look an item up again that another holds or completed."""
        item.was_busy = True
        with self._mutex:
            if not self._closed:
                self._new.append(item)
                self._condition.notify_all()

    def _drop_leases(self, items: Sequence[Item]) -> None:
        """Forget leases that came to their end, which makes room for others."""
        with self._mutex:
            for item in items:
                self._leases.pop(item.key, None)
                item.lease = None
            self._condition.notify_all()

    def _settled(self, settled: list[tuple[Item, Ran[Any], TaskOutcome[Any]]]) -> None:
        """Take what the settler settled."""
        self._drop_leases([item for item, _, _ in settled])
        for item, ran, outcome in settled:
            if outcome.error is not None:
                self._settle_failure(item, Failure(outcome.error, ran.error_text))
            elif outcome.is_completed:
                self._settle(item, self._value(item, ran, outcome))
            else:
                self._queue_again(item)

    def _value(self, item: Item, ran: Ran[Any], outcome: TaskOutcome[Any]) -> Value | Failure:
        """Give the value of a call that was completed here."""
        assert outcome.lease is not None
        assert outcome.value is not None
        value, run_s = outcome.value
        self._pace.ran(run_s)
        if value is not InResult:
            return Value(value, run_s=run_s)
        assert ran.result is not None
        try:
            return self._lookups.load(item.key, outcome.lease.token, ran.result)
        except Exception as error:
            return Failure(error)

    def _unsettled(self, ran: list[tuple[Item, Ran[Any]]], problem: Exception) -> None:
        """End items whose completion was not acknowledged."""
        self._drop_leases([item for item, _ in ran])
        for item, each in ran:
            self._settle(item, Failure(each.error or problem, each.error_text))

    # -- the waiter thread -------------------------------------------------------------------------

    def _wait(self) -> None:
        known: set[bytes] = set()
        poll_s = MIN_WAIT_S
        while True:
            with self._mutex:
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
                for item in self._take_busy(keys):
                    self._settle(item, Failure(error))
                continue
            for item in self._take_busy(free):
                self._queue_again(item)

    def _take_busy(self, keys: Sequence[bytes]) -> list[Item]:
        with self._mutex:
            return [item for key in keys for item in self._busy.pop(key, [])]
