"""One group of requests, run over an overlay of what is stored and written as one batch.

A `Group` reads each record once, lets request after request see the changes of those before it,
and turns what changed into the swaps of a single commit. A request that raises leaves no trace.
It does no I/O: the table hands in what was read and commits what comes out.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

from distlock_server import codec
from distlock_server.codec import Kind
from distlock_server.engines.base import Meta, Swap, encode_counter
from distlock_server.quick import maker
from distlock_server.state import (
    Answer,
    Claim,
    Command,
    Done,
    Failed,
    Held,
    Outcome,
    Record,
    Reset,
    Stamp,
    claim_absent,
    complete_held,
    is_stored_change,
    step,
)

T = TypeVar("T")


class Slot(NamedTuple):
    """A record and the exact bytes that are stored for it; None, None: absent."""

    record: Record
    raw: bytes | None


ABSENT_SLOT: Final = Slot(None, None)

_make_slot: Final = maker(Slot)
_record_of: Final = operator.itemgetter(Slot._fields.index("record"))
_raw_of: Final = operator.itemgetter(Slot._fields.index("raw"))

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


Effect: TypeAlias = tuple[tuple[tuple[bytes, bytes | None], ...], tuple[tuple[bytes, int], ...]]
"""The marks and adds of a `Swap`."""

_KINDS: Final[dict[type, Kind | None]] = {
    type(None): None,
    Held: Kind.HELD,
    Failed: Kind.FAILED,
    Done: Kind.DONE,
}


def kind_of_record(record: Record) -> Kind | None:
    """Give the kind that counters and indexes go by; None for an absent key."""
    return _KINDS[type(record)]


def _kind_of_damaged(raw: bytes) -> Kind | None:
    """Give the kind that is counted and indexed of a damaged record: what its bytes say."""
    try:
        return codec.kind_of(raw)
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
        self._next = Stamp(now_ns, wall_ns, 0, 0)
        self._count(counters)

    @property
    def revision(self) -> int:
        """The store revision, changes of this group so far included."""
        return self._next.revision - 1

    @property
    def generation(self) -> int:
        """The reset generation, changes of this group so far included."""
        return self._generation

    @property
    def counters(self) -> Counters:
        """The store's numbers after the requests so far."""
        return Counters(self._next.revision - 1, self._next.token - 1, self._generation)

    @property
    def has_counted(self) -> bool:
        """Whether the store's numbers have changed."""
        return self.counters != self._before

    def get(self, key: bytes) -> Record:
        """Read a key as the requests so far have left it."""
        if key in self._own:
            return self._own[key]
        if key in self._kept:
            return self._kept[key]
        slot = self._base.get(key)
        if slot is None or slot.record is NOT_DECODED:
            slot = self._slot(key)
        return slot.record

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
        stamp = self._next
        after, outcome = step(before, command, stamp)
        if after is not before:
            self._own[key] = after
            stamp.revision += is_stored_change(before, after)
            stamp.token += outcome.is_new_grant
            self._generation += isinstance(before, Done)
        return before, after, outcome

    def are_absent(self, keys: Sequence[bytes]) -> list[bool]:
        """Tell of each key whether it is known to be absent, and has been since the group began.

        Of a key that is named twice that is not known: the first claim of it may be granted.
        """
        if len(set(keys)) != len(keys):
            return [False] * len(keys)
        found = [slot is ABSENT_SLOT for slot in map(self._base.get, keys)]
        if self._kept.keys().isdisjoint(keys) and self._own.keys().isdisjoint(keys):
            return found
        return [
            is_absent and key not in self._kept and key not in self._own
            for key, is_absent in zip(keys, found, strict=True)
        ]

    def claim_absent(
        self, keys: Sequence[bytes], command: Claim
    ) -> tuple[Sequence[Record], Outcome]:
        """Apply a claim to keys of which `are_absent` says so, as `apply` would to one by one.

        Returns:
            The records after, and the answer to each.
        """
        records, outcome = claim_absent(command, self._next, len(keys))
        if outcome.is_new_grant:
            self._own.update(zip(keys, records, strict=True))
            self._next.revision += len(keys)
            self._next.token += len(keys)
        return records, outcome

    def complete_held(
        self, keys: Sequence[bytes], claim_id: bytes, tokens: Sequence[int]
    ) -> tuple[Sequence[Record], Outcome] | None:
        """Complete keys without values, as `apply` would one by one, if all are held by this claim.

        Args:
            keys: The keys, each once.
            claim_id: The claim.
            tokens: The token that each was granted with.

        Returns:
            The records after, and the answer to each; None, and nothing is changed: this is to be
            asked one by one.
        """
        if not (self._kept.keys().isdisjoint(keys) and self._own.keys().isdisjoint(keys)):
            return None
        slots = [slot for slot in map(self._base.get, keys) if slot is not None]
        if not keys or len(slots) != len(keys):
            return None
        found = complete_held(list(map(_record_of, slots)), claim_id, tokens, self._next)
        if found is not None:
            self._own.update(zip(keys, found[0], strict=True))
            self._next.revision += len(keys)
        return found

    def _count(self, counters: Counters) -> None:
        """Go on from these numbers: the next change gets those behind them."""
        self._next.revision = counters.revision + 1
        self._next.token = counters.token + 1
        self._generation = counters.generation

    def _is_damaged(self, key: bytes) -> bool:
        try:
            self.get(key)
        except DamagedRecordError:
            return True
        return False

    def _drop_damaged(self, key: bytes) -> tuple[Record, Record, Outcome]:
        """Make a key absent whose record is damaged: it may have been done, so this undoes it."""
        self._own[key] = None
        self._next.revision += 1
        self._generation += 1
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
        saved = self.counters
        self._own = {}
        try:
            value = request(self)
        except BaseException:
            self._own = {}
            self._count(saved)
            raise
        if self._kept:
            self._kept.update(self._own)
        else:
            self._kept = self._own
        self._own = {}
        return value

    def changes(self) -> Iterator[Change]:
        """Give the changed keys in order, those next to each other together that change alike."""
        keys, after = list(self._kept), list(self._kept.values())
        before = [
            self._slot_before(key) if slot is None or slot.record is NOT_DECODED else slot
            for key, slot in zip(keys, map(self._base.get, keys), strict=True)
        ]
        kinds = zip(map(type, map(_record_of, before)), map(type, after), strict=True)
        first = 0
        for _, run in itertools.groupby(kinds):
            end = first + sum(1 for _ in run)
            yield from _changed(Change(keys[first:end], before[first:end], after[first:end]))
            first = end

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


