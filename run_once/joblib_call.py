"""What belongs to one `joblib.Parallel`: the inner backend, the session, the dispatcher."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import queue
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Final

from joblib.externals.loky.process_executor import ShutdownExecutorError
from joblib.parallel import (
    BatchedCalls,
    FallbackToBackend,
    LokyBackend,
    MultiprocessingBackend,
    ThreadingBackend,
)

from run_once.call_keys import CallKeyer, Numberer
from run_once.errors import RunOnceError, RunOnceWarning
from run_once.joblib_dispatch import Dispatcher, Left
from run_once.joblib_failures import Failures
from run_once.joblib_jobs import Call, HitSizer, Job, Pace
from run_once.joblib_loky import start_without_fork
from run_once.joblib_lookup import Busy, Cold, DryLookups, Lookups
from run_once.joblib_options import BackendOptions, resolve
from run_once.joblib_outcomes import Failure, Settled, Value
from run_once.joblib_report import RunningCalls, Tally, keep_report
from run_once.joblib_worker import ClaimedCall, TaskOptions
from run_once.keys import stored_key
from run_once.lease import Lease
from run_once.progress import Progress
from run_once.secret import load_secret
from run_once.task import Session, settle_ran
from run_once.warn import UserLine, user_line

_LOCAL_BACKENDS: Final = (LokyBackend, MultiprocessingBackend, ThreadingBackend)
"""Inner backends whose workers are on this machine; not what is derived from them, as ray's is."""


logger = logging.getLogger("run_once")

_SETTLE_LEFT_S: Final = 2.0
"""How long an aborted `Parallel` tries to complete what has finished."""

_PICKUP_S: Final = 0.5
_PICKUP_LOOK_S: Final = 0.005


