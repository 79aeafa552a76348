"""One group of requests, run over an overlay of what is stored and written as one batch.

A `Group` reads each record once, lets request after request see the changes of those before it,
and turns what changed into the swaps of a single commit. A request that raises leaves no trace.
It does no I/O: the table hands in what was read and commits what comes out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeVar

from distlock_server import codec
from distlock_server.codec import Kind
from distlock_server.engines.base import Meta, Swap, encode_counter
from distlock_server.state import (
    Answer,
    Command,
    Done,
    Failed,
    Held,
    Outcome,
    Record,
    Reset,
    Stamp,
    is_stored_change,
    step,
)

T = TypeVar("T")


class Slot(NamedTuple):
    """A record and the exact bytes that are stored for it; None, None: absent."""

    record: Record
    raw: bytes | None


ABSENT_SLOT: Final = Slot(None, None)

NOT_DECODED: Final[Any] = object()
"""Stands for a record that is decoded when it is asked for."""


class DamagedRecordError(codec.CodecError):
    """A record cannot be decoded; only a reset, which needs not know it, gets past this.

    Attributes:
        raw: The bytes that are stored.
    """

    def __init__(self, key: bytes, raw: bytes, error: codec.CodecError) -> None:
        """Name the key and what is wrong."""
        super().__init__(f"the record of key {key!r} is damaged, reset the key: {error}")
        self.raw = raw


class Counters(NamedTuple):
    """The store's own running numbers.

    Attributes:
        revision: Number of stored changes so far.
        token: The last fencing token given out.
        generation: Number of times that something done was undone.
    """

    revision: int
    token: int
    generation: int


_KINDS: Final[dict[type, Kind | None]] = {
    type(None): None,
    Held: Kind.HELD,
    Failed: Kind.FAILED,
    Done: Kind.DONE,
}


def kind_of_record(record: Record) -> Kind | None:
    """Give the kind that counters and indexes go by; None for an absent key."""
    return _KINDS[type(record)]


def _kind_before(slot: Slot) -> Kind | None:
    """Give the kind that is counted and indexed; of a damaged record, what its bytes say."""
    if not _is_dropped(slot):
        return kind_of_record(slot.record)
    try:
        return codec.kind_of(slot.raw or b"")
    except codec.CodecError:
        return None


def _is_dropped(slot: Slot) -> bool:
    """Tell whether the record before was damaged."""
    return slot.record is None and slot.raw is not None


class Group:
    """What requests of one commit group see and change; also their `Txn`.

    Attributes:
        done_blocks: Blocks of keys that were all done, and the reset generation then.
    """

    def __init__(
        self,
        slots: Mapping[bytes, Slot],
        counters: Counters,
        *,
        now_ns: int,
        wall_ns: int,
        fetch: Callable[[bytes], Slot],
        decode: Callable[[bytes, bytes], Slot],
        scan: Callable[[bytes, bytes, int], list[tuple[bytes, Record]]],
    ) -> None:
        """Start from what was read.

        Args:
            slots: Records of the keys that the requests named.
            counters: The store's numbers before the group.
            now_ns: Monotonic time at which the group is applied.
            wall_ns: Wall time, for display.
            fetch: Reads a key that no request named.
            decode: Decodes the record of a key.
            scan: Lists committed records of a key range.
        """
        self.now_ns = now_ns
        self.wall_ns = wall_ns
        self.done_blocks: list[tuple[Sequence[bytes], int]] = []
        self._base = dict(slots)
        self._fetch = fetch
        self._decode = decode
        self._scan = scan
        self._kept: dict[bytes, Record] = {}
        self._own: dict[bytes, Record] = {}
        self._before = counters
        self._counters = counters

    @property
    def revision(self) -> int:
        """The store revision, changes of this group so far included."""
        return self._counters.revision

    @property
    def generation(self) -> int:
        """The reset generation, changes of this group so far included."""
        return self._counters.generation

    @property
    def counters(self) -> Counters:
        """The store's numbers after the requests so far."""
        return self._counters

    @property
    def has_counted(self) -> bool:
        """Whether the store's numbers have changed."""
        return self._counters != self._before

    def get(self, key: bytes) -> Record:
        """Read a key as the requests so far have left it."""
        if key in self._own:
            return self._own[key]
        if key in self._kept:
            return self._kept[key]
        return self._slot(key).record

    def are_plainly_done(self, keys: Sequence[bytes]) -> bool:
        """Tell whether each key is stored as done, without a value: that needs no decoding.

        Keys that requests of this group have changed are not looked into.
        """
        base, is_plain_done = self._base, codec.is_plain_done
        for key in keys:
            slot = base.get(key)
            if slot is None or slot.raw is None or not is_plain_done(slot.raw):
                return False
        return self._kept.keys().isdisjoint(keys) and self._own.keys().isdisjoint(keys)

    def note_done(self, keys: Sequence[bytes]) -> None:
        """Note that all of these keys are done, for when the block is asked for again."""
        self.done_blocks.append((keys, self.generation))

    def apply(self, key: bytes, command: Command) -> tuple[Record, Record, Outcome]:
        """Apply one command to one key.

        Returns:
            The record before, the record after, and the answer.
        """
        if isinstance(command, Reset) and self._is_damaged(key):
            return self._drop_damaged(key)
        before = self.get(key)
        counters = self._counters
        stamp = Stamp(self.now_ns, self.wall_ns, counters.revision + 1, counters.token + 1)
        after, outcome = step(before, command, stamp)
        if after is not before:
            self._own[key] = after
            self._counters = Counters(
                counters.revision + is_stored_change(before, after),
                counters.token + outcome.is_new_grant,
                counters.generation + isinstance(before, Done),
            )
        return before, after, outcome

    def _is_damaged(self, key: bytes) -> bool:
        try:
            self.get(key)
        except DamagedRecordError:
            return True
        return False

    def _drop_damaged(self, key: bytes) -> tuple[Record, Record, Outcome]:
        """Make a key absent whose record is damaged: it may have been done, so this undoes it."""
        self._own[key] = None
        revision, token, generation = self._counters
        self._counters = Counters(revision + 1, token, generation + 1)
        return None, None, Outcome(Answer.RESET)

    def scan(self, start: bytes, end: bytes, limit: int) -> list[tuple[bytes, Record]]:
        """List records with start <= key < end as the requests so far have left them.

        An empty `end` means to the end. At most `limit` records.
        """
        changed = {**self._kept, **self._own}
        # Changes may remove records from the page: read enough to fill it all the same.
        found: dict[bytes, Record] = dict(self._scan(start, end, limit + len(changed)))
        is_cut = len(found) == limit + len(changed)
        last = max(found, default=b"")
        for key, record in changed.items():
            if key < start or (end and key >= end) or (is_cut and key > last):
                continue
            found[key] = record
        left = [(key, found[key]) for key in sorted(found) if found[key] is not None]
        return left[:limit]

    def run(self, request: Callable[[Group], T]) -> T:
        """Run one request; if it raises, nothing it did is kept.

        Raises:
            Exception: Whatever the request raised.
        """
        saved = self._counters
        self._own = {}
        try:
            value = request(self)
        except BaseException:
            self._own = {}
            self._counters = saved
            raise
        self._kept.update(self._own)
        self._own = {}
        return value

    def changes(self) -> dict[bytes, tuple[Slot, Record]]:
        """Give each changed key's slot before and record after the group."""
        slots = {key: self._slot_before(key) for key in self._kept}
        return {
            key: (slots[key], record)
            for key, record in self._kept.items()
            if record is not slots[key].record or _is_dropped(slots[key])
        }

    def _slot_before(self, key: bytes) -> Slot:
        """Give the slot of a changed key; of a damaged record, only its bytes are known."""
        try:
            return self._slot(key)
        except DamagedRecordError as error:
            return Slot(None, error.raw)

    def _slot(self, key: bytes) -> Slot:
        slot = self._base.get(key)
        if slot is None:
            slot = self._base[key] = self._fetch(key)
        elif slot.record is NOT_DECODED:
            slot = self._base[key] = self._decode(key, slot.raw or b"")
        return slot