class Change(NamedTuple):
    """What becomes of some keys: all of one kind before, and of one kind after.

    Attributes:
        keys: The keys.
        before: What was stored for each.
        after: The record of each after the group.
    """

    keys: Sequence[bytes]
    before: Sequence[Slot]
    after: Sequence[Record]

    def parts(self) -> Iterator[Change]:
        """Give the change of each key by itself."""
        for key, slot, record in zip(*self, strict=True):
            yield Change((key,), (slot,), (record,))


def _changed(change: Change) -> Iterator[Change]:
    """Give what of this is a change: a key may be as it was after all."""
    kept = map(operator.is_, map(_record_of, change.before), change.after)
    if not any(kept):
        yield change
        return
    for part in change.parts():
        (slot,), (record,) = part.before, part.after
        if record is not slot.record or _is_dropped(slot):
            yield part


class Write(NamedTuple):
    """What a group writes.

    Attributes:
        swaps: The stored changes.
        meta: The store's numbers.
        held: Each changed key that is held now, its record and bytes, whether stored or not.
        ended: Each changed key that is not held now, likewise.
        is_needed: Something must reach the disk.
    """

    swaps: list[Swap]
    meta: Meta
    held: dict[bytes, Slot]
    ended: dict[bytes, Slot]
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
    held: dict[bytes, Slot] = {}
    ended: dict[bytes, Slot] = {}
    effects = Effects()

    def plan(change: Change) -> None:
        keys, before, after = change
        if not stores_deadline and _is_in_memory_only(change):
            held[keys[0]] = Slot(after[0], before[0].raw)
            return
        values = codec.encode_all(after, stores_deadline=stores_deadline)
        slots = held if isinstance(after[0], Held) else ended
        slots.update(zip(keys, map(_make_slot, zip(after, values, strict=True)), strict=True))
        raws = list(map(_raw_of, before))
        if values[0] == raws[0]:
            return
        marks, adds = effects.of(keys[0], _kind_before(before[0]), _KINDS[type(after[0])])
        if counted_below is not None and keys[0] >= counted_below:
            adds = ()
        swaps.append(Swap(keys, raws, values, marks, adds))

    for change in group.changes():
        if counted_below is None and _are_planned_at_once(change):
            plan(change)
        else:
            for part in change.parts():
                plan(part)
    is_needed = bool(swaps) or group.has_counted
    return Write(swaps, counters_meta(group.counters), held, ended, is_needed)