class BoundCall:
    """One `Parallel`, from `configure` to `terminate`."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self._parallel: Any = None
        self._line: UserLine
        self._inner_kwargs: dict[str, Any] = {}
        self._dispatcher: Dispatcher | None = None
        self._tally: Tally | None = None
        self._progress: Progress | None = None
        self._sizer = HitSizer()
        self._pace = Pace()
        self._inner_is_ready = False
        self.is_sequential = False

    def configure(
        self, n_jobs: int, parallel: Any, options: BackendOptions, inner_kwargs: dict[str, Any]
    ) -> int:
        """Prepare; return the number of workers."""
        self._parallel = parallel
        self._options = options
        self._line = user_line()
        self._inner_kwargs = inner_kwargs
        self._config = resolve(options)
        self._failures = Failures(options.on_error, options.max_attempts)
        self._secret = load_secret(configured=self._config.secret, address=self._config.address)
        self._task_options = TaskOptions(
            config=dataclasses.replace(self._config, secret=None),
            lease_s=self._config.lease_s,
            max_attempts=self._failures.max_attempts,
            secret=self._secret if type(self.inner) in _LOCAL_BACKENDS else None,
        )
        self._keyer = CallKeyer(
            ignore=tuple(options.ignore),
            key=options.key,
            code=options.code,
            warn=self._line.warn,
        )
        start_without_fork()
        try:
            configured = int(self.inner.configure(n_jobs=n_jobs, parallel=parallel, **inner_kwargs))
            self._inner_is_ready = True
        except FallbackToBackend:
            # The inner backend has nothing to run with one job, and nothing to end either.
            configured = 1
        self._n_jobs = configured
        self.is_sequential = configured == 1
        if self.is_sequential:
            self._claim_sequentially(parallel)
        return configured

    # -- a Parallel with several jobs --------------------------------------------------------------

    def start_call(self) -> None:
        """Begin one call of the `Parallel`."""
        self._keyer.clear()
        self._begin()
        _forget_leftovers(self._parallel)
        if hasattr(self.inner, "start_call"):
            self.inner.start_call()

    def stop_call(self) -> None:
        """End one call of the `Parallel`."""
        self._close_dispatcher()
        self._keyer.clear()
        self._end()
        if hasattr(self.inner, "stop_call"):
            self.inner.stop_call()

    def submit(self, batch: Any, callback: Callable[[Job], None] | None) -> Job:
        """Queue a batch."""

        def finished(job: Job) -> None:
            self._sizer.completed(job)
            if callback is not None:
                callback(job)

        job = Job(batch, finished)
        if self._dispatcher is None:
            session = Session.get(self._config)
            self._dispatcher = Dispatcher(
                session=session,
                lookups=self._lookups(),
                inner=self,
                make_key=self._key_maker(),
                options=self._task_options,
                failures=self._failures,
                tally=self._begin(),
                pace=self._pace,
                joins_equal=self._options.duplicates == "once",
            )
        self._dispatcher.submit(job)
        return job

    def compute_batch_size(self) -> int:
        """Give the batch size for joblib, which keeps two batches for each worker under way.

        It is larger than the inner backend's while calls are done or must be asked for early; the
        dispatcher parts such batches again.
        """
        size = self.batch_size()
        return max(self._sizer.batch_size(size), self._pace.calls_per_worker(size) // 2)

    def batch_size(self) -> int:
        """Give the user's batch size, or the inner backend's own."""
        fixed = self._parallel.batch_size
        return int(self.inner.compute_batch_size() if fixed == "auto" else fixed)

    def n_workers(self) -> int:
        """Give the number of the inner backend's workers."""
        return self._n_jobs

    def run(
        self,
        job: Job,
        calls: list[Call],
        done: Callable[[list[Any]], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        """Run wrapped calls as one batch of the inner backend."""
        started_s = time.perf_counter()

        def callback(out: Any) -> None:
            try:
                outcomes = self.inner.retrieve_result_callback(out)
            except BaseException as error:
                failed(error)
                return
            self.inner.batch_completed(len(calls), time.perf_counter() - started_s)
            done(outcomes)

        batch = job.batch
        wrapped = BatchedCalls(
            calls,
            (batch._backend, batch._n_jobs),
            self._reducer_callback(),
            getattr(batch, "_pickle_cache", None),
        )
        try:
            submit = getattr(self.inner, "submit", None) or self.inner.apply_async  # joblib 1.4
            submit(wrapped, callback)
        except ShutdownExecutorError as error:
            raise RuntimeError(
                "The executor underlying Parallel has been shut down, most likely because the "
                "generator of an earlier Parallel call with return_as='generator' was thrown away "
                "before it was exhausted: keep it, or exhaust it, before the next call"
            ) from error

    def abort(self, *, ensure_ready: bool) -> None:
        """Stop all work and free what the workers held."""
        dispatcher, self._dispatcher = self._dispatcher, None
        left = dispatcher.close() if dispatcher else None
        if self._inner_is_ready:
            _await_pickup(self.inner)
            self.inner.abort_everything(ensure_ready=ensure_ready)
        if left is not None:
            self._free(left)

    def terminate(self) -> None:
        """End what `configure` began."""
        self._close_dispatcher()
        self._keyer.clear()
        if self._inner_is_ready:
            self.inner.terminate()
            self._inner_is_ready = False

    def _close_dispatcher(self) -> None:
        dispatcher, self._dispatcher = self._dispatcher, None
        if dispatcher is not None:
            self._free(dispatcher.close())

    def _free(self, left: Left) -> None:
        """Settle what ran, and give back what workers and we ourselves hold, if that can be soon.

        The parent chose the workers' claim ids: repeating a claim tells the token, with which to
        release.
        """
        session = Session.get(self._config)
        if left.ran:
            try:
                settle_ran(session, left.ran, timeout_s=_SETTLE_LEFT_S)
            except RunOnceError as error:
                logger.warning("%d finished calls could not be completed: %s", len(left.ran), error)
        session.release(left.leases)
        session.free_claims(left.claims, lease_s=self._config.lease_s)

    def _reducer_callback(self) -> Callable[[], None] | None:
        """Give what joblib gives its own loky backend: a folder of memmaps for this `Parallel`."""
        inner, parallel = self.inner, self._parallel
        if not isinstance(inner, LokyBackend):
            return None

        def set_context() -> None:
            manager = inner._workers._temp_folder_manager
            manager.set_current_context(parallel._id)

        return set_context

    # -- both --------------------------------------------------------------------------------------

    def _begin(self) -> Tally:
        """Begin to count the calls of one call of the `Parallel`, and to show them."""
        if self._tally is None:
            self._tally = Tally(self._options.callback)
            if self._config.progress:
                total = getattr(self._parallel, "n_tasks", None)
                running = RunningCalls(self._tally, Session.get(self._config), total)
                self._progress = Progress.start(running, self._config)
        return self._tally

    def _end(self) -> None:
        """End the display, and keep the numbers as the last report."""
        tally, self._tally = self._tally, None
        progress, self._progress = self._progress, None
        if progress is not None:
            progress.close()
        if tally is not None and not self._options.dry_run:
            report = tally.report()
            keep_report(report)
            if report.other_source:
                self._warn_other_source(report.other_source, tally.first_of_other_source)

    def _lookups(self) -> Lookups:
        kind = DryLookups if self._options.dry_run else Lookups
        session = Session.get(self._config)
        return kind(
            session,
            in_flight=self._options.in_flight,
            secret=self._secret,
            options=self._task_options,
        )

    def _key_maker(self) -> Callable[[Call], tuple[bytes, bytes]]:
        """Give what makes the keys of one call of the `Parallel`, and tells their source."""
        numberer = Numberer() if self._options.duplicates == "number" else None
        return partial(self._make_key, numberer)

    def _make_key(self, numberer: Numberer | None, call: Call) -> tuple[bytes, bytes]:
        func, args, kwargs = call
        name, source_id = self._keyer.keyed(func, args, kwargs)
        if numberer is not None:
            number_before, name = numberer.duplicates, numberer.number(name)
            if numberer.duplicates > number_before == 0:
                self._warn_equal(name)
        key = stored_key(name, version=self._options.version, namespace=self._config.namespace)
        return key, source_id

    def _warn_equal(self, name: str) -> None:
        self._line.warn(
            f"two calls of this Parallel are equal ({name.partition('/')[0]} with the same "
            "arguments), so they are numbered: each is computed, as for random draws, and a rerun "
            'finds each again. duplicates="once" computes equal calls once for all'
        )

    def _warn_other_source(self, count: int, first: str) -> None:
        values = "a value was" if count == 1 else f"{count:,} values were"
        self._line.warn(
            f"{values} computed by other source than {first.partition('/')[0]} has now, and taken "
            f"as done: by its code before a change, or by another project's function of that name. "
            f"version={self._options.version + 1} computes anew; "
            'code="source" makes the source part of the key; namespace="..." parts projects'
        )

    # -- a Parallel with one job: joblib calls no `submit` -----------------------------------------

    def _claim_sequentially(self, parallel: Any) -> None:
        """Make joblib's sequential loop claim, lazily and in order, in this process.

        joblib has no public way to do this; where its private one is missing, calls run plainly.
        """
        original = getattr(type(parallel), "_get_sequential_output", None)
        if not inspect.isgeneratorfunction(original):
            warnings.warn(
                "this version of joblib runs n_jobs=1 past every backend, so these calls are "
                "neither claimed nor stored; use n_jobs=2, or joblib 1.4 to 1.6",
                RunOnceWarning,
                stacklevel=4,
            )
            return

        def claimed_output(iterable: Iterable[Call]) -> Iterator[Any]:
            self._keyer.clear()
            self._begin()
            run = partial(self._run_here, self._lookups(), self._key_maker())
            try:
                yield from original(parallel, _Lazily(iterable, run))
            finally:
                self._end()

        parallel._get_sequential_output = claimed_output

    def _run_here(
        self, lookups: Lookups, make_key: Callable[[Call], tuple[bytes, bytes]], call: Call
    ) -> Any:
        """Claim and run one call in this thread, or get its value, waiting for it if need be."""
        item = _CallHere(*make_key(call))
        while True:
            found = lookups.find([item.key], max_claims=1)[item.key]
            if isinstance(found, Busy):
                item.was_busy = True
                lookups.wait([item.key])
            elif not isinstance(found, Cold):
                if isinstance(found, Failure):
                    found = self._failures.judge_found(item, found)
                return self._settle_here(item, found)
            elif found.lease is not None:
                outcome = self._run_claimed(found.lease, item.source_id, call)
                if isinstance(outcome, Failure):
                    verdict = self._failures.judge(item, outcome)
                    if isinstance(verdict, float):
                        time.sleep(verdict)
                        continue
                    outcome = verdict
                if outcome is not None:
                    return self._settle_here(item, outcome)
                item.was_busy = True

    def _run_claimed(self, lease: Lease, source_id: bytes, call: Call) -> Settled | None:
        """Run and settle a call that was claimed; None: its lease was lost."""
        session = Session.get(self._config)
        func, args, kwargs = call
        lease.start()
        try:
            wrapped = ClaimedCall(func, source_id, lease.grant, self._task_options)
            ran = wrapped(*args, **kwargs)
            outcome = settle_ran(session, [(lease, ran)])[0]
        except BaseException:
            session.release([lease])
            raise
        if outcome.error is not None:
            return Failure(outcome.error, ran.error_text)
        if not outcome.is_completed or outcome.value is None:
            return None
        value, run_s = outcome.value
        return Value(value, run_s=run_s)

    def _settle_here(self, item: _CallHere, outcome: Settled) -> Any:
        """Count a call's end; give what stands in its place, or raise."""
        self._begin().note(item.key, outcome, was_busy=item.was_busy, source_id=item.source_id)
        if isinstance(outcome, Failure):
            # What was raised in this thread has its traceback; a stored one is only a text.
            raise outcome.error if outcome.error.__traceback__ else outcome.with_cause()
        return outcome.value if isinstance(outcome, Value) else outcome


@dataclasses.dataclass
class _CallHere:
    """What is remembered of a call that runs in this thread."""

    key: bytes
    source_id: bytes
    was_busy: bool = False
    tries: int = 0
    last_failure: Failure | None = None


def _await_pickup(inner: Any) -> None:
    """Wait a moment until loky has taken up what it was given.

    Killed before that, its manager thread looks for a batch that is gone, and ends with a KeyError.
    """
    given = getattr(getattr(inner, "_workers", None), "_work_ids", None)
    end_s = time.monotonic() + _PICKUP_S
    while isinstance(given, queue.Queue) and not given.empty() and time.monotonic() < end_s:
        time.sleep(_PICKUP_LOOK_S)


def _forget_leftovers(parallel: Any) -> None:
    """Drop batches that an aborted call left behind: joblib would run them in the next one."""
    left = getattr(parallel, "_ready_batches", None)
    while isinstance(left, queue.Queue):
        try:
            left.get(block=False)
        except queue.Empty:
            return


class _Lazily:
    """An iterable of calls as calls of `run`, with the length of the original where it has one."""

    def __init__(self, iterable: Iterable[Call], run: Callable[[Call], Any]) -> None:
        self._iterable = iterable
        self._run = run

    def __iter__(self) -> Iterator[tuple[Callable[[Call], Any], tuple[Call], dict[str, Any]]]:
        return ((self._run, (call,), {}) for call in self._iterable)
