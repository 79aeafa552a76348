"""Which keys of a pass to ask the server for next, and what its answers mean for them.

Keys are asked for in the given order. While nothing but done keys is found, requests grow, so that
a long finished stretch costs few of them, and whole blocks are passed over that the server knows to
be done. While bodies are short, workers on one list spread out: the server tells each which keys of
a block to ask for, and what others asked for is looked at when the rest is done. Keys that others
hold only ahead are come back to; with `wait` so is everything that others hold.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import islice
from typing import Final, Generic, NamedTuple, TypeVar

from distlock_proto import lock_table_pb2 as pb
from run_once.clock import Clock
from run_once.key_source import KeySource
from run_once.lease import Lease
from run_once.pace import Pace
from run_once.pass_options import Counts, PassOptions
from run_once.process import THIS
from run_once.task import Claimed, Session
from run_once.todo import Chunk, Todo, frontier_request

ItemT = TypeVar("ItemT")

GROWTH: Final = 4
"""By how much the next request is larger after one that found nothing to do."""

MAX_REMEMBERED_KEYS: Final = 100_000
"""So many keys that this pass failed, or handed out and did not settle, are remembered."""

WAIT_S: Final = 10.0
AHEAD_WAIT_S: Final = 2.0
"""Length of one long poll; that for keys held ahead is shorter, since a start ends no poll."""

READ_BLOCKS: Final = 16
"""While only done keys are found, so many requests' worth is read ahead."""

_SKIPPED_BLOCKS: Final = READ_BLOCKS // 2
"""So many are asked about together, unless there are no more."""

_SHARED_BLOCKS: Final = 3
"""So many blocks are named when the frontier is asked for."""

_MAX_PASSED_BLOCKS: Final = 64
"""Beyond so many blocks that others work on, too, nothing is read on: the first are looked at."""

_MAX_KEPT_BLOCKS: Final = READ_BLOCKS
"""So many of an iterable whose items are in memory only for this."""

BUSY_STATES: Final = (pb.KEY_STATE_BUSY, pb.KEY_STATE_BUSY_AHEAD)
_NS_PER_S: Final = 1_000_000_000


class Granted(NamedTuple, Generic[ItemT]):
    """Keys that were granted: items and their leases, in order."""

    items: list[ItemT]
    leases: list[Lease]


