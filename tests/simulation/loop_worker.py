"""A worker's process that runs loops: the real loop, pass, settler, session and keeper."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

from google.protobuf.message import Message

from run_once.client import LockClient
from run_once.key_source import KeySource
from run_once.lease import LeaseKeeper
from run_once.live import LiveItem, registry
from run_once.pass_options import PassOptions
from run_once.session import Claimed, Session
from run_once.todo import Chunk
from tests.simulation.loop_promises import LoopPromises, PassWatch
from tests.simulation.loop_threads import (
    STEP_NS,
    WAKE_NS,
    MustWait,
    SimLoop,
    SimPass,
    SimSettler,
)
from tests.simulation.network import SimTransport
from tests.simulation.schedule import MS, S
from tests.simulation.server import MIN_BLOCK_KEYS
from tests.simulation.worker import Worker

if TYPE_CHECKING:
    import random

    from tests.simulation.schedule import Schedule
    from tests.simulation.world import World

ReplyT = TypeVar("ReplyT", bound=Message)

_BODIES_MS: Final = (0, 0, 1, 5, 20, 60, 200)
_OUTLIERS_MS: Final = (300, 800, 2_000, 6_000)
_TTLS_S: Final = (0.5, 1.0, 2.0, 5.0)
_MODES: Final = ("kept", "kept", "kept", "explicit", "timed", "for good")
_RETRY_MS: Final = (1, 2, 5)
_BLOCKS: Final = (4, 4, 4, 20)
_READ_MS: Final = (0, 0, 5, 30, 80)
"""What an item of a generator takes: whole blocks are read ahead of some, in pieces."""


class LoopTransport(SimTransport):
    """A worker's way to the server, which is watched."""

    def __init__(self, world: World, worker: LoopWorker) -> None:
        super().__init__(world, worker)
        self._loops = worker

    def call(
        self, method: str, request: Message, reply_type: type[ReplyT], timeout_s: float
    ) -> ReplyT:
        """Send a request."""
        self._loops.watch.take_request(request)
        reply = super().call(method, request, reply_type, timeout_s)
        self._loops.watch.take_reply(request, reply)
        return reply


class LoopSession(Session):
    """The real session; it tells what was claimed."""

    def __init__(self, client: LockClient, worker: LoopWorker) -> None:
        keeper = LeaseKeeper(client, use_thread=False)
        super().__init__(client, keeper, uses_threads=False)
        self.settler = SimSettler(worker, self.complete_all)
        self._worker = worker

    def claim(self, keys: Sequence[bytes], **options: Any) -> Claimed:
        """Claim for the pass that acts."""
        claimed = super().claim(keys, **options)
        self._worker.take_claimed(keys, claimed)
        return claimed