class Write(NamedTuple):
    """What a group writes.

    Attributes:
        swaps: One per stored change.
        meta: The store's numbers.
        slots: Each changed key's new record and bytes, memory-only changes included.
        is_needed: Something must reach the disk.
    """

    swaps: list[Swap]
    meta: Meta
    slots: dict[bytes, Slot]
    is_needed: bool


def plan_write(group: Group, *, stores_deadline: bool, counted_below: bytes | None) -> Write:
    """Turn a group's changes into one write.

    Args:
        group: The group after its requests have run.
        stores_deadline: The engine is shared, so deadlines live in the records.
        counted_below: Keys from here on are not counted yet (an old database); None: all are.

    Returns:
        The write. It may be needed without a swap: what was granted and released within the group
        leaves no record, and its token must not be given out again.
    """
    swaps: list[Swap] = []
    slots: dict[bytes, Slot] = {}
    for key, (before, after) in group.changes().items():
        record, raw = before
        is_memory_only = not stores_deadline and _is_in_memory_only(record, after)
        if is_memory_only and not is_stored_as_expired(raw):
            slots[key] = Slot(after, raw)
            continue
        value = _encode(after, stores_deadline=stores_deadline)
        slots[key] = Slot(after, value)
        if value == raw:
            continue
        was, now = _kind_before(before), kind_of_record(after)
        is_counted = counted_below is None or key < counted_below
        puts = index_puts(key, was, now)
        adds = _count_changes(codec.namespace_of(key), was, now) if is_counted else ()
        swaps.append(Swap(key, raw, value, puts, adds))
    is_needed = bool(swaps) or group.has_counted
    return Write(swaps, counters_meta(group.counters), slots, is_needed)


