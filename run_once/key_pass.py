"""One pass over the keys: which to ask for next, which to hold ahead, which to come back to.

Keys are asked for in the given order. While bodies are short, several are claimed at a time and
held ahead, as many as `Pace` says; while nothing but done keys is found, requests grow, so that a
long finished stretch costs few of them. Keys that others hold only ahead are come back to; with
`wait` so is everything that others hold.

Two threads meet here: whoever asks for items (`claim_next`, one at a time), and the one that claims
ahead (`step_ahead`; see `ahead.py`). Only the first reads the caller's iterable.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, Generic, TypeVar

from distlock_proto import lock_table_pb2 as pb
from run_once.clock import Clock
from run_once.errors import RunOnceError, ServerUnavailableError
from run_once.key_source import BLOCK_KEYS, KeySource, Todo
from run_once.lease import Lease
from run_once.live import LiveItem, Outcome, registry
from run_once.pace import MAX_AHEAD_KEYS, Pace
from run_once.task import Claimed, Session

logger = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")

MAX_CHUNK_KEYS: Final = BLOCK_KEYS
"""A request has so many keys at most."""

GROWTH: Final = 4
"""By how much the next request is larger after one that found nothing to do."""

MAX_REMEMBERED_KEYS: Final = 100_000
"""So many keys that this pass failed, or handed out and did not settle, are remembered."""

WAIT_S: Final = 10.0
AHEAD_WAIT_S: Final = 2.0
"""Length of one long poll; that for keys held ahead is shorter, since a start ends no poll."""

_READ_BLOCKS: Final = 16
"""While only done keys are found, so many requests' worth is read ahead."""

_READ_AHEAD: Final = 8
"""While keys are held ahead, so many requests' worth is read at once."""

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

_BUSY_STATES: Final = (pb.KEY_STATE_BUSY, pb.KEY_STATE_BUSY_AHEAD)
_NS_PER_S: Final = 1_000_000_000


@dataclass
class Counts:
    """What became of the keys of one pass, as far as it has come.

    Attributes:
        handed_out: Items given to the caller.
        completed: Done here, and acknowledged.
        found_done: Found done: by others, or in an earlier run.
        busy: Left to others that hold them.
        failed: Failed here.
        lost: Leases lost; the work under them was not accepted.
        exhausted: Left alone, since they were attempted as often as max_attempts allows.
    """

    handed_out: int = 0
    completed: int = 0
    found_done: int = 0
    busy: int = 0
    failed: int = 0
    lost: int = 0
    exhausted: int = 0

    @property
    def known_done(self) -> int:
        """Keys that are done, by whomever, as this pass knows."""
        return self.completed + self.found_done


@dataclass(frozen=True)
class PassOptions:
    """How a pass claims.

    Attributes:
        ttl_s: Length of a lease.
        is_kept: Keep leases alive.
        is_for_good: Complete each key before it is handed out.
        is_explicit: Items outlive the pass.
        chunksize: Keys in one request at first.
        waits: Come back to all that others hold.
        max_attempts: Leave keys alone that were attempted so often; 0: no limit.
        max_ahead: Hold so many keys ahead at most.
    """

    ttl_s: float
    is_kept: bool
    is_for_good: bool
    is_explicit: bool
    chunksize: int
    waits: bool
    max_attempts: int
    max_ahead: int


