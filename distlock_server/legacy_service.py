"""`distlock.LockManagerService`: the contract of 2021 over our table; see `legacy_batch.py`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Final, NamedTuple, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from distlock_proto import legacy_pb2 as pb
from distlock_proto import legacy_pb2_grpc as pb_grpc
from distlock_server import legacy_batch as steps
from distlock_server.calls import Calls
from distlock_server.clock import Clock
from distlock_server.legacy_batch import Acquire, Filter, LockPage, Moment
from distlock_server.limits import (
    MAX_LEGACY_BYTES,
    MAX_SYNCHRONIZED_READS,
    RequestError,
    check_count,
    check_range,
)
from distlock_server.messages import Room
from distlock_server.status import Activity, guarded
from distlock_server.table import Table, Txn
from distlock_server.turns import next_turn

T = TypeVar("T")

_KEYS_PER_STEP: Final = 500
"""Keys of one AcquireMany that are handled before other requests get their turn."""


class _Step(NamedTuple):
    """One step of a batch.

    Attributes:
        name: Of its field in the response, without `_response`.
        keys: The keys that it touches.
        run: What it does within a transaction.
        alone: What it does by itself; None: the same.
    """

    name: str
    keys: list[bytes]
    run: Callable[[Txn, _Room], Message]
    alone: Callable[[Room], Awaitable[Message]] | None = None


class _Room(Room):
    """What a synchronized batch may still answer, and read for its lists."""

    def __init__(self) -> None:
        super().__init__()
        self._left_to_read = MAX_SYNCHRONIZED_READS

    def read(self, n_reads: int) -> None:
        """Count what a list looked at.

        Raises:
            RequestError: It was too much: nothing else runs meanwhile.
        """
        self._left_to_read -= n_reads
        if self._left_to_read < 0:
            raise RequestError(
                "list_locks_request: the synchronized batch would look at more than "
                f"{MAX_SYNCHRONIZED_READS} locks and patterns; ask by ListLocks"
            )


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
        step = partial(_acquire_step, room=Room(MAX_LEGACY_BYTES), wanted=wanted)
        response = await self._calls.run([wanted.key], step)
        response.elapsed.CopyFrom(timer.elapsed())
        return response

    @guarded
    async def AcquireMany(self, request: pb.AcquireManyRequest) -> pb.AcquireManyResponse:
        """Take several locks in order, up to a limit."""
        wanted = await _parse_acquires(request.requests)
        return await self._acquire_many(Room(), wanted, request.max_acquired_locks)

    async def _acquire_many(
        self, room: Room, wanted: Sequence[Acquire], limit: int
    ) -> pb.AcquireManyResponse:
        response = pb.AcquireManyResponse()
        n_acquired = 0
        for piece in _pieces(wanted):
            left = limit - n_acquired if limit else None
            keys = [one.key for one in piece]
            step = partial(_acquire_many_step, room=room, wanted=piece, limit=left)
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
        step = partial(
            _release_step,
            room=Room(MAX_LEGACY_BYTES),
            key=key,
            wants_lock=request.return_released_lock,
        )
        response = await self._calls.run([key], step)
        response.elapsed.CopyFrom(timer.elapsed())
        return response

    @guarded
    async def ProcessBatch(self, request: pb.ProcessBatchRequest) -> pb.ProcessBatchResponse:
        """Run several steps in order; synchronized: as one transaction."""
        timer = _Timer()
        check_count(len(request.requests), "requests")
        batch = [await self._parse_step(one, at) for at, one in enumerate(request.requests)]
        if request.is_synchronized:
            keys = list(dict.fromkeys(key for step in batch for key in step.keys))
            check_count(sum(len(step.keys) for step in batch), "keys of the synchronized requests")
            responses = await self._calls.run(keys, partial(_run_all, batch=batch))
            await next_turn()
        else:
            room = _Room()
            responses = [await self._run_alone(step, room) for step in batch]
        return pb.ProcessBatchResponse(responses=responses, elapsed=timer.elapsed())

    async def _run_alone(self, step: _Step, room: _Room) -> pb.AnyResponse:
        timer = _Timer()
        if step.alone is None:
            response = await self._calls.run(step.keys, lambda txn: step.run(txn, room))
        else:
            response = await step.alone(room)
        return _any_response(step.name, response, timer)

    @guarded
    async def ListLocks(self, request: pb.ListLocksRequest) -> pb.ListLocksResponse:
        """List locks in a range of keys."""
        timer = _Timer()
        start, end = _parse_range(request)
        steps.check_patterns(request)
        response = await self._list(Room(), request, start, end)
        response.elapsed.CopyFrom(timer.elapsed())
        return response

    async def _list(
        self, room: Room, request: pb.ListLocksRequest, start: bytes, end: bytes
    ) -> pb.ListLocksResponse:
        """List piece by piece: others that scan get their turns, and nobody's list ends."""
        locks = await self._off_loop(partial(Filter, request))
        page = LockPage(locks, room)
        next_start: bytes | None = start
        while next_start is not None:
            next_start = await self._off_loop(partial(self._fill, page, locks, next_start, end))
        return pb.ListLocksResponse(locks=page.locks)

    def _fill(self, page: LockPage, locks: Filter, start: bytes, end: bytes) -> bytes | None:
        """Add a piece to a page; give where the next one starts."""
        read = self._table.store.list_page(start, end, locks.piece)
        moment = Moment(self._clock.now_ns(), self._clock.wall_ns())
        return read.next_start or None if page.add(read.records, moment) else None

    @guarded
    async def CountLocks(self, request: pb.CountLocksRequest) -> pb.CountLocksResponse:
        """Count locks in a range of keys."""
        timer = _Timer()
        start, end = _parse_range(request)
        count_piece = self._table.store.count_piece
        counts, next_start = await self._off_loop(partial(count_piece, start, end))
        while next_start:
            more, next_start = await self._off_loop(partial(count_piece, next_start, end))
            counts = counts.plus(more)
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

    async def _parse_step(self, request: pb.AnyRequest, at: int) -> _Step:
        """Check one step of a batch and give what it does."""
        if at and at % _KEYS_PER_STEP == 0:
            await next_turn()
        kind = request.WhichOneof("request")
        if kind == "acquire_lock_request":
            (wanted,) = steps.parse_acquires([request.acquire_lock_request])
            return _Step("acquire_lock", [wanted.key], partial(_acquire_step, wanted=wanted))
        if kind == "acquire_many_request":
            many = request.acquire_many_request
            all_wanted = await _parse_acquires(many.requests)
            limit = many.max_acquired_locks
            return _Step(
                "acquire_many",
                [one.key for one in all_wanted],
                partial(_acquire_many_step, wanted=all_wanted, limit=limit or None),
                partial(self._acquire_many, wanted=all_wanted, limit=limit),
            )
        if kind == "release_lock_request":
            release = request.release_lock_request
            key = steps.parse_key(release.lock)
            wants_lock = release.return_released_lock
            run = partial(_release_step, key=key, wants_lock=wants_lock)
            return _Step("release_lock", [key], run)
        if kind == "list_locks_request":
            return self._parse_list(request.list_locks_request)
        if kind == "get_current_server_time_request":
            return _Step("get_current_server_time", [], _time_step)
        raise RequestError(f"requests: the one at place {at} is empty")

    def _parse_list(self, request: pb.ListLocksRequest) -> _Step:
        start, end = _parse_range(request)
        steps.check_patterns(request)
        return _Step(
            "list_locks",
            [],
            partial(_list_step, request=request, start=start, end=end),
            partial(self._list, request=request, start=start, end=end),
        )

    async def _off_loop(self, read: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, read)


