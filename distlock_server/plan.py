"""What the changes of a group write: records, index entries, counters, the store's own numbers."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Final, NamedTuple, TypeAlias

from distlock_server import codec, codec_batch
from distlock_server.codec import Kind
from distlock_server.engines.base import Meta, Swap, encode_counter
from distlock_server.group import ABSENT_SLOT, Change, Counters, Group, Slot
from distlock_server.held_index import HeldIndex, Put
from distlock_server.quick import maker
from distlock_server.state import Done, Failed, Held, Record, is_stored_change

Marks: TypeAlias = tuple[tuple[bytes, bytes | None], ...]
Adds: TypeAlias = tuple[tuple[bytes, int], ...]
"""Those of a `Swap`."""

_make_slot: Final = maker(Slot)
_raw_of: Final = operator.itemgetter(Slot._fields.index("raw"))

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


def plan_write(
    group: Group,
    *,
    stores_deadline: bool,
    counted_below: bytes | None,
    index: HeldIndex | None = None,
) -> Write:
    """Turn a group's changes into one write.

    Args:
        group: The group after its requests have run.
        stores_deadline: The engine is shared, so deadlines live in the records.
        counted_below: Keys from here on are not counted yet (an old database); None: all are.
        index: Learns which leases begin and end, for the write is carried out, or the server ends.
            None: each held key has an index entry of its own.

    Returns:
        The write. It may be needed without a swap: what was granted and released within the group
        leaves no record, and its token must not be given out again.
    """
    planner = _Planner(stores_deadline, counted_below, index)
    for change in group.changes():
        is_at_once = counted_below is None and _are_planned_at_once(change)
        if not (is_at_once and planner.plan(change)):
            for part in change.parts():
                planner.plan(part)
    meta = counters_meta(group.counters)
    return Write(
        planner.swaps,
        meta._replace(puts=(*meta.puts, *planner.puts)),
        planner.held,
        planner.ended,
        is_needed=bool(planner.swaps) or group.has_counted,
    )


class _Planner:
    """Gathers what is written for one change after the other; see `Write`."""

    def __init__(
        self, stores_deadline: bool, counted_below: bytes | None, index: HeldIndex | None
    ) -> None:
        self.swaps: list[Swap] = []
        self.puts: list[Put] = []
        self.held: dict[bytes, Slot] = {}
        self.ended: dict[bytes, Slot] = {}
        self._stores_deadline = stores_deadline
        self._counted_below = counted_below
        self._index = index
        self._counters = _CounterAdds()

    def plan(self, change: Change) -> bool:
        """Plan what becomes of one key, or of several that need the same besides their records.

        Returns:
            False, and nothing is planned: they do not; ask for one by one.
        """
        keys, before, after = change
        if not self._stores_deadline and _is_in_memory_only(change):
            self.held[keys[0]] = Slot(after[0], before[0].raw)
            return True
        raws = list(map(_raw_of, before))
        values = codec_batch.encode_all(after, stores_deadline=self._stores_deadline)
        is_stored = values[0] != raws[0]
        was, now = _kind_before(before[0]), _KINDS[type(after[0])]
        marks = self._index_marks(change, was, now) if is_stored else ()
        if marks is None:
            return False
        slots = self.held if now is Kind.HELD else self.ended
        slots.update(zip(keys, map(_make_slot, zip(after, values, strict=True)), strict=True))
        if is_stored:
            is_counted = self._counted_below is None or keys[0] < self._counted_below
            adds = self._counters.of(keys[0], was, now) if is_counted else ()
            self.swaps.append(Swap(keys, raws, values, marks, adds))
        return True

    def _index_marks(self, change: Change, was: Kind | None, now: Kind | None) -> Marks | None:
        """Give the index entries to write for each of the keys; None: they differ."""
        index = self._index
        if index is None:
            return index_marks(was, now)
        if was is Kind.HELD:
            left = _leases_left(change)
            is_spanned = index.leave(left, self.puts) if left else False
            if is_spanned is None:
                return None
            return index_marks(None if is_spanned else was, now)
        if now is Kind.HELD and was is None and self._counted_below is None:
            entry = index.add(change.keys, [record.token for record in _held(change.after)])
            if entry is not None:
                self.puts.append(entry)
                return ()
        return index_marks(was, now)


def _leases_left(change: Change) -> list[int]:
    """Give the tokens of those leases that ended: their keys are not held, or by another."""
    before = _held([slot.record for slot in change.before])
    if isinstance(change.after[0], Held):
        # Leases that were taken over, or only changed, are planned one by one.
        return [lease.token for lease in before if lease.token != change.after[0].token]
    return [lease.token for lease in before]


def _held(records: Sequence[Record]) -> list[Held]:
    """Give the records that are leases; a damaged one is not known to be."""
    return [record for record in records if isinstance(record, Held)]


def _are_planned_at_once(change: Change) -> bool:
    """Tell whether all of these keys go from one kind to another, in one namespace."""
    if len(change.keys) == 1:
        return True
    was = type(change.before[0].record)
    if was is type(change.after[0]) or not _is_of_one_namespace(change.keys):
        return False
    return was is not type(None) or all(slot is ABSENT_SLOT for slot in change.before)


def _is_of_one_namespace(keys: Sequence[bytes]) -> bool:
    """Tell whether all keys are known to be of the namespace of the first.

    All that lies between two keys with the same beginning has it, too.
    """
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


class _CounterAdds:
    """Gives the counters that a write changes: most of its keys have them in common."""

    def __init__(self) -> None:
        """Start without any."""
        self._namespace = b""
        self._prefix = b""
        self._known: dict[tuple[Kind | None, Kind | None], Adds] = {}

    def of(self, key: bytes, was: Kind | None, now: Kind | None) -> Adds:
        """Give the counters to change when a key goes from kind to kind."""
        if not self._prefix or not key.startswith(self._prefix):
            self._enter(codec.namespace_of(key))
        adds = self._known.get((was, now))
        if adds is None:
            adds = self._known[was, now] = _counter_adds(self._namespace, was, now)
        return adds

    def _enter(self, namespace: bytes) -> None:
        self._prefix = codec.namespace_prefix(namespace)
        if namespace != self._namespace:
            self._namespace = namespace
            self._known.clear()


def index_puts(key: bytes, was: Kind | None, now: Kind | None) -> Marks:
    """Give the index entries to write when a key goes from one kind to another."""
    return tuple([(prefix + key, value) for prefix, value in index_marks(was, now)])


def index_marks(was: Kind | None, now: Kind | None) -> Marks:
    """Give what stands before the key in the index entries to write, and their values."""
    if was is now:
        return ()
    gone = ((codec.index_key(was, b""), None),) if was in _INDEXED else ()
    return (*gone, (codec.index_key(now, b""), b"")) if now in _INDEXED else gone


_INDEXED: Final = (Kind.HELD, Kind.FAILED)


def _counter_adds(namespace: bytes, was: Kind | None, now: Kind | None) -> Adds:
    """Give the counters to change when a key goes from one kind to another."""
    if was is now:
        return ()
    adds = []
    if was is not None:
        adds.append((codec.counter_key(namespace, was), -1))
    if now is not None:
        adds.append((codec.counter_key(namespace, now), 1))
    return tuple(adds)
