"""What a loop's process has besides its main thread, as acts of the schedule; and the loop itself.

Waits are nested: a thread that was interrupted by another in the schedule goes on only when that
one has finished. So who would wait for a thread below it on the stack unwinds with `MustWait`, and
asks again later.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from run_once.answers import SettleAnswer
from run_once.config import Config
from run_once.errors import RunOnceError
from run_once.key_pass import KeyPass
from run_once.lease import Lease
from run_once.live import LiveItem
from run_once.loop import Loop
from run_once.settler import Ended, Settler
from tests.simulation.schedule import MS, S

if TYPE_CHECKING:
    from run_once.pass_options import Counts
    from tests.simulation.loop_promises import PassWatch
    from tests.simulation.loop_worker import LoopWorker

_SETTLE_PAUSES_MS: Final = (0, 0, 1, 10, 50, 99)
_WAKE_PAUSES_MS: Final = (0, 0, 1, 5)
WAKE_NS: Final = (max(_WAKE_PAUSES_MS) + 1) * MS
"""A thread that is woken acts within this time."""

STEP_NS: Final = 10_000
"""No thread that waits wakes sooner: clocks that are rounded must not stand still."""

_CONFIG: Final = Config(progress=True)  # a bar, which is not shown: the end needs no words then


class MustWait(BaseException):
    """Another thread of this process, which is below on the stack, has to go on first."""


class SimPass(KeyPass[str]):
    """The real pass; it does not block where another thread is at work."""

    def _await_answer(self) -> None:
        raise MustWait

    def _await_others(self, pause_s: float) -> None:
        raise MustWait


class SimSettler(Settler):
    """The real settler; its thread is an act within 100 ms of an item.

    Attributes:
        is_sending: A request is under way.
    """

    def __init__(
        self, worker: LoopWorker, complete: Callable[[Sequence[Lease]], list[SettleAnswer]]
    ) -> None:
        super().__init__(complete)
        self.is_sending = False
        self._worker = worker
        self._is_planned = False
        self._is_bounded = False

    def put(self, lease: Lease, ended: Ended) -> None:
        """Queue an item, which is noted."""
        assert isinstance(ended, LiveItem)
        self._worker.watch.queued.append(ended)
        super().put(lease, ended)

    def flush(self, timeout_s: float | None = None) -> int:
        """Wait for what is queued; nobody may be told that all is answered if it is not."""
        outer, self._is_bounded = self._is_bounded, timeout_s is not None
        try:
            n_left = super().flush(timeout_s)
        finally:
            self._is_bounded = outer  # a flush below on the stack, that this one interrupted
        if not n_left:
            self._worker.watch.check_queued("after a flush")
        return n_left

    def _start(self) -> None:
        if not self._is_planned:
            self._is_planned = True
            delay_ns = self._worker.rng.choice(_SETTLE_PAUSES_MS) * MS
            self._worker.schedule.act_at(delay_ns, self._act)

    def _act(self) -> None:
        """Be the thread for one request."""
        self._is_planned = False
        if self._worker.is_dead or self.is_sending:
            return  # what came meanwhile is planned when the request has ended
        self.is_sending = True
        try:
            self._worker.run_thread("settler", self.step)
        finally:
            self.is_sending = False
        if self._worker.is_dead:
            return
        if self._queue:
            self._start()
        else:
            self._worker.watch.check_queued("when nothing is queued any more")

    def _now_s(self) -> float:
        return self._worker.clock.now_ns() / S

    def _await_change(self, timeout_s: float) -> None:
        worker = self._worker
        if not self._is_bounded and (self.is_sending or not worker.schedule.can_nest()):
            raise MustWait
        worker.wait(lambda: not self._queue and not self._n_sending, timeout_s)
        worker.maybe_interrupt()


class SimAhead:
    """Stands where `ClaimAhead` does.

    Attributes:
        is_running: A step is under way.
        due_ns: Real time of the next step; None: when woken.
        busy_until_ns: When the last step ended that had to wait for the server.
    """

    def __init__(self, worker: LoopWorker, running: KeyPass[str], seen: PassWatch) -> None:
        self.is_running = False
        self.due_ns: int | None = None
        self.busy_until_ns = 0
        self._worker = worker
        self._pass = running
        self._seen = seen
        self._is_woken = False
        self._is_closed = False
        self._n_plans = 0
        running.wake = self.wake

    def wake(self) -> None:
        """Look soon."""
        self._is_woken = True
        if not self.is_running:
            self._plan(self._worker.rng.choice(_WAKE_PAUSES_MS) * MS)

    def close(self) -> None:
        """Claim nothing more; a claim that is under way takes longer than the loop's end waits."""
        self._is_closed = True
        self._pass.wake = None

    def _plan(self, delay_ns: int) -> None:
        """Plan the next step, unless one is planned that comes before."""
        schedule = self._worker.schedule
        due_ns = schedule.now_ns + delay_ns
        if self.due_ns is None or due_ns < self.due_ns:
            self._n_plans += 1
            number = self._n_plans
            self.due_ns = due_ns
            schedule.act_at(delay_ns, lambda: self._act(number))

    def _act(self, number: int) -> None:
        """Be the thread until it waits again."""
        if number != self._n_plans or self._is_closed or self._worker.is_dead:
            return
        self.due_ns = None
        self._is_woken = False
        self.is_running = True
        pauses_s: list[float | None] = []
        began_ns = self._worker.schedule.now_ns
        try:
            self._worker.run_thread("ahead", lambda: pauses_s.append(self._step()), self._seen)
        finally:
            self.is_running = False
        if self._worker.schedule.now_ns > began_ns:
            self.busy_until_ns = self._worker.schedule.now_ns
        if self._worker.is_dead:
            return
        if self._is_closed:
            self._worker.watch.check_closed(self._seen)
        elif self._is_woken:
            self.wake()
        elif pauses_s and pauses_s[0] is not None:
            self._plan(self._worker.clock.real_ns(int(pauses_s[0] * S)) + STEP_NS)

    def _step(self) -> float | None:
        try:
            return self._pass.step_ahead()
        except RunOnceError as error:
            self._worker.watch.broken("L3", f"claiming ahead ended with {error!r}")


