"""Both services over a table in memory, in one thread: a request's bytes in, its status out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import grpc

from distlock_server.blobs import BlobStore
from distlock_server.calls import Calls, LoopNotify
from distlock_server.clock import ManualClock
from distlock_server.engines.memory import MemoryEngine
from distlock_server.group import Group
from distlock_server.legacy_service import LegacyService
from distlock_server.limits import RequestError
from distlock_server.pending import Pending, Rank
from distlock_server.results import Results
from distlock_server.service import LockTableService
from distlock_server.status import Activity, status_of
from distlock_server.table import Table
from distlock_server.waits import Waits
from distlock_server.wire import parse_request
from tests.hostile.methods import LEGACY, LOCK_TABLE, Method

T = TypeVar("T")
METHODS = [*LOCK_TABLE, *LEGACY]


class Answer(NamedTuple):
    """What a request was answered with: the reply, or why there is none."""

    code: grpc.StatusCode
    reply: Any = None
    text: str = ""


class AbortedError(Exception):
    """A call ended with a status."""


class _Context:
    async def abort(self, code: grpc.StatusCode, text: str) -> NoReturn:
        raise AbortedError(code, text)


class _Now(Executor):
    """Runs what it is given at once."""

    def submit(self, work: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        done: Future[T] = Future()
        try:
            done.set_result(work(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 (whatever it is, the caller gets it)
            done.set_exception(error)
        return done


class _SteppedTable(Table):
    """A table that runs each request as soon as the loop is free."""

    loop: asyncio.AbstractEventLoop

    def submit(
        self,
        keys: Sequence[bytes],
        run: Callable[[Group], T],
        context: object = None,
        *,
        rank: Rank = Rank.OTHER,
    ) -> Pending[T]:
        pending = super().submit(keys, run, context, rank=rank)
        self.loop.call_soon(self.step_once)
        return pending


def _raise(error: BaseException) -> None:
    raise error


class Inside:
    """The services."""

    def __init__(self, folder: Path) -> None:
        """Make them; large values go to the folder."""
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(self._failed)
        self._failures: list[str] = []
        self._folder = folder
        self.renew()

    def renew(self) -> None:
        """Start with an empty table."""
        clock, activity, now = ManualClock(), Activity(), _Now()
        self.table = table = _SteppedTable(MemoryEngine(), clock, LoopNotify(self.loop, _raise))
        table.loop = self.loop
        calls, waits = Calls(table), Waits(table)
        waits.close()  # nobody waits for the time to pass: a wait answers with what it sees
        results = Results(BlobStore(self._folder), calls, now)
        service = LockTableService(table, calls, waits, results, clock, now, now, activity)
        legacy = LegacyService(table, calls, clock, now, activity)
        self._services: list[tuple[list[Method], Any]] = [(LOCK_TABLE, service), (LEGACY, legacy)]

    def call(self, method: Method, raw: bytes) -> Answer:
        """Send the bytes of a request.

        Raises:
            AssertionError: It would have ended the committer, and the server with it.
        """
        answer = self.loop.run_until_complete(self._call(method, raw))
        assert not self._failures, self._failures
        return answer

    def _failed(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._failures.append(f"{context['message']}: {context.get('exception')!r}")

    async def _call(self, method: Method, raw: bytes) -> Answer:
        service: Any = next(one for methods, one in self._services if method in methods)
        try:
            request = await parse_request(raw, method.request)
            reply = await getattr(service, method.name)(request, _Context())
        except RequestError as error:
            code, text = status_of(error)
            return Answer(code, text=text)
        except AbortedError as error:
            code, text = error.args
            return Answer(code, text=text)
        return Answer(grpc.StatusCode.OK, reply)

    def close(self) -> None:
        """End the loop."""
        self.loop.close()