class LoopWorker(Worker):
    """A process that runs one loop after the other over the keys, each with options of its own.

    Attributes:
        watch: Checks what its loops do.
        is_claiming: Its main thread asks for an item.
    """

    session: Session

    def __init__(self, world: World, *arguments: Any, **options: Any) -> None:
        self.watch = LoopPromises(self)
        self.is_claiming = False
        self._passes: list[PassWatch | None] = []
        self._loop: SimLoop | None = None
        self._seen: PassWatch | None = None
        self._live: LiveItem[str] | None = None
        self._items: list[LiveItem[str]] = []
        self._is_leaving = False
        self._body_ms = 0
        self._began_ns = 0
        self._due_ns = 0
        self._next_ns = 0
        super().__init__(world, *arguments, **options)

    def make_transport(self, world: World) -> SimTransport:
        """Make its way to the server."""
        return LoopTransport(world, self)

    def make_session(self, client: LockClient) -> Session:
        """Make its session."""
        return LoopSession(client, self)

    @property
    def world(self) -> World:
        """Everything."""
        return self._world

    @property
    def rng(self) -> random.Random:
        """Draws what happens."""
        return self._rng

    @property
    def schedule(self) -> Schedule:
        """Real time."""
        return self._world.schedule

    @property
    def thread(self) -> str:
        """The thread that acts."""
        return self._threads[-1] if self._threads else ""

    @property
    def acting_pass(self) -> PassWatch | None:
        """The pass for which it acts."""
        return self._passes[-1] if self._passes else None

    def run_thread(
        self, name: str, do: Callable[[], object], seen: PassWatch | None = None
    ) -> None:
        """Let a thread act, perhaps for a pass."""
        self._passes.append(seen)
        try:
            self._run(do, name)
        finally:
            self._passes.pop()

    def wait(self, is_over: Callable[[], bool], seconds: float) -> None:
        """Let the others act until something is over, or so much of its own time has passed."""
        for_ns = self.clock.real_ns(int(seconds * S)) + STEP_NS
        self.schedule.wait(lambda: self.is_dead or is_over(), for_ns)
        self.check_alive()

    def take_claimed(self, keys: Sequence[bytes], claimed: Claimed) -> None:
        """Note what was claimed for the pass that acts."""
        self.leases = [lease for lease in self.leases if lease.is_open] + claimed.leases
        if self.is_trusted:
            for lease in claimed.leases:
                self._world.promises.note_lease(lease)
        if self.acting_pass is not None:
            self.watch.take_claimed(self.acting_pass, keys, claimed)

    # -- what happens to it -----------------------------------------------------------------------

    def kill(self) -> None:
        """End the process, wherever it is."""
        super().kill()
        for live in self._items:
            registry().remove(live)
        self._items = []

    def leave(self) -> None:
        """End the process by a signal: the loop's handler gives back what is held."""
        if self._loop is not None and self._loop.ahead is not None:
            self._loop.ahead.close()
        live = self._live
        if live is not None and live.is_kept and live.outcome is None and not self.is_dead:
            # As `release_all`, which would then wait for a settlement that is below on the stack.
            self._run(lambda: self.session.release([live.lease]), "signal")
        super().leave()

    # -- its main thread --------------------------------------------------------------------------

    def _act(self) -> None:
        """Be the main thread until it waits, or a body runs."""
        if self._world.is_enough():
            return
        self._next_ns = self._draw_pause_ns()
        self.run_thread("main", self._go_on, self._seen)
        if not self.is_dead:
            self._due_ns = self.schedule.now_ns + self._next_ns
            self.schedule.act_at(self._next_ns, self._act)

    def _go_on(self) -> None:
        if self._loop is None:
            self._begin_or_wait()
        elif self._is_leaving:
            self._leave_loop(self._loop)
        elif self._live is None or self._end_body(self._live):
            self._ask(self._loop)

    def _begin_or_wait(self) -> None:
        """Begin a pass, most often; else do what people do between two."""
        rng = self._rng
        chance = rng.random()
        if chance < 0.4:
            self._undo()
        elif chance < 0.5:
            self._wait()
        elif chance < 0.6:
            self._look_at_blocks()
        self._begin()

    def _look_at_blocks(self) -> None:
        """Ask which blocks are known to be done, and look at one."""
        starts = range(0, len(self._keys), _BLOCKS[0])
        blocks = [self._keys[start : start + _BLOCKS[0]] for start in starts]
        self._note_blocks(self._keys, _BLOCKS[0])
        client = self.session.client
        client.blocks_done([Chunk(block, block).digest for block in blocks])
        client.lookup(self._rng.choice(blocks))

    def _begin(self) -> None:
        """Draw a pass."""
        rng = self._rng
        mode = rng.choice(_MODES)
        options = PassOptions(
            ttl_s=rng.choice(_TTLS_S),
            is_kept=mode != "timed",
            is_for_good=mode == "for good",
            is_explicit=mode in {"explicit", "timed"},
            chunksize=rng.choice((1, 1, 2, 10)),
            waits=rng.random() < 0.3,
            max_attempts=rng.choice((0, 0, 0, 0, 0, 3)),
            max_ahead=rng.choice((0, 2, 4_000, 4_000, 4_000)),
        )
        keys = self._keys  # in this order for all, most often: only then they share blocks
        if rng.random() < 0.4:
            keys = rng.sample(keys, rng.randint(3, len(keys)))
        items = [key.decode() for key in keys]
        if rng.random() < 0.15:
            items += rng.sample(items, 2)
        self._body_ms = rng.choice(_BODIES_MS)
        self._seen = seen = PassWatch([item.encode() for item in items], options)
        block_keys = rng.choice(_BLOCKS)
        self._note_blocks(seen.keys, block_keys)
        source = KeySource(
            items if rng.random() < 0.6 else self._generate(items, rng.choice(_READ_MS)),
            lambda items: [item.encode() for item in items],
            clock=self.clock,
            has_quick_keys=rng.random() < 0.8,
            block_keys=block_keys,
            min_block_keys=MIN_BLOCK_KEYS,
        )
        self._loop = SimLoop(
            self,
            lambda: SimPass(source, self.session, options, self.clock),
            seen,
            explicit=options.is_explicit,
        )
        self._is_leaving = False
        self._next_ns = 0

    def _note_blocks(self, keys: Sequence[bytes], block_keys: int) -> None:
        """Let the world know which keys a block has."""
        for start in range(0, len(keys), block_keys):
            found = list(dict.fromkeys(keys[start : start + block_keys]))
            self._world.blocks[Chunk(found, found).digest] = found

    def _generate(self, items: list[str], item_ms: int) -> Iterator[str]:
        """Give items one by one, while others act."""
        for item in items:
            if item_ms:
                self._sleep(item_ms / 1_000)
            yield item

    def _ask(self, loop: SimLoop) -> None:
        """Ask for the next item."""
        seen = self._seen
        assert seen is not None
        asked_ns = self.clock.now_ns()
        seen.completing.clear()
        self.is_claiming = True
        try:
            live = loop.claim_next()
        except MustWait:
            self._next_ns = self._rng.choice(_RETRY_MS) * MS
            return
        except BaseException:
            self._is_leaving = True
            raise
        finally:
            self.is_claiming = False
        self.check_alive()
        if live is None:
            assert loop.running is not None
            self.watch.check_end(seen, loop.running)
            self._is_leaving = True
            return
        self.watch.take_item(seen, live, asked_ns)
        self._live = live
        self._items.append(live)
        self._began_ns = self.schedule.now_ns
        body_ms = self._rng.choice((0, 1, 1, 1, 2)) * self._body_ms
        if self._rng.random() < 0.06:
            body_ms = self._rng.choice(_OUTLIERS_MS)
        self._next_ns = body_ms * MS

    def _end_body(self, live: LiveItem[str]) -> bool:
        """End the work on an item; tell whether the loop goes on."""
        self._check_overdue()
        self._live = None
        is_explicit = self._seen is not None and self._seen.options.is_explicit
        chance = self._rng.random()
        self._is_leaving = True  # whatever is raised leaves the loop
        if chance < 0.04:
            return False
        if chance < 0.09:
            live.fail("it failed")
        elif chance < 0.12 and not live.is_kept:
            pass  # it is never settled
        else:
            self.watch.take_end(live)
            if is_explicit:
                live.complete()
        self._is_leaving = False
        return True

    def _check_overdue(self) -> None:
        """Check that nothing is held ahead if this body took much longer than was expected."""
        loop, seen = self._loop, self._seen
        assert loop is not None
        assert seen is not None
        running, ahead = loop.running, loop.ahead
        assert running is not None
        assert ahead is not None
        overdue_ns = running.pace.overdue_ns()
        is_due = ahead.due_ns is not None and ahead.due_ns <= self.schedule.now_ns
        # What was woken while it waited for the server looks again within this.
        is_due = is_due or ahead.busy_until_ns > self.schedule.now_ns - WAKE_NS
        if overdue_ns is None or ahead.is_running or is_due:
            return
        since_ns = self._due_ns - self._began_ns - self.clock.real_ns(overdue_ns)
        if since_ns > 10 * MS:
            self.watch.check_overdue(seen, since_ns)

    def _leave_loop(self, loop: SimLoop) -> None:
        """Close the loop, once its other threads can go on meanwhile."""
        if not loop.is_closed and not loop.can_close():
            self._next_ns = self._rng.choice(_RETRY_MS) * MS
            return
        loop.close()
        assert self._seen is not None
        self.watch.check_told(self._seen, loop.n_told)
        seen, self._seen, self._loop = self._seen, None, None
        if loop.ahead is None or not loop.ahead.is_running:
            self.watch.check_closed(seen)
