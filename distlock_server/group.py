"""One group of requests, run over an overlay of what is stored.

A `Group` reads each record once, lets request after request see the changes of those before it, and
tells what has changed; `plan.py` makes a write of that. A request that raises leaves no trace. It
does no I/O: the table hands in what was read.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeVar

from distlock_server import codec
from distlock_server.state import (
    Answer,
    Claim,
    Command,
    Done,
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

_record_of: Final = operator.itemgetter(Slot._fields.index("record"))

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
        return self._are_untouched(keys)

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
        if self._are_untouched(keys):
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
        if not self._are_untouched(keys):
            return None
        slots = [slot for slot in map(self._base.get, keys) if slot is not None]
        if not keys or len(slots) != len(keys):
            return None
        found = complete_held(list(map(_record_of, slots)), claim_id, tokens, self._next)
        if found is not None:
            self._own.update(zip(keys, found[0], strict=True))
            self._next.revision += len(keys)
        return found

    def _are_untouched(self, keys: Sequence[bytes]) -> bool:
        """Tell whether no request of this group has changed any of these keys so far."""
        return self._kept.keys().isdisjoint(keys) and self._own.keys().isdisjoint(keys)

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