class Asker(Generic[ItemT]):
    """What is left of a pass's keys, and the requests for them.

    The keys are read by the thread that asks for items; either thread of the pass asks the server,
    one at a time. All that is remembered here is guarded by the pass's mutex.

    Attributes:
        session: The connection.
        is_skipping: Nothing but done keys was found by the last request, a large one.
        first_busy: The first key that was left to others; None: none was.
        first_exhausted: The first that was attempted too often to be asked for; None: none was.
    """

    def __init__(
        self,
        source: KeySource[ItemT],
        session: Session,
        options: PassOptions,
        *,
        clock: Clock,
        pace: Pace,
        counts: Counts,
        mutex: threading.Lock,
        is_own: Callable[[bytes], bool],
        claimant: object,
    ) -> None:
        """Begin with nothing read.

        Args:
            source: The caller's iterable.
            session: The connection.
            options: How the pass claims.
            clock: The process's time.
            pace: Learns how long requests take.
            counts: Learns what was found done, busy and exhausted.
            mutex: Guards what is remembered.
            is_own: Tells whether the pass holds or has handed out a key.
            claimant: By what the keeper knows the pass's leases.
        """
        self.session = session
        self.is_skipping = False
        self.first_busy: bytes | None = None
        self.first_exhausted: bytes | None = None
        self._source = source
        self._options = options
        self._clock = clock
        self._pace = pace
        self._counts = counts
        self._mutex = mutex
        self._is_own = is_own
        self._claimant = claimant
        self._todo: Todo[ItemT] = Todo()
        self._max_keys = source.block_keys  # in one request
        self._max_passed = _MAX_PASSED_BLOCKS if source.is_quick else _MAX_KEPT_BLOCKS
        self._size = options.chunksize
        self._spread = 1.0  # keys that are named for each that is granted
        self._n_named = 0  # by the last request
        self._knows_frontier = True
        self._under_way: tuple[list[bytes], list[ItemT]] = ([], [])
        self._failed: dict[bytes, None] = {}
        self._pending: dict[bytes, ItemT] = {}
        self._was_patient = False
        self._revisit_ns = clock.now_ns() + round(options.ttl_s * _NS_PER_S)

    def after_fork(
        self, session: Session, mutex: threading.Lock, keys: list[bytes], items: list[ItemT]
    ) -> None:
        """Go on in a forked child.

        Args:
            session: The child's.
            mutex: The child's.
            keys: What the parent holds ahead: it may end, and its work fall to the child.
            items: The caller's objects, in the same order.
        """
        self.session = session
        self._mutex = mutex
        self._todo.recount()  # the parent's other thread may have been at work on it
        self._todo.put_back(*self._under_way)
        self._todo.put_back(keys, items)

    @property
    def n_todo(self) -> int:
        """Keys that were read and not asked for."""
        return len(self._todo)

    @property
    def n_left(self) -> int | None:
        """Keys that are neither held nor done, others' aside; None: not known, very many."""
        return len(self._todo) if self._source.is_exhausted else None

    @property
    def may_skip(self) -> bool:
        """Whether to ask on though nothing is wanted: only done keys were found."""
        return self.is_skipping and len(self._todo) >= _SKIPPED_BLOCKS * self._max_keys

    # -- reading ----------------------------------------------------------------------------------

    def read(self) -> bool:
        """Read on in the caller's iterable if too little is left to ask for."""
        source = self._source
        if source.is_exhausted or len(self._todo.passed) > self._max_passed:
            return False
        n_missing = self._n_to_read()
        if n_missing <= 0:
            return False
        piece = source.read(n_missing, 0 if self._todo else self._options.chunksize)
        with self._mutex:
            self._todo.append(piece)
        return True

    def _n_to_read(self) -> int:
        """Say how many keys to read on, so that enough are at hand to ask for; 0: none."""
        source, is_short = self._source, self._pace.is_short
        n_enough = max(self._size, self._n_named)
        reads_blocks = False
        if self.is_skipping:
            n_enough = READ_BLOCKS * source.block_keys
        elif source.is_cheap:
            n_enough += is_short * source.block_keys
        elif is_short and (self._options.chunksize > 1 or source.is_quick):
            n_enough = max(n_enough, source.n_quickly)
            reads_blocks = source.is_block_quick
        n_missing = n_enough - len(self._todo)
        if reads_blocks and (n_missing > 0 or source.is_in_block):
            return max(1, source.n_quickly)
        if source.is_slow and self._todo:
            return 0
        return source.block_keys if source.is_cheap and n_missing > 0 else n_missing

    # -- what comes back --------------------------------------------------------------------------

    def forget(self, key: bytes) -> None:
        """Leave a key alone that failed here."""
        self._failed[key] = None
        if len(self._failed) > MAX_REMEMBERED_KEYS:
            del self._failed[next(iter(self._failed))]

    def put_back(self, keys: list[bytes], items: list[ItemT]) -> None:
        """Ask for keys again; the caller holds the lock, as below."""
        self._todo.put_back(keys, items)

    def set_aside(self, key: bytes, item: ItemT, state: int) -> None:
        """Decide whether to come back to a key that somebody else has or had."""
        if state == pb.KEY_STATE_DONE:
            self._counts.found_done += 1
        elif self._is_own(key):
            pass  # the caller's iterable names it twice, and the first is being worked on
        elif self._options.waits or state == pb.KEY_STATE_BUSY_AHEAD:
            self._pending[key] = item
        else:
            self._counts.busy += 1
            self.first_busy = self.first_busy or key

    def revisit(self) -> None:
        """Now and then ask again for what was set aside or passed over, though more is to come."""
        if len(self._todo.passed) > self._max_passed:
            self._look_at_passed()
        if not self._pending or self._source.is_exhausted:
            return
        now_ns = self._clock.now_ns()
        if now_ns < self._revisit_ns:
            return
        self._revisit_ns = now_ns + round(self._options.ttl_s * _NS_PER_S)
        with self._mutex:
            self._todo.put_back(list(self._pending), list(self._pending.values()))
            self._pending = {}

    def patience_s(self) -> float:
        """Say how long to wait until what was passed over is looked at: once, and then 0."""
        if self._was_patient or not self._todo.passed:
            return 0.0
        self._was_patient = True
        return self._pace.patience_ns() / _NS_PER_S

    def come_back(self) -> bool:
        """Find what is left when all keys were asked for; False: nothing is."""
        if self._todo.passed:
            self._look_at_passed()
        elif self._pending:
            self._wait()
        else:
            return False
        return True

    def _wait(self) -> None:
        """Wait until something that was set aside is free or done."""
        keys = list(islice(self._pending, self._max_keys))
        timeout_s = WAIT_S if self._options.waits else AHEAD_WAIT_S
        states = self.session.client.wait(keys, timeout_s)
        with self._mutex:
            free: dict[bytes, ItemT] = {}
            for key, state in zip(keys, states, strict=True):
                item = self._pending.pop(key)
                if state in BUSY_STATES:
                    self.set_aside(key, item, state)  # at the end, so that all get their turn
                elif state == pb.KEY_STATE_DONE:
                    self._counts.found_done += 1
                else:
                    free[key] = item
            self._todo.put_back(list(free), list(free.values()))

    def _look_at_passed(self) -> None:
        """Look at stretches that others asked for: what is not done there is asked for.

        A block is read as a whole, so that the server remembers it if it is done, and others need
        not read it: workers that come to the end together begin with different ones.
        """
        with self._mutex:
            chunks = [part.chunk for part in islice(self._todo.passed.values(), READ_BLOCKS)]
        known = self.session.client.blocks_done([chunk.digest for chunk in chunks])
        unknown = [chunk for chunk, is_done in zip(chunks, known, strict=True) if not is_done]
        with self._mutex:
            for chunk, is_done in zip(chunks, known, strict=True):
                if is_done:
                    self._take_passed(chunk, b"")
        if unknown:
            chunk = unknown[THIS.pid % len(unknown)]
            states = self.session.client.lookup(chunk.keys).states
            with self._mutex:
                self._take_passed(chunk, states)

    def _take_passed(self, chunk: Chunk[ItemT], states: bytes) -> None:
        """Take in what is known of a block; without states all of it is done."""
        keys: list[bytes] = []
        items: list[ItemT] = []
        for begin, end in self._todo.take_passed(chunk):
            n_done = states.count(pb.KEY_STATE_DONE, begin, end) if states else end - begin
            self._counts.found_done += n_done
            if n_done == end - begin:
                continue
            for place in range(begin, end):
                state = states[place]
                if state == pb.KEY_STATE_DONE:
                    continue
                if state in BUSY_STATES:
                    self.set_aside(chunk.keys[place], chunk.item(place), state)
                else:
                    keys.append(chunk.keys[place])
                    items.append(chunk.item(place))
        self._todo.put_back(keys, items)

    # -- asking -----------------------------------------------------------------------------------

    def ask(self, max_grants: int, want: int, *, is_ahead: bool) -> Granted[ItemT]:
        """Ask for the next keys; nobody else asks meanwhile.

        Args:
            max_grants: Claim so many at most.
            want: So many will be wanted ahead from then on.
            is_ahead: Even a single one is not handed out at once.

        Returns:
            What was granted, perhaps nothing.
        """
        if self.is_skipping and self._skip_blocks():
            return Granted([], [])
        self._decide_spread()
        if self._todo.is_spread and self._todo.is_stuck:
            self._follow_frontier(max(want, max_grants))
        return self._claim(max_grants, want, is_ahead=is_ahead)

    def _skip_blocks(self) -> bool:
        """Pass over whole blocks that the server knows to be done; tell whether there were any."""
        with self._mutex:
            blocks = self._todo.new_blocks(READ_BLOCKS)
        if not blocks:
            return False
        known = self.session.client.blocks_done([block.digest for block in blocks])
        with self._mutex:
            for block, is_done in zip(blocks, known, strict=True):
                block.is_new = False  # not asked about again
                if is_done:
                    self._todo.drop(block)
                    self._counts.found_done += len(block)
        return any(known)

    def _decide_spread(self) -> None:
        """Decide whether to let the server say which keys to ask for: not with long bodies."""
        is_short = self._pace.body_ns is None or self._pace.is_short
        self._todo.is_spread = is_short and self._knows_frontier and not self.is_skipping

    def _follow_frontier(self, n_keys: int) -> None:
        """Ask where to go on."""
        with self._mutex:
            blocks = self._todo.shared(_SHARED_BLOCKS)
        told = self.session.client.next_slice(frontier_request(blocks, n_keys))
        with self._mutex:
            self._take_told(blocks, told)

    def _take_told(self, blocks: list[Chunk[ItemT]], told: pb.Slice | None) -> None:
        """Go on where the server said; one that does not say is not asked again."""
        if told is None:
            self._knows_frontier = self._todo.is_spread = False
        else:
            self._todo.follow(blocks, told)

    def _claim(self, max_grants: int, want: int, *, is_ahead: bool) -> Granted[ItemT]:
        nothing: Granted[ItemT] = Granted([], [])
        with self._mutex:
            keys, items = self._take_todo(max_grants)
            # Before it is known how long bodies take, keys are told one at a time: in order.
            is_asked = self._todo.is_spread and self._pace.is_short
            self._under_way = keys, items
            blocks = self._todo.shared(_SHARED_BLOCKS) if is_asked else []
        n_next = self._n_to_name(max(want, 1))
        if not keys:
            return nothing
        # Held ahead until it is handed out, unless it is handed out at once.
        is_ahead = is_ahead or max_grants > 1
        began_ns = self._clock.now_ns()
        claimed: Claimed | None = None
        try:
            claimed = self.session.claim(
                keys,
                ttl_s=self._options.ttl_s,
                # In any case until it is handed out: what an interrupt cuts short is given back.
                keep_alive=True,
                max_grants=max_grants,
                max_attempts=self._options.max_attempts,
                ahead=is_ahead,
                frontier=frontier_request(blocks, n_next) if blocks else None,
                claimant=self._claimant,
            )
        finally:
            if claimed is None:
                with self._mutex:
                    self._under_way = [], []
                    self._todo.put_back(keys, items)
        if claimed.leases:  # else it looked at keys that were done, perhaps at very many
            self._pace.note_request(self._clock.now_ns() - began_ns)
        with self._mutex:
            self._under_way = [], []
            if blocks:
                self._take_told(blocks, claimed.following)
            granted = self._sort(keys, items, claimed)
            self._resize(claimed, len(keys), max_grants)
        return granted

    def _n_to_name(self, max_grants: int) -> int:
        """Say how many keys to name where so many may be granted."""
        return min(max(self._size, round(max_grants * self._spread)), self._max_keys)

    def _take_todo(self, max_grants: int) -> tuple[list[bytes], list[ItemT]]:
        """Take the keys of the next request, but for those that this pass failed."""
        self._n_named = self._n_to_name(max_grants)
        keys, items = self._todo.take(self._n_named)
        if self._failed and not self._failed.keys().isdisjoint(keys):
            left = [
                (key, item)
                for key, item in zip(keys, items, strict=True)
                if key not in self._failed
            ]
            keys, items = [key for key, _ in left], [item for _, item in left]
        return keys, items

    def _sort(self, keys: list[bytes], items: list[ItemT], claimed: Claimed) -> Granted[ItemT]:
        """Take in what the answer says of each key; give what was granted.

        Behind the last granted key only what stays as it is counts: the rest is asked for again
        when its turn comes. Before it there may be free keys, too: they were not when the claim
        came first, and its repetition got the same grants.
        """
        states, n_keys = claimed.states, len(keys)
        n_done = states.count(pb.KEY_STATE_DONE)
        self._counts.found_done += n_done
        if n_done == n_keys:
            return Granted([], [])
        if len(claimed.leases) == n_keys:
            return Granted(items, claimed.leases)
        last = states.rfind(pb.KEY_STATE_GRANTED)
        granted: list[ItemT] = []
        back_keys: list[bytes] = []
        back_items: list[ItemT] = []
        for place, (key, item, state) in enumerate(zip(keys, items, states, strict=True)):
            if state == pb.KEY_STATE_GRANTED:
                granted.append(item)
            elif state == pb.KEY_STATE_EXHAUSTED:
                self._counts.exhausted += 1
                self.first_exhausted = self.first_exhausted or key
            elif state == pb.KEY_STATE_DONE:
                pass
            elif state != pb.KEY_STATE_NOT_ASKED and (place < last or last < 0):
                self.set_aside(key, item, state)
            else:
                back_keys.append(key)
                back_items.append(item)
        self._todo.put_back(back_keys, back_items)
        return Granted(granted, claimed.leases)

    def _resize(self, claimed: Claimed, n_keys: int, max_grants: int) -> None:
        """Choose the size of the next request by how many keys of this one were granted."""
        n_granted = len(claimed.leases)
        if n_granted < max_grants and n_granted < n_keys:
            self._size = min(max(self._size, n_keys) * GROWTH, self._max_keys)
        else:
            n_seen = claimed.states.rfind(pb.KEY_STATE_GRANTED) + 1
            spread = n_seen / max(n_granted, 1)
            self._spread = spread * 1.25 if spread > 1 else 1.0
            self._size = min(self._options.chunksize, self._max_keys)
        is_all_done = claimed.states.count(pb.KEY_STATE_DONE) == n_keys
        self.is_skipping = is_all_done and self._size == self._max_keys