def _are_planned_at_once(change: Change) -> bool:
    """Tell whether what is stored besides the record is the same for all of these keys."""
    was = type(change.before[0].record)
    if was is type(change.after[0]) or not _is_of_one_namespace(change.keys):
        return False
    return was is not type(None) or all(slot is ABSENT_SLOT for slot in change.before)


def _is_of_one_namespace(keys: Sequence[bytes]) -> bool:
    """Tell whether all keys are known to be of the namespace of the first.

    All that lies between two keys with the same beginning has it, too.
    """
    if len(keys) == 1:
        return True
    first, last = min(keys), max(keys)
    prefix = codec.namespace_prefix(codec.namespace_of(keys[0]))
    if prefix:
        return first.startswith(prefix) and last.startswith(prefix)
    return last < codec.FIRST_WITH_NAMESPACE or first >= codec.FIRST_BEHIND_NAMESPACES


def _kind_before(slot: Slot) -> Kind | None:
    """Give the kind by which a key was counted and indexed."""
    if slot.record is None and slot.raw is not None:
        return _kind_of_damaged(slot.raw)
    return _KINDS[type(slot.record)]


def _is_in_memory_only(change: Change) -> bool:
    """Tell whether the change of one key need not reach the disk: only leases have such."""
    (before, raw), after = change.before[0], change.after[0]
    is_lease = isinstance(before, Held) and isinstance(after, Held)
    return is_lease and not is_stored_change(before, after) and not is_stored_as_expired(raw)


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


class Effects:
    """Gives what goes with the changes of a write: most of its keys have it in common."""

    def __init__(self) -> None:
        """Start without any."""
        self._namespace = b""
        self._prefix = b""
        self._known: dict[tuple[Kind | None, Kind | None], Effect] = {}

    def of(self, key: bytes, was: Kind | None, now: Kind | None) -> Effect:
        """Give what to change besides the record when a key goes from kind to kind."""
        if not self._prefix or not key.startswith(self._prefix):
            self._enter(codec.namespace_of(key))
        effect = self._known.get((was, now))
        if effect is None:
            effect = _index_marks(was, now), _counter_adds(self._namespace, was, now)
            self._known[was, now] = effect
        return effect

    def _enter(self, namespace: bytes) -> None:
        self._prefix = codec.namespace_prefix(namespace)
        if namespace != self._namespace:
            self._namespace = namespace
            self._known.clear()


def index_puts(
    key: bytes, was: Kind | None, now: Kind | None
) -> tuple[tuple[bytes, bytes | None], ...]:
    """Give the index entries to write when a key goes from one kind to another."""
    return tuple([(prefix + key, value) for prefix, value in _index_marks(was, now)])


def _index_marks(was: Kind | None, now: Kind | None) -> tuple[tuple[bytes, bytes | None], ...]:
    """Give what stands before the key in the index entries to write, and their values."""
    if was is now:
        return ()
    gone = ((codec.index_key(was, b""), None),) if was in _INDEXED else ()
    return (*gone, (codec.index_key(now, b""), b"")) if now in _INDEXED else gone


_INDEXED: Final = (Kind.HELD, Kind.FAILED)


def _counter_adds(
    namespace: bytes, was: Kind | None, now: Kind | None
) -> tuple[tuple[bytes, int], ...]:
    """Give the counters to change when a key goes from one kind to another."""
    if was is now:
        return ()
    adds = []
    if was is not None:
        adds.append((codec.counter_key(namespace, was), -1))
    if now is not None:
        adds.append((codec.counter_key(namespace, now), 1))
    return tuple(adds)
