"""`distlock.LockManagerService`: the contract of 2021 over our table; see `legacy_batch.py`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Final, TypeAlias, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from distlock_proto import legacy_pb2 as pb
from distlock_proto import legacy_pb2_grpc as pb_grpc
from distlock_server import legacy_batch as steps
from distlock_server.calls import Calls
from distlock_server.clock import Clock
from distlock_server.legacy_batch import Acquire, Filter, LockPage, Moment
from distlock_server.limits import RequestError, check_range
from distlock_server.status import Activity, guarded
from distlock_server.table import Table, Txn

T = TypeVar("T")

_KEYS_PER_STEP: Final = 5_000
"""Keys of one AcquireMany that are handled before other requests get their turn."""

_PIECE: Final = 1_000
"""Records read at once for a list."""

_Step: TypeAlias = tuple[list[bytes], Callable[[Txn], pb.AnyResponse]]
"""One step of a batch: its keys, and what it does."""


class LegacyService(pb_grpc.LockManagerServiceServicer):
    """The seven methods of 2021."""

    def __init__(
        self, table: Table, calls: Calls, clock: Clock, executor: Executor, activity: Activity
    ) -> None:
        """Serve a table.

        Args:
            table: The table.
            calls: Carries requests to it.
            clock: The table's clock.
            executor: Runs what reads much, off the event loop.
            activity: Counts requests.
        """
        self._table = table
        self._calls = calls
        self._clock = clock
        self._executor = executor
        self.activity = activity

    @guarded
    async def AcquireLock(self, request: pb.AcquireLockRequest) -> pb.AcquireLockResponse:
        """Take one lock if it is free, or whatever its state."""
        timer = _Timer()
        (wanted,) = steps.parse_acquires([request])
        response = await self._calls.run([wanted.key], partial(_acquire_step, wanted=wanted))
        response.elapsed.CopyFrom(timer.elapsed())
        return response

    @guarded
    async def AcquireMany(self, request: pb.AcquireManyRequest) -> pb.AcquireManyResponse:
        """Take several locks in order, up to a limit."""
        wanted = []
        for piece in _pieces(request.requests):
            wanted += steps.parse_acquires(piece)
            await asyncio.sleep(0)
        return await self._acquire_many(wanted, request.max_acquired_locks)

    async def _acquire_many(self, wanted: Sequence[Acquire], limit: int) -> pb.AcquireManyResponse:
        response = pb.AcquireManyResponse()
        n_acquired = 0
        for piece in _pieces(wanted):
            left = limit - n_acquired if limit else None
            keys = [one.key for one in piece]
            step = partial(_acquire_many_step, wanted=piece, limit=left)
            answers = await self._calls.run(keys, step)
            response.MergeFrom(answers)
            n_acquired += sum(answer.HasField("acquired_lock") for answer in answers.responses)
            if limit and n_acquired >= limit:
                break
        return response

    @guarded
    async def ReleaseLock(self, request: pb.ReleaseLockRequest) -> pb.ReleaseLockResponse:
        """Remove one lock, whatever its state."""
        timer = _Timer()
        key = steps.parse_key(request.lock)
        step = partial(_release_step, key=key, wants_lock=request.return_released_lock)
        response = await self._calls.run([key], step)
        response.elapsed.CopyFrom(timer.elapsed())
        return response

    @guarded
    async def ProcessBatch(self, request: pb.ProcessBatchRequest) -> pb.ProcessBatchResponse:
        """Run several steps in order; synchronized: as one transaction."""
        timer = _Timer()
        batch = [self._parse_step(one, at) for at, one in enumerate(request.requests)]
        if request.is_synchronized:
            keys = list(dict.fromkeys(key for step_keys, _ in batch for key in step_keys))
            responses = await self._calls.run(keys, lambda txn: [run(txn) for _, run in batch])
        else:
            responses = [await self._calls.run(keys, run) for keys, run in batch]
        return pb.ProcessBatchResponse(responses=responses, elapsed=timer.elapsed())

    @guarded
    async def ListLocks(self, request: pb.ListLocksRequest) -> pb.ListLocksResponse:
        """List locks in a range of keys."""
        timer = _Timer()
        start, end = _parse_range(request)
        page = LockPage(Filter(request))
        await self._off_loop(partial(self._fill, page, start, end))
        return pb.ListLocksResponse(locks=page.locks, elapsed=timer.elapsed())

    def _fill(self, page: LockPage, start: bytes, end: bytes) -> None:
        while True:
            read = self._table.store.list_page(start, end, _PIECE)
            moment = Moment(self._clock.now_ns(), self._clock.wall_ns())
            if not page.add(read.records, moment) or not read.next_start:
                return
            start = read.next_start

    @guarded
    async def CountLocks(self, request: pb.CountLocksRequest) -> pb.CountLocksResponse:
        """Count locks in a range of keys."""
        timer = _Timer()
        start, end = _parse_range(request)
        counts = await self._off_loop(partial(self._table.store.count_range, start, end))
        return pb.CountLocksResponse(
            expired=counts.expired,
            unexpired=counts.held,
            no_expiration=counts.done,
            elapsed=timer.elapsed(),
        )

    @guarded
    async def GetCurrentServerTime(
        self, request: pb.GetCurrentServerTimeRequest
    ) -> pb.GetCurrentServerTimeResponse:
        """Tell the server's wall time."""
        del request  # has no fields
        return pb.GetCurrentServerTimeResponse(server_time=steps.timestamp(self._clock.wall_ns()))

    def _parse_step(self, request: pb.AnyRequest, at: int) -> _Step:
        """Check one step of a batch and give what it does."""
        kind = request.WhichOneof("request")
        if kind == "acquire_lock_request":
            (wanted,) = steps.parse_acquires([request.acquire_lock_request])
            return [wanted.key], _timed(partial(_acquire_step, wanted=wanted), "acquire_lock")
        if kind == "acquire_many_request":
            many = request.acquire_many_request
            all_wanted = steps.parse_acquires(many.requests)
            run = partial(
                _acquire_many_step, wanted=all_wanted, limit=many.max_acquired_locks or None
            )
            return [one.key for one in all_wanted], _timed(run, "acquire_many")
        if kind == "release_lock_request":
            release = request.release_lock_request
            key = steps.parse_key(release.lock)
            wants_lock = release.return_released_lock
            return [key], _timed(
                partial(_release_step, key=key, wants_lock=wants_lock), "release_lock"
            )
        if kind == "list_locks_request":
            start, end = _parse_range(request.list_locks_request)
            locks = Filter(request.list_locks_request)
            return [], _timed(partial(_list_step, start=start, end=end, locks=locks), "list_locks")
        if kind == "get_current_server_time_request":
            return [], _timed(_time_step, "get_current_server_time")
        raise RequestError(f"requests: the one at place {at} is empty")

    async def _off_loop(self, read: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, read)