class SimLoop(Loop[str]):
    """The real loop, without threads and signals.

    Attributes:
        n_told: So many items that are not acknowledged the caller was told of at its end.
    """

    def __init__(
        self, worker: LoopWorker, begin: Callable[[], SimPass], seen: PassWatch, *, explicit: bool
    ) -> None:
        super().__init__(begin, _CONFIG, is_explicit=explicit)
        self.ahead: SimAhead | None = None
        self.n_told = 0
        self._worker = worker
        self._seen = seen

    def __del__(self) -> None:
        """Nothing: whoever leaves it closes it."""

    @property
    def is_closed(self) -> bool:
        """Whether it was left."""
        return self._is_closed

    @property
    def running(self) -> KeyPass[str] | None:
        """The pass; None before it begins."""
        return self._pass

    def can_close(self) -> bool:
        """Tell whether the settler may go on while the loop's end waits for it."""
        settler = self._worker.session.settler
        assert isinstance(settler, SimSettler)
        return not settler.is_sending and self._worker.schedule.can_nest()

    def close(self) -> None:
        """Leave the loop; where that would wait for what cannot go on, the worker does so later."""
        is_waiting = isinstance(sys.exc_info()[1], MustWait)
        if self._worker.is_dead or is_waiting or not self.can_close():
            return
        super().close()

    def _start(self) -> KeyPass[str]:
        self._pass = running = self._begin()
        self.ahead = SimAhead(self._worker, running, self._seen)
        self._ahead = self.ahead  # type: ignore[assignment]  # it stands where ClaimAhead does
        return running

    def _tell_unacknowledged(self, n_items: int) -> None:
        self.n_told = n_items

    def _warn_lost(self, live: LiveItem[Any], counts: Counts) -> None:
        """Say nothing."""
