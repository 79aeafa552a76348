"""One pass over the keys: which to ask for next, and which to come back to.

Keys are asked for in the given order, a chunk in one request, and one of them is granted. While
nothing but done keys is found the chunks grow, so that a long finished stretch costs few requests.
Keys that others hold only ahead are come back to; with `wait` so is everything that others hold.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, Generic, TypeVar

from distlock_proto import lock_table_pb2 as pb
from run_once.clock import Clock
from run_once.key_source import KeySource
from run_once.lease import Lease
from run_once.live import LiveItem, Outcome, registry
from run_once.task import Session

ItemT = TypeVar("ItemT")

MAX_CHUNK_KEYS: Final = 5_000
"""A request that skips done keys has so many keys at most."""

GROWTH: Final = 4
"""By how much the next request is larger after one that found nothing to do."""

MAX_REMEMBERED_KEYS: Final = 100_000
"""So many keys that this pass failed, or handed out and did not settle, are remembered."""

WAIT_S: Final = 10.0
AHEAD_WAIT_S: Final = 2.0
"""Length of one long poll; that for keys held ahead is shorter, since a start ends no poll."""

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
        chunksize: Keys in one request, while there is something to do.
        waits: Come back to all that others hold.
        max_attempts: Leave keys alone that were attempted so often; 0: no limit.
    """

    ttl_s: float
    is_kept: bool
    is_for_good: bool
    chunksize: int
    waits: bool
    max_attempts: int


class KeyPass(Generic[ItemT]):
    """Gives one claimed item after the other; one thread at a time asks.

    Attributes:
        counts: What became of the keys so far.
        session: The connection.
        first_busy: The first key that was left to others; None: none was.
    """

    def __init__(
        self, source: KeySource[ItemT], session: Session, options: PassOptions, clock: Clock
    ) -> None:
        self.counts = Counts()
        self.session = session
        self.first_busy: bytes | None = None
        self._source = source
        self._options = options
        self._clock = clock
        self._size = options.chunksize
        self._window: dict[bytes, ItemT] = {}
        self._pending: dict[bytes, ItemT] = {}
        self._failed: dict[bytes, None] = {}
        self._settled: deque[LiveItem[ItemT]] = deque()
        self._out: dict[bytes, LiveItem[ItemT]] = {}
        self._lock = threading.Lock()
        self._revisit_ns = clock.now_ns() + round(options.ttl_s * _NS_PER_S)

    @property
    def total(self) -> int | None:
        """Number of keys, where the iterable knows it; else None."""
        return self._source.total

    def claim_next(self) -> LiveItem[ItemT] | None:
        """Claim the next item.

        Returns:
            The item, registered as live; None if nothing is left to do or to wait for.

        Raises:
            RunOnceError: The server cannot be asked, or an item has no usable key.
            Exception: The caller's iterable raised it, and all that it gave before is handed out.
        """
        while True:
            self._take_in_settled()
            self._revisit()
            self._source.read(self._window, self._size, self._options.chunksize)
            if self._window:
                item = self._ask()
                if item is not None:
                    return item
            elif self._pending:
                self._wait()
            elif not self._settled:
                if self._source.error is not None:
                    raise self._source.error
                return None

    def on_settled(self, item: LiveItem[Any]) -> None:
        """Count an outcome; called in whichever thread settled the item."""
        counts = self.counts
        with self._lock:
            if item.outcome is Outcome.COMPLETED:
                counts.completed += 1
            elif item.outcome is Outcome.FAILED:
                counts.failed += 1
            elif item.outcome is Outcome.LOST:
                counts.lost += 1
        self._settled.append(item)

    def after_fork(self, session: Session) -> None:
        """Go on in a forked child, without what the parent holds."""
        self.session = session
        self._lock = threading.Lock()
        self._settled.clear()
        self._out.clear()

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
                self._set_aside(item.key, item.item, item.present_state)

    def _ask(self) -> LiveItem[ItemT] | None:
        """Claim one of the first keys of the window."""
        for key in self._failed.keys() & self._window.keys():
            del self._window[key]
        keys = list(islice(self._window, self._size))
        if not keys:
            return None
        options = self._options
        claimed = self.session.claim(
            keys,
            ttl_s=options.ttl_s,
            keep_alive=options.is_kept,
            max_grants=1,
            max_attempts=options.max_attempts,
        )
        granted = self._sort(keys, claimed.states)
        if granted is None or not claimed.leases:
            self._size = min(self._size * GROWTH, MAX_CHUNK_KEYS)
            return None
        self._size = options.chunksize
        return self._begin(self._window.pop(granted), claimed.leases[0])

    def _sort(self, keys: list[bytes], states: bytes) -> bytes | None:
        """Take from the window what the answer settles.

        Behind the granted key only what stays as it is counts: the rest is asked for again when
        its turn comes.

        Returns:
            The granted key; it stays in the window.
        """
        granted: bytes | None = None
        for key, state in zip(keys, states, strict=True):
            if state == pb.KEY_STATE_GRANTED:
                granted = key
            elif state == pb.KEY_STATE_DONE:
                del self._window[key]
                self.counts.found_done += 1
            elif state == pb.KEY_STATE_EXHAUSTED:
                del self._window[key]
                self.counts.exhausted += 1
            elif granted is None and state != pb.KEY_STATE_NOT_ASKED:
                self._set_aside(key, self._window.pop(key), state)
        return granted

    def _set_aside(self, key: bytes, item: ItemT, state: int) -> None:
        """Decide whether to come back to a key that somebody else has or had."""
        if state == pb.KEY_STATE_DONE:
            self.counts.found_done += 1
        elif key in self._out:
            pass  # the caller's iterable names it twice, and the first is being worked on
        elif self._options.waits or state == pb.KEY_STATE_BUSY_AHEAD:
            self._pending[key] = item
        else:
            self.counts.busy += 1
            self.first_busy = self.first_busy or key

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
        self._window = {**self._pending, **self._window}
        self._pending = {}

    def _wait(self) -> None:
        """Wait until something that was set aside is free or done."""
        keys = list(islice(self._pending, MAX_CHUNK_KEYS))
        timeout_s = WAIT_S if self._options.waits else AHEAD_WAIT_S
        states = self.session.client.wait(keys, timeout_s)
        for key, state in zip(keys, states, strict=True):
            item = self._pending.pop(key)
            if state in _BUSY_STATES:
                self._set_aside(key, item, state)  # at the end, so that all get their turn
            elif state == pb.KEY_STATE_DONE:
                self.counts.found_done += 1
            else:
                self._window[key] = item
