"""The network between workers and server: it loses, delays, repeats, reorders and divides."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar, cast

from google.protobuf.message import Message

from run_once.channel import TransportError
from tests.simulation.observed import n_keys
from tests.simulation.schedule import MS, S

if TYPE_CHECKING:
    from tests.simulation.worker import Worker
    from tests.simulation.world import World

ReplyT = TypeVar("ReplyT", bound=Message)

_DELAYS_MS: Final = (0, 0, 1, 1, 1, 2, 2, 3, 5, 8, 13, 40)
_SLOW_MS: Final = (100, 400, 900, 1_500, 2_500)
_LATE_MS: Final = (1, 5, 50, 500, 1_500, 4_000, 9_000)


class Faults(NamedTuple):
    """How often what goes wrong, each from 0 to 1."""

    lost_request: float
    lost_reply: float
    repeated: float
    slow: float
    interrupt: float


NO_FAULTS: Final = Faults(0, 0, 0, 0, 0)


class Outcome:
    """What the caller gets, once it is there; of a repeated request nobody waits for that."""

    def __init__(self, *, is_awaited: bool = True) -> None:
        self.is_awaited = is_awaited
        self.reply: Message | None = None
        self.error: TransportError | None = None

    def take(self, end: Message | TransportError) -> None:
        """Take the first reply or error."""
        if self.reply is None and self.error is None:
            if isinstance(end, Message):
                self.reply = end
            else:
                self.error = end

    def is_over(self) -> bool:
        """Tell whether there is one."""
        return self.reply is not None or self.error is not None


class SimTransport:
    """One worker's way to whatever server lives."""

    address = "simulated"

    def __init__(self, world: World, worker: Worker) -> None:
        self._world = world
        self._worker = worker
        self._counted: deque[Message] = deque(maxlen=4)

    def call(
        self, method: str, request: Message, reply_type: type[ReplyT], timeout_s: float
    ) -> ReplyT:
        """Send a request, and let the others go on until there is an answer or time is up."""
        world, worker = self._world, self._worker
        worker.check_alive()
        self._count(request)
        outcome = Outcome()
        raw = request.SerializeToString()
        arrive = partial(self._arrive, method, type(request), raw)
        rng = world.rng
        if rng.random() < world.faults.repeated:
            nobody = Outcome(is_awaited=False)
            world.schedule.at(rng.choice(_LATE_MS) * MS, partial(arrive, nobody))
        if rng.random() >= world.faults.lost_request and not worker.is_cut_off():
            world.schedule.at(self._delay_ns(), partial(arrive, outcome))
        world.schedule.wait(
            lambda: outcome.is_over() or worker.is_dead, worker.clock.real_ns(int(timeout_s * S))
        )
        worker.check_alive()
        worker.sit_out_pause()
        worker.maybe_interrupt()
        if outcome.error is not None:
            if outcome.error.code not in {"UNAVAILABLE", "ABORTED"}:
                world.broken("I0", f"{method} was refused: {outcome.error}")
            raise outcome.error
        if outcome.reply is None:
            raise TransportError("DEADLINE_EXCEEDED", "no reply in time")
        return cast("ReplyT", outcome.reply)

    def close(self) -> None:
        """Nothing to close."""

    def _count(self, request: Message) -> None:
        """Count what is asked of each key, once: a retry sends the same message."""
        if not any(request is one for one in self._counted):
            self._counted.append(request)
            self._world.n_commands += n_keys(request)

    def _arrive(
        self, method: str, request_type: type[Message], raw: bytes, outcome: Outcome
    ) -> None:
        """Let a request reach the server's machine."""
        server = self._world.server
        leave = partial(self._leave, outcome)
        if server is None:
            leave(TransportError("UNAVAILABLE", "nobody listens"))
        else:
            server.deliver(method, request_type.FromString(raw), leave)

    def _leave(self, outcome: Outcome, end: Message | TransportError) -> None:
        """Let a reply leave the server's machine."""
        world = self._world
        counts = outcome.is_awaited and isinstance(end, Message)
        is_lost = world.rng.random() < world.faults.lost_reply or self._worker.is_cut_off()
        if is_lost or (counts and world.misses(world.n_lost_replies)):
            world.n_lost_replies += counts
            return
        world.schedule.at(self._delay_ns(), partial(outcome.take, end))

    def _delay_ns(self) -> int:
        """Draw how long a message takes; those sent later may come earlier."""
        rng = self._world.rng
        is_slow = rng.random() < self._world.faults.slow
        return rng.choice(_SLOW_MS if is_slow else _DELAYS_MS) * MS
