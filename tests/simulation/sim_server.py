"""One life of a simulated server, and the bad network in front of it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from google.protobuf.message import Message

from distlock_server.calls import Calls
from distlock_server.engines.base import Meta, Swap
from distlock_server.engines.memory import MemoryEngine
from distlock_server.group import Group
from distlock_server.pending import Pending, Watch
from distlock_server.service import LockTableService
from distlock_server.status import Activity
from distlock_server.table import Table
from run_once.channel import TransportError

if TYPE_CHECKING:
    from tests.simulation.table_world import World

T = TypeVar("T")
ReplyT = TypeVar("ReplyT", bound=Message)


class BrokenPromiseError(AssertionError):
    """What must never happen, happened."""


class CrashError(Exception):
    """The server's process is gone."""


class Pause:
    """What a handler awaits instead of the event loop."""

    def __await__(self) -> Generator[None, None, None]:
        yield


class SteppedCalls:
    """Stands where `Calls` does; the answer is there once the table was stepped."""

    def __init__(self, table: Table) -> None:
        self._table = table

    async def run(self, keys: Sequence[bytes], run: Callable[[Group], T]) -> T:
        """Queue a function and wait for its answer."""
        answers: list[Pending[T]] = []
        self._table.submit(keys, run, answers.append)
        while not answers:
            await Pause()
        return answers[0].result()


class Context:
    """What a handler knows of its gRPC call."""

    async def abort(self, code: Any, text: str) -> NoReturn:
        """End the call with a status."""
        raise TransportError(code.name, text)


class Flight:
    """A request inside of a server."""

    def __init__(self, server: SimServer, handler: Coroutine[Any, Any, Message]) -> None:
        self.server = server
        self.reply: Message | None = None
        self.error: TransportError | None = None
        self._handler = handler

    @property
    def is_over(self) -> bool:
        """Whether there is an answer."""
        return self.reply is not None or self.error is not None

    def drive(self) -> None:
        """Let the handler go on; a reply must rest on what is durable."""
        if self.is_over:
            return
        try:
            self._handler.send(None)
        except StopIteration as end:
            self.reply = end.value
            self.server.check_reply(end.value)
        except TransportError as error:
            self.error = error


class SimEngine(MemoryEngine):
    """Memory that may lose its process around each commit."""

    def __init__(self, world: World) -> None:
        super().__init__(world.store)
        self._world = world

    def commit(self, swaps: Sequence[Swap], meta: Meta) -> Any:
        """Commit, or crash before or behind it; meanwhile others go on."""
        if not self._world.is_stepping:  # the server starts or ends
            return super().commit(swaps, meta)
        self._world.while_committing()
        answers = super().commit(swaps, meta)
        self._world.may_crash(0.02)
        return answers


class SimServer:
    """One life of the server's process; also its table's `Notify`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._flights: list[Flight] = []
        self.table = Table(SimEngine(world), world.clock, self)
        self._service = LockTableService(
            self.table,
            cast("Calls", SteppedCalls(self.table)),
            cast("Any", None),
            cast("Any", None),
            world.clock,
            cast("Any", None),
            cast("Any", None),
            Activity(),
        )

    def deliver(self, method: str, request: Message) -> Flight:
        """Let a request arrive."""
        copy = type(request).FromString(request.SerializeToString())
        flight = Flight(self, getattr(self._service, method)(copy, Context()))
        self._flights.append(flight)
        flight.drive()
        return flight

    def answered(self, answered: Sequence[Pending[Any]]) -> None:
        """Hand out answers, and let replies leave at once."""
        for pending in answered:
            cast("Callable[[object], None]", pending.context)(pending)
        for flight in self._flights:
            flight.drive()
        self._flights = [flight for flight in self._flights if not flight.is_over]

    def changed(self, watches: Sequence[Watch]) -> None:
        """Nobody waits here."""

    def died(self, error: BaseException) -> None:
        """Not called: there is no committer's thread."""

    def check_reply(self, reply: Any) -> None:
        """Check that a reply does not tell of what a crash would undo."""
        if reply.revision > self._world.durable_revision():
            raise BrokenPromiseError(f"a reply left before its commit: {reply}")


class SimTransport:
    """The way to whatever server lives."""

    address = "simulated"

    def __init__(self, world: World) -> None:
        self._world = world

    def call(
        self, method: str, request: Message, reply_type: type[ReplyT], timeout_s: float
    ) -> ReplyT:
        """Send a request, or lose it, or its reply."""
        world, rng = self._world, self._world.rng
        world.pass_time(rng.expovariate(20))
        if rng.random() < 0.06:
            world.pass_time(timeout_s)
            raise TransportError("DEADLINE_EXCEEDED", "the request was lost")
        if rng.random() < 0.06:
            world.late.append((method, request))
        flight = world.server.deliver(method, request)
        while not flight.is_over:
            world.interlude()
            if world.server is not flight.server:
                raise TransportError("UNAVAILABLE", "the server crashed")
            if world.is_committing or rng.random() < 0.03:
                world.pass_time(timeout_s if not world.is_committing else 0.0)
                raise TransportError("DEADLINE_EXCEEDED", "no reply in time")
            world.step_table()
        if flight.error is not None:
            if flight.error.code not in {"UNAVAILABLE", "ABORTED"}:
                raise BrokenPromiseError(f"{method} was refused: {flight.error}")
            raise flight.error
        world.pass_time(rng.expovariate(20))
        if rng.random() < 0.08:
            raise TransportError("UNAVAILABLE", "the reply was lost")
        return cast("ReplyT", flight.reply)

    def close(self) -> None:
        """Nothing to close."""