# -- steps, run in the committer -----------------------------------------------------------------


def _acquire_step(txn: Txn, wanted: Acquire) -> pb.AcquireLockResponse:
    answer = steps.acquire(txn, wanted)
    return steps.acquire_response(wanted.key, answer, Moment(txn.now_ns, txn.wall_ns))


def _acquire_many_step(
    txn: Txn, wanted: Sequence[Acquire], limit: int | None
) -> pb.AcquireManyResponse:
    timer = _Timer()
    moment = Moment(txn.now_ns, txn.wall_ns)
    # Short if stopped early, as is the response.
    answers = list(zip(wanted, steps.acquire_many(txn, wanted, limit), strict=False))
    responses = [steps.acquire_response(one.key, answer, moment) for one, answer in answers]
    elapsed = timer.elapsed(share=len(responses))
    for response in responses:
        response.elapsed.CopyFrom(elapsed)
    return pb.AcquireManyResponse(responses=responses)


def _release_step(txn: Txn, key: bytes, wants_lock: bool) -> pb.ReleaseLockResponse:
    before = steps.release(txn, key)
    moment = Moment(txn.now_ns, txn.wall_ns)
    return pb.ReleaseLockResponse(
        released_lock=steps.lock_message(key, before, moment) if wants_lock else None
    )


def _list_step(txn: Txn, start: bytes, end: bytes, locks: Filter) -> pb.ListLocksResponse:
    page = LockPage(locks)
    moment = Moment(txn.now_ns, txn.wall_ns)
    while True:
        records = txn.scan(start, end, _PIECE)
        if not page.add(records, moment) or len(records) < _PIECE:
            return pb.ListLocksResponse(locks=page.locks)
        start = records[-1][0] + b"\x00"


def _time_step(txn: Txn) -> pb.GetCurrentServerTimeResponse:
    return pb.GetCurrentServerTimeResponse(server_time=steps.timestamp(txn.wall_ns))


def _timed(run: Callable[[Txn], Message], name: str) -> Callable[[Txn], pb.AnyResponse]:
    """Give a step that answers in an AnyResponse, with its time where the message has a place."""

    def timed(txn: Txn) -> pb.AnyResponse:
        timer = _Timer()
        response = run(txn)
        if isinstance(
            response, (pb.AcquireLockResponse, pb.ReleaseLockResponse, pb.ListLocksResponse)
        ):
            response.elapsed.CopyFrom(timer.elapsed())
        answer = pb.AnyResponse()
        getattr(answer, f"{name}_response").CopyFrom(response)
        return answer

    return timed


class _Timer:
    """How long a call takes, for display."""

    def __init__(self) -> None:
        self._started_ns = time.perf_counter_ns()

    def elapsed(self, share: int = 1) -> Duration:
        """Give the time since it was made, or the share of it of one of so many."""
        return steps.duration((time.perf_counter_ns() - self._started_ns) // max(share, 1))


def _parse_range(request: pb.ListLocksRequest | pb.CountLocksRequest) -> tuple[bytes, bytes]:
    start, end = request.start_key.encode(), request.end_key.encode()
    check_range(start, end)
    return start, end


def _pieces(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for first in range(0, len(items), _KEYS_PER_STEP):
        yield items[first : first + _KEYS_PER_STEP]
