"""One life of the server's process: the real service over the real table, stepped by events."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar, cast

from google.protobuf.message import Message

from distlock_proto import lock_table_pb2 as pb
from distlock_server.calls import Calls
from distlock_server.group import Group
from distlock_server.pending import Pending, Rank, Watch
from distlock_server.service import LockTableService
from distlock_server.status import Activity
from distlock_server.table import Table
from distlock_server.waits import Waits
from run_once.channel import TransportError
from tests.simulation.disk import CrashError, SimEngine
from tests.simulation.event_loop import SimLoop
from tests.simulation.schedule import MS

if TYPE_CHECKING:
    from tests.simulation.world import World

T = TypeVar("T")

MIN_BLOCK_KEYS: Final = 3
MIN_SPAN_KEYS: Final = 2
"""Lists are short here, and so are their blocks, and what is granted together."""


class SimTable(Table):
    """The table; it says when something was queued."""

    on_submit: Callable[[Pending[Any]], None]

    def submit(
        self,
        keys: Sequence[bytes],
        run: Callable[[Group], T],
        context: object = None,
        *,
        rank: Rank = Rank.OTHER,
    ) -> Pending[T]:
        """Queue a request."""
        pending = super().submit(keys, run, context, rank=rank)
        self.on_submit(pending)
        return pending


class Context:
    """What a handler knows of its gRPC call."""

    async def abort(self, code: Any, text: str) -> NoReturn:
        """End the call with a status."""
        raise TransportError(code.name, text)


class Flight:
    """A request inside of a server.

    Attributes:
        request: What was asked.
        arrived_ns: When it arrived.
        revision: The store revision at that time.
    """

    def __init__(
        self,
        server: SimServer,
        method: str,
        request: Message,
        on_end: Callable[[Message | TransportError], None],
    ) -> None:
        self.method = method
        self.request = request
        self.arrived_ns = server.world.schedule.now_ns
        self.revision = server.table.revision
        self._server = server
        self._on_end = on_end
        handler = getattr(server.service, method)(request, Context())
        self._handler: Coroutine[Any, Any, Message] | None = handler

    def drive(self) -> bool:
        """Let the handler go on; tell whether it is still at work."""
        if self._handler is None:
            return False
        end: Message | TransportError
        asyncio._set_running_loop(cast("asyncio.AbstractEventLoop", self._server.loop))
        try:
            self._handler.send(None)
        except StopIteration as stop:
            end = stop.value
        except TransportError as error:
            end = error
        else:
            return True
        finally:
            asyncio._set_running_loop(None)
        self._handler = None
        if isinstance(end, Message):
            self._server.world.take_reply(self, end, self._server.ran_ns)
        self._on_end(end)
        return False

    def drop(self) -> None:
        """Forget the request: its server is gone."""
        if self._handler is not None:
            self._handler.close()
            self._handler = None
            self._on_end(TransportError("UNAVAILABLE", "the server ended"))


class SimServer:
    """One life of the server's process; also its table's `Notify`.

    Attributes:
        table: The real table.
        ran_ns: Real time at which the group that was answered last was run.
        unanswered: What is in the table and has no answer yet.
        is_dead: The process is gone.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.is_dead = False
        self.ran_ns = world.schedule.now_ns
        self.unanswered: dict[int, Pending[Any]] = {}
        self._flights: list[Flight] = []
        self._is_stepping = False
        self._is_due = False
        engine = SimEngine(world.disk, world.schedule, world.rng, lambda: self.is_dead)
        self.table = SimTable(engine, world.server_clock, self)
        self.table.on_submit = self._queued
        self.table.store.done_blocks.min_keys = MIN_BLOCK_KEYS
        self.table.store.held_index.min_keys = MIN_SPAN_KEYS
        engine.is_open = True
        self.wake()
        self.loop = SimLoop(world.schedule, self._drive)
        self._engine = engine
        self._waits = Waits(self.table)
        self.service = LockTableService(
            self.table,
            Calls(self.table),
            self._waits,
            cast("Any", None),
            world.server_clock,
            cast("Any", None),
            cast("Any", None),
            Activity(),
        )

    def deliver(
        self, method: str, request: Message, on_end: Callable[[Message | TransportError], None]
    ) -> None:
        """Let a request arrive."""
        if isinstance(request, pb.RenewRequest):
            self.world.promises.take_arrival(request)
        flight = Flight(self, method, request, on_end)
        if flight.drive():
            self._flights.append(flight)

    def _queued(self, pending: Pending[Any]) -> None:
        """Note a request of the table; the committer comes round soon."""
        self.unanswered[id(pending)] = pending
        self.wake()

    def wake(self) -> None:
        """Plan the committer's next turn."""
        if not self._is_due:
            self._is_due = True
            self.world.schedule.at(self.world.rng.choice((0, 0, 1, 3)) * MS, self._step)

    def _step(self) -> None:
        """Be the committer for one group."""
        self._is_due = False
        if self.is_dead or self._is_stepping:
            return  # a step that is under way wakes again when it ends
        self._is_stepping = True
        self.ran_ns = self.world.schedule.now_ns
        try:
            self.table.step_once()
        except CrashError:
            return
        finally:
            self._is_stepping = False
        if self.table._queue or not self.table.store.is_counted:
            self.wake()

    def stop(self, *, is_clean: bool) -> list[tuple[str, Message]]:
        """End the process.

        Returns:
            The requests that get no answer.
        """
        if is_clean:
            self._waits.close()
            self._drive()
            self._engine.is_open = False
            self.table.close()
        self.is_dead = True
        left = [(flight.method, flight.request) for flight in self._flights]
        for flight in self._flights:
            flight.drop()
        self._flights = []
        return left

    @property
    def is_stepping(self) -> bool:
        """Whether a group is run or written just now."""
        return self._is_stepping

    # -- what the table tells ---------------------------------------------------------------------

    def answered(self, answered: Sequence[Pending[Any]]) -> None:
        """Hand out answers, and let replies leave at once."""
        if self.is_dead:
            return
        for pending in answered:
            self.unanswered.pop(id(pending), None)
            cast("Callable[[object], None]", pending.context)(pending)
            # One by one: replies leave in the order in which the table ran their requests.
            self._drive()

    def _drive(self) -> None:
        """Let handlers go on that can."""
        if not self.is_dead:
            self._flights = [flight for flight in self._flights if flight.drive()]

    def changed(self, watches: Sequence[Watch]) -> None:
        """Wake those who wait."""
        for watch in watches:
            cast("Callable[[Watch], None]", watch.context)(watch)
        self._drive()

    def died(self, error: BaseException) -> None:
        """Not called: there is no committer's thread."""
