"""One pass over the keys: hands out one claimed item after the other, and holds some ahead.

While bodies are short, several keys are claimed at a time and held ahead, as many as `Pace` says.
Which keys are asked for, in which order, is for `Asker` to say.

Two threads meet here: whoever asks for items (`claim_next`, one at a time), and the one that claims
ahead (`step_ahead`; see `ahead.py`). Only the first reads the caller's iterable.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, TypeVar

from distlock_proto import lock_table_pb2 as pb
from run_once.asker import BUSY_STATES, MAX_REMEMBERED_KEYS, Asker
from run_once.clock import Clock
from run_once.errors import RunOnceError, ServerUnavailableError
from run_once.key_source import KeySource
from run_once.lease import Lease
from run_once.live import LiveItem, Outcome, registry
from run_once.pace import MAX_AHEAD_KEYS, Pace
from run_once.pass_options import Counts, PassOptions
from run_once.task import Session

logger = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")

_FRESH_SHARE: Final = 0.91
"""What a lease of a fixed time has left at least when it is handed out, less the margin: 95 %."""

_MAX_RENEWALS: Final = 5
"""So many renewals in turn may come later than the lease ends."""

_LONG_ENOUGH_NS: Final = 2_000_000
"""With bodies of this length it costs nothing to wake the thread for each."""

_TELL_NS: Final = 100_000_000
"""An item that was held ahead is marked as started on the server when it took so long."""

_LOOK_S: Final = 0.1
"""The thread that claims ahead looks again so soon while another one is at work."""

_NO_TIME_S: Final = 1e-9
"""A renewal that lets no lease run longer."""

_NS_PER_S: Final = 1_000_000_000


class KeyPass(Generic[ItemT]):
    """Gives one claimed item after the other.

    Attributes:
        counts: What became of the keys so far.
        session: The connection.
        first_lost: The first item whose lease was lost; None: none was.
        pace: How long bodies and requests take.
        wake: Called when keys should be claimed ahead.
        n_unsent: Items that are done, and whose completion could not be sent.
    """

    def __init__(
        self, source: KeySource[ItemT], session: Session, options: PassOptions, clock: Clock
    ) -> None:
        self.counts = Counts()
        self.session = session
        self.first_lost: LiveItem[ItemT] | None = None
        # A key that kills its worker must count as attempted: with a limit nothing is held ahead.
        max_ahead = 0 if options.max_attempts else options.max_ahead
        self.pace = Pace(max_ahead=max_ahead, lease_ns=round(options.ttl_s * _NS_PER_S))
        self.wake: Callable[[], None] | None = None
        self.n_unsent = 0
        self._source = source
        self._options = options
        self._clock = clock
        self._settled: deque[LiveItem[ItemT]] = deque()
        self._out: dict[bytes, LiveItem[ItemT]] = {}
        # Guarded by _mutex: `with` of the condition itself is no safe one, since an interrupt in it
        # can leave it locked.
        self._mutex = threading.Lock()
        self._changed = threading.Condition(self._mutex)
        self._claimant = object()
        self._asker = Asker(
            source,
            session,
            options,
            clock=clock,
            pace=self.pace,
            counts=self.counts,
            mutex=self._mutex,
            is_own=self._is_own,
            claimant=self._claimant,
        )
        self._handing_out: Lease | None = None
        self._ready: deque[tuple[ItemT, Lease]] = deque()
        self._ready_keys: set[bytes] = set()
        self._is_asking = False
        self._is_closed = False
        self._error: Exception | None = None
        self._out_ns: int | None = None
        self._is_held_off = False
        self._low_water = 0
        self._untold: deque[tuple[int, Lease]] = deque()

    @property
    def total(self) -> int | None:
        """Number of keys, where the iterable knows it; else None."""
        return self._source.total

    @property
    def first_busy(self) -> bytes | None:
        """The first key that was left to others; None: none was."""
        return self._asker.first_busy

    @property
    def first_exhausted(self) -> bytes | None:
        """The first key that was attempted too often to be asked for again; None: none was."""
        return self._asker.first_exhausted

    # -- for whoever asks for items ---------------------------------------------------------------

    def claim_next(self) -> LiveItem[ItemT] | None:
        """Claim the next item.

        Returns:
            The item, registered as live, which is the caller's once it is marked as taken; None if
            nothing is left to do or to wait for.

        Raises:
            RunOnceError: The server cannot be asked, or an item has no usable key.
            Exception: The caller's iterable raised it, and all that it gave before is handed out.
        """
        now_ns = self._clock.now_ns()
        if self._out_ns is not None:
            self.pace.note_body(now_ns - self._out_ns)
            self._out_ns = None
            self._is_held_off = False
        while True:
            if self._settled:
                self._take_in_settled()
            found = self._take_ready(now_ns)
            if found is not None:
                return found
            self._raise_error()
            self._asker.revisit()
            if not self._read() and not self._ask_or_await() and not self._come_back():
                return None
            now_ns = self._clock.now_ns()

    def on_settled(self, items: Sequence[LiveItem[Any]]) -> None:
        """Count outcomes; called in whichever thread settled the items."""
        counts, out = self.counts, self._out
        with self._mutex:
            for item in items:
                outcome = item.outcome
                if outcome is Outcome.LOST or outcome is Outcome.FAILED:
                    self._settled.append(item)
                elif out.get(item.lease.key) is item:
                    del out[item.lease.key]
                if outcome is Outcome.COMPLETED:
                    counts.completed += 1
                elif outcome is Outcome.FAILED:
                    counts.failed += 1
                elif outcome is Outcome.LOST:
                    counts.lost += 1
                    self.first_lost = self.first_lost or item
                elif outcome is None:
                    self.n_unsent += 1
                    self._error = self._error or item.error

    def close(self) -> list[Lease]:
        """End the pass.

        Returns:
            The leases that nobody works under, to be given back: those that were held ahead, and
            what an interrupt kept from being handed out.
        """
        with self._mutex:
            self._is_closed = True
            held = [lease for _, lease in self._ready]
            if self._handing_out is not None and not self._handing_out.is_taken:
                held.append(self._handing_out)
            left = list(dict.fromkeys([*held, *self.session.keeper.not_taken(self._claimant)]))
            registry().forget(left)
            self._ready.clear()
            self._ready_keys.clear()
            self._changed.notify_all()
        try:
            if self._options.is_explicit:
                self._tell_started(self._clock.now_ns())
        except BaseException:
            self.session.release(left)  # within its bound; the rest runs out
            raise
        return left

    def after_fork(self, session: Session) -> None:
        """Go on in a forked child, without what the parent has handed out."""
        self.session = session
        self._mutex = threading.Lock()
        self._changed = threading.Condition(self._mutex)
        held = list(self._ready)
        keys, items = [lease.key for _, lease in held], [item for item, _ in held]
        self._asker.after_fork(session, self._mutex, keys, items)
        self.wake = None
        self._is_asking = False
        self._settled.clear()
        self._out.clear()
        self._ready.clear()
        self._ready_keys.clear()

    def _take_in_settled(self) -> None:
        """Forget what was completed, leave alone what failed, come back to what was lost."""
        while self._settled:
            item = self._settled.popleft()
            if self._out.get(item.key) is item:
                del self._out[item.key]
            if item.outcome is Outcome.FAILED:
                self._asker.forget(item.key)
            elif item.outcome is Outcome.LOST:
                with self._mutex:
                    self._asker.set_aside(item.key, item.item, item.present_state)

    def _is_own(self, key: bytes) -> bool:
        """Tell whether a key is handed out or held ahead here."""
        return key in self._out or key in self._ready_keys

    def _take_ready(self, now_ns: int) -> LiveItem[ItemT] | None:
        """Hand out the first of the keys that are held ahead; None: there is none."""
        while self._ready:
            with self._mutex:
                item, lease = self._ready[0]
                self._handing_out = lease  # if this is cut short, `close` gives it back
                self._ready.popleft()
                self._ready_keys.discard(lease.grant.key)
            if not self._is_usable(lease, now_ns):
                self._take_in_lost(item, lease)
                now_ns = self._clock.now_ns()
                continue
            live = self._begin(item, lease)
            if live is None:
                now_ns = self._clock.now_ns()
                continue
            self._out_ns = now_ns
            if len(self._ready) <= self._low_water:
                self._provide()
            return live
        return None

    def _provide(self) -> None:
        """See to it that more is claimed ahead."""
        if self._low_water < MAX_AHEAD_KEYS:
            # Again when half of what is left is used up, and more has not come.
            self._low_water = len(self._ready) // 2
        if self._source.is_quick:
            self._read()  # another iterable may block, and the item with it
        if self.wake is not None:
            self.wake()

    def _take_in_lost(self, item: ItemT, lease: Lease) -> None:
        """Set aside a key that was held ahead and lost to another; a free one is asked for."""
        with self._mutex:
            if lease.lost_state in BUSY_STATES or lease.lost_state == pb.KEY_STATE_DONE:
                self._asker.set_aside(lease.key, item, lease.lost_state)
            else:
                self._asker.put_back([lease.key], [item])

    def _is_usable(self, lease: Lease, now_ns: int) -> bool:
        """Tell whether a lease may be handed out; renew it first if it must be.

        Raises:
            ServerUnavailableError: Each renewal took longer than the lease.
        """
        if lease.is_lost:
            return False
        is_ahead = not lease.started
        lease.started = True
        if not (self._options.is_kept or self._options.is_for_good):
            self._freshen(lease)
            now_ns = self._clock.now_ns()
        n_renewals = 0
        while not lease.is_held_at(now_ns) and lease.is_open and n_renewals < _MAX_RENEWALS:
            n_renewals += 1
            self.session.keeper.renew_now([lease])
            now_ns = self._clock.now_ns()
        if n_renewals and lease.is_open and not lease.is_held_at(now_ns):
            raise ServerUnavailableError(
                f"lock server {self.session.address} answers later than a lease of "
                f"{lease.ttl_s:g} s lasts; choose a longer one"
            )
        if is_ahead:
            if self._options.is_explicit:
                self._untold.append((now_ns, lease))
            else:  # who asks for the next item has ended the last one; the other thread reads this
                self._untold = deque([(now_ns, lease)])
        return not lease.is_lost

    def _freshen(self, lease: Lease) -> None:
        """Keep a lease of a fixed time alive no longer; nearly all of it is left."""
        keeper = self.session.keeper
        keeper.drop(lease)
        lease.is_kept = False
        if lease.remaining_s < _FRESH_SHARE * lease.ttl_s:
            keeper.renew_now([lease])

    def _raise_error(self) -> None:
        with self._mutex:
            if self._error is not None:
                raise self._error

    def _read(self) -> bool:
        """Read on in the caller's iterable if too little is left to ask for."""
        if not self._asker.read():
            return False
        if self._asker.is_skipping and self.wake is not None:
            self.wake()
        return True

    def _ask_or_await(self) -> bool:
        """Ask for keys, or await those that are being asked for; False: there are none."""
        with self._mutex:
            if self._ready:
                return True
            if self._is_asking:
                self._await_answer()
                return True
            if not self._asker.n_todo:
                return False
        self._ask(1 + self._want())
        if self.wake is not None and len(self._ready) > 1:
            self.wake()  # it looks after what is held ahead
        return True

    def _await_answer(self) -> None:
        """Wait for the request that is under way; a simulation lets the others act meanwhile."""
        self._changed.wait(1.0)

    def _await_others(self, pause_s: float) -> None:
        """Let others go on for so long at most; a simulation lets them act meanwhile."""
        with self._mutex:
            self._changed.wait(pause_s)

    def _begin(self, item: ItemT, lease: Lease) -> LiveItem[ItemT] | None:
        """Register a claimed item; with `is_for_good` complete it, too, before it is handed out."""
        live = LiveItem(
            item,
            lease,
            self.session,
            is_kept=self._options.is_kept,
            on_settled=self.on_settled,
        )
        registry().add(live)
        if self._options.is_for_good and not self._complete(live):
            return None
        self._out[lease.grant.key] = live
        if len(self._out) > MAX_REMEMBERED_KEYS:
            del self._out[next(iter(self._out))]
        self.counts.handed_out += 1
        return live

    def _complete(self, live: LiveItem[ItemT]) -> bool:
        """Complete an item that nobody has seen yet; tell whether that was accepted."""
        try:
            is_accepted = live.complete() is Outcome.COMPLETED
        except BaseException:
            live.release()
            raise
        if not is_accepted:
            registry().remove(live)
        return is_accepted

    def _come_back(self) -> bool:
        """Find what is left when all keys were asked for; False: nothing is."""
        # What turns out to be lost may have to be done again, and nobody waits while others wait
        # for what is done here.
        self.session.settler.flush()
        if self._settled or self._error is not None:
            return True
        pause_s = self._asker.patience_s()
        if pause_s > 0:
            self._await_others(pause_s)
            return True
        if self._asker.come_back():
            return True
        if self._source.error is not None:
            raise self._source.error
        return False

    # -- asking the server ------------------------------------------------------------------------

    def step_ahead(self) -> float | None:
        """Claim ahead what is wanted, or give back what is overdue.

        Returns:
            In how many seconds to look again; None: when woken.
        """
        with self._mutex:
            if self._is_closed:
                return None
            if self._is_asking:
                return _LOOK_S
            want, n_ready = self._want(), len(self._ready)
            overdue = self._take_overdue()
            is_due = n_ready * 2 <= want and self._asker.n_todo and self._error is None
        self._tell_started(self._clock.now_ns() - _TELL_NS)
        if overdue:
            self.session.release(overdue)
        elif (is_due and n_ready < want) or self._may_skip():
            try:
                self._ask(max(1, want - n_ready))
            except Exception as error:  # noqa: BLE001 - raised where the item is asked for
                with self._mutex:
                    self._error = error
                    self._changed.notify_all()
        return self._next_look_s()

    def _tell_started(self, before_ns: int) -> None:
        """Tell the server of items that were held ahead, and have been worked on since then."""
        late: list[Lease] = []
        while self._untold and self._untold[0][0] <= before_ns:
            lease = self._untold.popleft()[1]
            if lease.is_open and not lease.is_settlement_sent:
                late.append(lease)
        if not late:
            return
        try:
            if self._options.is_kept:
                self.session.keeper.renew_now(late)
            else:  # no longer than it was promised
                self.session.client.renew([(lease.grant, _NO_TIME_S, True) for lease in late])
        except RunOnceError as error:
            logger.info("the start of %d keys could not be told: %s", len(late), error)

    def _may_skip(self) -> bool:
        """Tell whether to ask on though nothing is wanted ahead: only done keys were found."""
        return self._error is None and not self._ready and self._asker.may_skip

    def _want(self) -> int:
        """Say how many keys should be held ahead."""
        if self._is_held_off:
            return 0
        out_ns = self._out_ns  # once: the other thread sets it at any moment
        elapsed_ns = 0 if out_ns is None else self._clock.now_ns() - out_ns
        return self.pace.wanted(elapsed_ns=elapsed_ns, n_left=self._asker.n_left)

    def _take_overdue(self) -> list[Lease]:
        """Take back what is held ahead if the present body takes much longer than expected."""
        out_ns, overdue_ns = self._out_ns, self.pace.overdue_ns()
        if out_ns is None or overdue_ns is None or not self._ready:
            return []
        if self._clock.now_ns() - out_ns < overdue_ns:
            return []
        keys = [lease.key for _, lease in self._ready]
        leases = [lease for _, lease in self._ready]
        self._asker.put_back(keys, [item for item, _ in self._ready])
        self._ready.clear()
        self._ready_keys.clear()
        self._is_held_off = True
        return leases

    def _next_look_s(self) -> float | None:
        """Say when a key will be wanted, or what is held ahead will be overdue."""
        with self._mutex:
            now_ns, out_ns = self._clock.now_ns(), self._out_ns
            looks: list[int | None] = []
            if self._untold:
                looks.append(self._untold[0][0] + _TELL_NS - now_ns)
            if out_ns is None and self._ready:
                looks.append(round(_LOOK_S * _NS_PER_S))  # the next body begins at any moment
            elif out_ns is not None and self._ready:
                overdue_ns = self.pace.overdue_ns()
                looks.append(None if overdue_ns is None else out_ns + overdue_ns - now_ns)
            elif out_ns is not None and not self._is_held_off:
                looks.append(self.pace.next_want_ns(now_ns - out_ns))
        return min((max(0, ns) / _NS_PER_S for ns in looks if ns is not None), default=None)

    def _ask(self, max_grants: int) -> None:
        """Claim so many of the first keys."""
        with self._mutex:
            if self._is_asking or self._is_closed:
                return
            self._is_asking = True
        try:
            self._claim(max_grants)
        finally:
            with self._mutex:
                self._is_asking = False
                self._changed.notify_all()

    def _claim(self, max_grants: int) -> None:
        granted = self._asker.ask(max_grants, self._want(), is_ahead=self._out_ns is not None)
        with self._mutex:
            self._ready.extend(zip(granted.items, granted.leases, strict=True))
            self._ready_keys.update(lease.key for lease in granted.leases)
            self._low_water = self._want() // 2
            if self.pace.body_ns is not None and self.pace.body_ns > _LONG_ENOUGH_NS:
                self._low_water = MAX_AHEAD_KEYS  # the thread keeps the time of each body
            if not self._is_closed:
                return
            self._ready.clear()
            self._ready_keys.clear()
        self.session.release(granted.leases)