def _is_in_memory_only(before: Record, after: Record) -> bool:
    """Tell whether a change need not reach the disk: only leases have such."""
    is_lease = isinstance(before, Held) and isinstance(after, Held)
    return is_lease and not is_stored_change(before, after)


def is_stored_as_expired(raw: bytes | None) -> bool:
    """Tell whether the lease would not run anew after a crash: its renewal must be stored."""
    return raw is not None and codec.is_marked_expired(raw)


def counters_meta(counters: Counters) -> Meta:
    """Give the write that stores the running numbers."""
    return Meta(
        puts=(
            (codec.REVISION_KEY, encode_counter(counters.revision)),
            (codec.TOKEN_KEY, encode_counter(counters.token)),
            (codec.GENERATION_KEY, encode_counter(counters.generation)),
        )
    )


def index_puts(
    key: bytes, was: Kind | None, now: Kind | None
) -> tuple[tuple[bytes, bytes | None], ...]:
    """Give the index entries to write when a key goes from one kind to another."""
    if was is now:
        return ()
    gone = ((codec.index_key(was, key), None),) if was in _INDEXED else ()
    return (*gone, (codec.index_key(now, key), b"")) if now in _INDEXED else gone


_INDEXED: Final = (Kind.HELD, Kind.FAILED)


@functools.lru_cache(maxsize=1_000)
def _count_changes(
    namespace: bytes, was: Kind | None, now: Kind | None
) -> tuple[tuple[bytes, int], ...]:
    """Give the counters to change when a key goes from one kind to another; few come often."""
    if was is now:
        return ()
    adds = []
    if was is not None:
        adds.append((codec.counter_key(namespace, was), -1))
    if now is not None:
        adds.append((codec.counter_key(namespace, now), 1))
    return tuple(adds)


def _encode(record: Record, *, stores_deadline: bool) -> bytes | None:
    if record is None:
        return None
    if stores_deadline and isinstance(record, Held):
        return codec.encode(record, deadline_ns=record.deadline_ns)
    return codec.encode(record)