class KeyPass(Generic[ItemT]):
    """Gives one claimed item after the other.

    Attributes:
        counts: What became of the keys so far.
        session: The connection.
        first_busy: The first key that was left to others; None: none was.
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
        self.first_busy: bytes | None = None
        self.first_lost: LiveItem[ItemT] | None = None
        # A key that kills its worker must count as attempted: with a limit nothing is held ahead.
        max_ahead = 0 if options.max_attempts else options.max_ahead
        self.pace = Pace(max_ahead=max_ahead, lease_ns=round(options.ttl_s * _NS_PER_S))
        self.wake: Callable[[], None] | None = None
        self.n_unsent = 0
        self._source = source
        self._options = options
        self._clock = clock
        self._size = options.chunksize
        self._is_skipping = False
        self._failed: dict[bytes, None] = {}
        self._settled: deque[LiveItem[ItemT]] = deque()
        self._out: dict[bytes, LiveItem[ItemT]] = {}
        self._revisit_ns = clock.now_ns() + round(options.ttl_s * _NS_PER_S)
        # Guarded by _changed.
        self._changed = threading.Condition(threading.Lock())
        self._todo: Todo[ItemT] = Todo()
        self._ready: deque[tuple[ItemT, Lease]] = deque()
        self._ready_keys: set[bytes] = set()
        self._pending: dict[bytes, ItemT] = {}
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

    # -- for whoever asks for items ---------------------------------------------------------------

    def claim_next(self) -> LiveItem[ItemT] | None:
        """Claim the next item.

        Returns:
            The item, registered as live; None if nothing is left to do or to wait for.

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
            self._revisit()
            if not self._read() and not self._ask_or_await() and not self._come_back():
                return None
            now_ns = self._clock.now_ns()

    def on_settled(self, item: LiveItem[Any]) -> None:
        """Count an outcome; called in whichever thread settled the item."""
        counts, outcome = self.counts, item.outcome
        with self._changed:
            if outcome is Outcome.LOST or outcome is Outcome.FAILED:
                self._settled.append(item)
            elif self._out.get(item.key) is item:
                del self._out[item.key]
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
            The leases that were held ahead and not started, to be given back.
        """
        with self._changed:
            self._is_closed = True
            left = [lease for _, lease in self._ready]
            self._ready.clear()
            self._ready_keys.clear()
            self._changed.notify_all()
        try:
            if self._options.is_explicit:
                self._tell_started(self._clock.now_ns())
        except BaseException:
            self.session.keeper.drop_all(left)  # they run out
            raise
        return left

    def after_fork(self, session: Session) -> None:
        """Go on in a forked child, without what the parent holds."""
        self.session = session
        self._changed = threading.Condition(threading.Lock())
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
                self._failed[item.key] = None
                if len(self._failed) > MAX_REMEMBERED_KEYS:
                    del self._failed[next(iter(self._failed))]
            elif item.outcome is Outcome.LOST:
                with self._changed:
                    self._set_aside(item.key, item.item, item.present_state)

    def _take_ready(self, now_ns: int) -> LiveItem[ItemT] | None:
        """Hand out the first of the keys that are held ahead; None: there is none."""
        while self._ready:
            with self._changed:
                item, lease = self._ready.popleft()
                self._ready_keys.discard(lease.key)
            try:
                is_usable = self._is_usable(lease, now_ns)
            except BaseException:
                with self._changed:  # whoever ends the pass gives it back
                    self._ready.appendleft((item, lease))
                    self._ready_keys.add(lease.key)
                raise
            if not is_usable:
                self._take_in_lost(item, lease)
                now_ns = self._clock.now_ns()
                continue
            live = self._begin(item, lease)
            if live is None:
                now_ns = self._clock.now_ns()
                continue
            self._out_ns = now_ns
            if len(self._todo) < self._size and self._source.is_quick:
                self._read()  # another iterable may block, and the item with it
            if len(self._ready) <= self._low_water and self.wake is not None:
                self.wake()
            return live
        return None

    def _take_in_lost(self, item: ItemT, lease: Lease) -> None:
        """Set aside a key that was held ahead and lost to another; a free one is asked for."""
        with self._changed:
            if lease.lost_state in _BUSY_STATES or lease.lost_state == pb.KEY_STATE_DONE:
                self._set_aside(lease.key, item, lease.lost_state)
            else:
                self._todo.put_back([lease.key], [item])

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
        while lease.is_open and not lease.is_held_at(now_ns) and n_renewals < _MAX_RENEWALS:
            n_renewals += 1
            self.session.keeper.renew_now([lease])
            now_ns = self._clock.now_ns()
        if lease.is_open and not lease.is_held_at(now_ns):
            raise ServerUnavailableError(
                f"lock server {self.session.address} answers later than a lease of "
                f"{lease.ttl_s:g} s lasts; choose a longer one"
            )
        if is_ahead:
            self._untold.append((now_ns, lease))
        return not lease.is_lost

    def _freshen(self, lease: Lease) -> None:
        """Keep a lease of a fixed time alive no longer; nearly all of it is left."""
        keeper = self.session.keeper
        keeper.drop(lease)
        lease.is_kept = False
        if lease.remaining_s < _FRESH_SHARE * lease.ttl_s:
            keeper.renew_now([lease])

    def _raise_error(self) -> None:
        with self._changed:
            if self._error is not None:
                raise self._error

    def _read(self) -> bool:
        """Read on in the caller's iterable if too little is left to ask for."""
        source = self._source
        if source.is_exhausted:
            return False
        n_missing = self._n_to_read() - len(self._todo)
        if n_missing <= 0 or (source.is_slow and self._todo):
            return False
        chunk = source.read(n_missing, 0 if self._todo else self._options.chunksize)
        with self._changed:
            self._todo.append(chunk)
        if self._is_skipping and self.wake is not None:
            self.wake()
        return True

    def _n_to_read(self) -> int:
        """Say how many keys should be at hand to ask for."""
        if self._is_skipping:
            return _READ_BLOCKS * MAX_CHUNK_KEYS
        if not self.pace.is_short or (self._options.chunksize == 1 and not self._source.is_quick):
            return self._size
        return _READ_AHEAD * self._size

    def _ask_or_await(self) -> bool:
        """Ask for keys, or await those that are being asked for; False: there are none."""
        with self._changed:
            if self._ready:
                return True
            if self._is_asking:
                self._await_answer()
                return True
            if not self._todo:
                return False
        self._ask(1 + self._want())
        if self.wake is not None and len(self._ready) > 1:
            self.wake()  # it looks after what is held ahead
        return True

    def _await_answer(self) -> None:
        """Wait for the request that is under way; a simulation lets the others act meanwhile."""
        self._changed.wait(1.0)

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
        self._out[live.key] = live
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

    def _revisit(self) -> None:
        """Now and then ask again for what was set aside, though the iterable goes on."""
        if not self._pending or self._source.is_exhausted:
            return
        now_ns = self._clock.now_ns()
        if now_ns < self._revisit_ns:
            return
        self._revisit_ns = now_ns + round(self._options.ttl_s * _NS_PER_S)
        with self._changed:
            self._todo.put_back(list(self._pending), list(self._pending.values()))
            self._pending = {}

    def _come_back(self) -> bool:
        """Find what is left when all keys were asked for; False: nothing is."""
        # What turns out to be lost may have to be done again, and nobody waits while others wait
        # for what is done here.
        self.session.settler.flush()
        if self._settled or self._error is not None:
            return True
        if self._pending:
            self._wait()
            return True
        if self._source.error is not None:
            raise self._source.error
        return False

    def _wait(self) -> None:
        """Wait until something that was set aside is free or done."""
        keys = list(islice(self._pending, MAX_CHUNK_KEYS))
        timeout_s = WAIT_S if self._options.waits else AHEAD_WAIT_S
        states = self.session.client.wait(keys, timeout_s)
        with self._changed:
            free: dict[bytes, ItemT] = {}
            for key, state in zip(keys, states, strict=True):
                item = self._pending.pop(key)
                if state in _BUSY_STATES:
                    self._set_aside(key, item, state)  # at the end, so that all get their turn
                elif state == pb.KEY_STATE_DONE:
                    self.counts.found_done += 1
                else:
                    free[key] = item
            self._todo.put_back(list(free), list(free.values()))

    # -- asking the server ------------------------------------------------------------------------

    def step_ahead(self) -> float | None:
        """Claim ahead what is wanted, or give back what is overdue.

        Returns:
            In how many seconds to look again; None: when woken.
        """
        with self._changed:
            if self._is_closed:
                return None
            if self._is_asking:
                return _LOOK_S
            want, n_ready = self._want(), len(self._ready)
            overdue = self._take_overdue()
            is_due = n_ready * 2 <= want and self._todo and self._error is None
        self._tell_started(self._clock.now_ns() - _TELL_NS)
        if overdue:
            self.session.release(overdue)
        elif (is_due and n_ready < want) or self._may_skip():
            try:
                self._ask(max(1, want - n_ready))
            except Exception as error:  # noqa: BLE001 - raised where the item is asked for
                with self._changed:
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
        is_well = self._error is None and self._is_skipping
        return is_well and not self._ready and len(self._todo) >= MAX_CHUNK_KEYS

    def _want(self) -> int:
        """Say how many keys should be held ahead."""
        elapsed_ns = 0 if self._out_ns is None else self._clock.now_ns() - self._out_ns
        if self._is_held_off:
            return 0
        n_left = len(self._todo) if self._source.is_exhausted else None
        return self.pace.wanted(elapsed_ns=elapsed_ns, n_left=n_left)

    def _take_overdue(self) -> list[Lease]:
        """Take back what is held ahead if the present body takes much longer than expected."""
        overdue_ns = self.pace.overdue_ns()
        if self._out_ns is None or overdue_ns is None or not self._ready:
            return []
        if self._clock.now_ns() - self._out_ns < overdue_ns:
            return []
        keys = [lease.key for _, lease in self._ready]
        leases = [lease for _, lease in self._ready]
        self._todo.put_back(keys, [item for item, _ in self._ready])
        self._ready.clear()
        self._ready_keys.clear()
        self._is_held_off = True
        return leases

    def _next_look_s(self) -> float | None:
        """Say when a key will be wanted, or what is held ahead will be overdue."""
        with self._changed:
            now_ns = self._clock.now_ns()
            looks: list[int | None] = []
            if self._untold:
                looks.append(self._untold[0][0] + _TELL_NS - now_ns)
            if self._out_ns is None and self._ready:
                looks.append(round(_LOOK_S * _NS_PER_S))  # the next body begins at any moment
            elif self._out_ns is not None and self._ready:
                overdue_ns = self.pace.overdue_ns()
                looks.append(None if overdue_ns is None else self._out_ns + overdue_ns - now_ns)
            elif self._out_ns is not None and not self._is_held_off:
                looks.append(self.pace.next_want_ns(now_ns - self._out_ns))
        return min((max(0, ns) / _NS_PER_S for ns in looks if ns is not None), default=None)

    def _ask(self, max_grants: int) -> None:
        """Claim so many of the first keys."""
        with self._changed:
            if self._is_asking or self._is_closed:
                return
            self._is_asking = True
        try:
            if not self._is_skipping or not self._skip_blocks():
                self._claim(max_grants)
        finally:
            with self._changed:
                self._is_asking = False
                self._changed.notify_all()

    def _skip_blocks(self) -> bool:
        """Pass over whole blocks that the server knows to be done; tell whether there were any."""
        with self._changed:
            blocks = self._todo.blocks(_READ_BLOCKS)
        if not blocks:
            return False
        known = self.session.client.blocks_done([block.digest for block in blocks])
        with self._changed:
            for block, is_done in zip(blocks, known, strict=True):
                block.is_block = False  # not asked about again
                if is_done:
                    self._todo.drop(block)
                    self.counts.found_done += len(block)
        return any(known)

    def _claim(self, max_grants: int) -> None:
        with self._changed:
            keys, items = self._take_todo(max_grants)
        if not keys:
            return
        # Held ahead until it is handed out, unless it is handed out at once.
        is_ahead = max_grants > 1 or self._out_ns is not None
        began_ns = self._clock.now_ns()
        claimed: Claimed | None = None
        try:
            claimed = self.session.claim(
                keys,
                ttl_s=self._options.ttl_s,
                keep_alive=self._options.is_kept or is_ahead or self._options.is_for_good,
                max_grants=max_grants,
                max_attempts=self._options.max_attempts,
                ahead=is_ahead,
            )
        finally:
            if claimed is None:
                with self._changed:
                    self._todo.put_back(keys, items)
        if claimed.leases:  # else it looked at keys that were done, perhaps at very many
            self.pace.note_request(self._clock.now_ns() - began_ns)
        with self._changed:
            self._sort(keys, items, claimed)
            self._resize(claimed, len(keys), max_grants)
            self._low_water = self._want() // 2
            if self.pace.body_ns is not None and self.pace.body_ns > _LONG_ENOUGH_NS:
                self._low_water = MAX_AHEAD_KEYS  # the thread keeps the time of each body
            is_closed = self._is_closed
        if is_closed:
            self.session.release(claimed.leases)

    def _take_todo(self, max_grants: int) -> tuple[list[bytes], list[ItemT]]:
        """Take the keys of the next request, but for those that this pass failed."""
        keys, items = self._todo.take(max(self._size, min(max_grants, MAX_CHUNK_KEYS)))
        if self._failed and not self._failed.keys().isdisjoint(keys):
            left = [
                (key, item)
                for key, item in zip(keys, items, strict=True)
                if key not in self._failed
            ]
            keys, items = [key for key, _ in left], [item for _, item in left]
        return keys, items

    def _sort(self, keys: list[bytes], items: list[ItemT], claimed: Claimed) -> None:
        """Take in what the answer says of each key.

        Behind the last granted key only what stays as it is counts: the rest is asked for again
        when its turn comes. Before it there may be free keys, too: they were not when the claim
        came first, and its repetition got the same grants.
        """
        states, n_keys = claimed.states, len(keys)
        n_done = states.count(pb.KEY_STATE_DONE)
        self.counts.found_done += n_done
        if n_done == n_keys:
            return
        if len(claimed.leases) == n_keys:
            self._hold(zip(items, claimed.leases, strict=True))
            return
        last = states.rfind(pb.KEY_STATE_GRANTED)
        leases = iter(claimed.leases)
        granted: list[tuple[ItemT, Lease]] = []
        back_keys: list[bytes] = []
        back_items: list[ItemT] = []
        for place, (key, item, state) in enumerate(zip(keys, items, states, strict=True)):
            if state == pb.KEY_STATE_GRANTED:
                granted.append((item, next(leases)))
            elif state == pb.KEY_STATE_EXHAUSTED:
                self.counts.exhausted += 1
            elif state == pb.KEY_STATE_DONE:
                pass
            elif state != pb.KEY_STATE_NOT_ASKED and (place < last or last < 0):
                self._set_aside(key, item, state)
            else:
                back_keys.append(key)
                back_items.append(item)
        self._todo.put_back(back_keys, back_items)
        self._hold(granted)

    def _hold(self, granted: Any) -> None:
        """Hold granted keys until they are handed out."""
        before = len(self._ready)
        self._ready.extend(granted)
        self._ready_keys.update(lease.key for _, lease in islice(self._ready, before, None))

    def _resize(self, claimed: Claimed, n_keys: int, max_grants: int) -> None:
        """Choose the size of the next request by how many keys of this one were granted."""
        n_granted = len(claimed.leases)
        if n_granted < max_grants and n_granted < n_keys:
            self._size = min(max(self._size, n_keys) * GROWTH, MAX_CHUNK_KEYS)
        else:
            n_seen = claimed.states.rfind(pb.KEY_STATE_GRANTED) + 1
            spread = n_seen / max(n_granted, 1)
            if spread > 1:
                spread *= 1.25
            n_next = round(max(self._want(), max_grants) * spread)
            self._size = min(max(n_next, self._options.chunksize), MAX_CHUNK_KEYS)
        is_all_done = claimed.states.count(pb.KEY_STATE_DONE) == n_keys
        self._is_skipping = is_all_done and self._size == MAX_CHUNK_KEYS

    def _set_aside(self, key: bytes, item: ItemT, state: int) -> None:
        """Decide whether to come back to a key that somebody else has or had."""
        if state == pb.KEY_STATE_DONE:
            self.counts.found_done += 1
        elif key in self._out or key in self._ready_keys:
            pass  # the caller's iterable names it twice, and the first is being worked on
        elif self._options.waits or state == pb.KEY_STATE_BUSY_AHEAD:
            self._pending[key] = item
        else:
            self.counts.busy += 1
            self.first_busy = self.first_busy or key