# -- steps, run in the committer -----------------------------------------------------------------


def _run_all(txn: Txn, batch: Sequence[_Step]) -> list[pb.AnyResponse]:
    """Run a synchronized batch; anew with all its room if it is run again."""
    room = _Room()
    responses = []
    for step in batch:
        timer = _Timer()
        responses.append(_any_response(step.name, step.run(txn, room), timer))
    return responses


def _acquire_step(txn: Txn, room: Room, wanted: Acquire) -> pb.AcquireLockResponse:
    answer = steps.acquire(txn, wanted)
    return steps.acquire_response(wanted.key, answer, Moment(txn.now_ns, txn.wall_ns), room)


def _acquire_many_step(
    txn: Txn, room: Room, wanted: Sequence[Acquire], limit: int | None
) -> pb.AcquireManyResponse:
    timer = _Timer()
    moment = Moment(txn.now_ns, txn.wall_ns)
    # Short if stopped early, as is the response.
    answers = list(zip(wanted, steps.acquire_many(txn, wanted, limit), strict=False))
    responses = [steps.acquire_response(one.key, answer, moment, room) for one, answer in answers]
    elapsed = timer.elapsed(share=len(responses))
    for response in responses:
        response.elapsed.CopyFrom(elapsed)
    return pb.AcquireManyResponse(responses=responses)


def _release_step(txn: Txn, room: Room, key: bytes, wants_lock: bool) -> pb.ReleaseLockResponse:
    before = steps.release(txn, key)
    moment = Moment(txn.now_ns, txn.wall_ns)
    return pb.ReleaseLockResponse(
        released_lock=steps.lock_message(key, before, moment, room) if wants_lock else None
    )


def _list_step(
    txn: Txn, room: _Room, request: pb.ListLocksRequest, start: bytes, end: bytes
) -> pb.ListLocksResponse:
    locks = Filter(request)
    page = LockPage(locks, room)
    moment = Moment(txn.now_ns, txn.wall_ns)
    while True:
        records = txn.scan(start, end, locks.piece)
        room.read((1 + len(records)) * locks.reads_per_lock)
        if not page.add(records, moment) or len(records) < locks.piece:
            return pb.ListLocksResponse(locks=page.locks)
        start = records[-1][0] + b"\x00"


def _time_step(txn: Txn, room: Room) -> pb.GetCurrentServerTimeResponse:
    del room  # needs none
    return pb.GetCurrentServerTimeResponse(server_time=steps.timestamp(txn.wall_ns))


def _any_response(name: str, response: Message, timer: _Timer) -> pb.AnyResponse:
    """Give a step's answer, with its time where the message has a place."""
    if isinstance(response, (pb.AcquireLockResponse, pb.ReleaseLockResponse, pb.ListLocksResponse)):
        response.elapsed.CopyFrom(timer.elapsed())
    answer = pb.AnyResponse()
    getattr(answer, f"{name}_response").CopyFrom(response)
    return answer


async def _parse_acquires(requests: Sequence[pb.AcquireLockRequest]) -> list[Acquire]:
    """Check requests, all of them, in turns with others."""
    wanted: list[Acquire] = []
    for piece in _pieces(requests):
        if wanted:
            await next_turn()
        wanted += steps.parse_acquires(piece)
    return wanted


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
