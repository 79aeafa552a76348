"""What is stored, and what of it lives in memory: reading, opening, closing.

The deadlines of held keys live in memory only (a shared engine keeps them in the record). After a
crash each lease runs anew for its full ttl, so renewals need no write.

Locking: `mutex` guards `held` and `writing`. It is held for moments, never during I/O. Keys are
added to and taken out of `held` by the committer alone, which may therefore look without it;
renewals, which replace values, come from other threads.
"""

from __future__ import annotations

import heapq
import logging
import operator
import threading
import uuid
from collections.abc import Iterable
from typing import Final, NamedTuple, cast

from distlock_server import codec
from distlock_server.clock import Clock
from distlock_server.codec import Kind, Opened
from distlock_server.done_blocks import DoneBlocks
from distlock_server.engines.base import SYSTEM_PREFIX, Engine, EngineError, Meta, decode_counter
from distlock_server.failpoints import reach
from distlock_server.group import (
    ABSENT_SLOT,
    NOT_DECODED,
    Counters,
    DamagedRecordError,
    Slot,
)
from distlock_server.held_index import HeldIndex
from distlock_server.oldbase import OldBase
from distlock_server.plan import counters_meta
from distlock_server.state import Held, Record

logger = logging.getLogger(__name__)

_SPANS_PAGE: Final = 10
"""Spans read at once: each may have very many keys."""

_PAGE: Final = 2_000
"""Records read at once by counts and by opening and closing."""


class Page(NamedTuple):
    """A page of records in byte order; `next_start` is empty at the end of the range."""

    records: list[tuple[bytes, Record]]
    next_start: bytes


class Counts(NamedTuple):
    """How many keys are in which state; held: with a lease that runs."""

    done: int = 0
    held: int = 0
    expired: int = 0
    failed: int = 0

    def plus(self, other: Counts) -> Counts:
        """Add up."""
        return Counts(*map(operator.add, self, other))


class Store:
    """The records of one engine, and the held ones in memory.

    Attributes:
        engine: Where records are kept.
        counters: The store's own running numbers, as they are on disk.
        database_id: 16 bytes made when the database was made.
        mutex: Guards `held` and `writing`.
        held: Held keys with their live deadlines (not with a shared engine).
        held_index: Which of those share an index entry (not with a shared engine).
        writing: Changes that are on their way to the disk.
        done_blocks: Blocks of keys that were found wholly done (not with a shared engine).
    """

    def __init__(self, engine: Engine, clock: Clock) -> None:
        """Open the store.

        Args:
            engine: Where records are kept; closed with the store.
            clock: The server's time.

        Raises:
            EngineError: The database cannot be read, or is of a newer format.
        """
        self.engine = engine
        self.mutex = threading.Lock()
        self.held: dict[bytes, Slot] = {}
        self.writing: dict[bytes, Slot] = {}
        self.held_index = HeldIndex()
        self.done_blocks = DoneBlocks()
        self._clock = clock
        self._opened = Opened(clock.now_ns(), clock.wall_ns())
        self._old = OldBase(engine, self._opened)
        reach("start.opened")
        self.database_id, self.counters = self._open_store()
        reach("start.written")
        if not engine.shared:
            self._load_held()
            self._load_spans()
        reach("start.loaded")

    @property
    def is_counted(self) -> bool:
        """Whether every key is in the counters."""
        return self._old.is_counted

    @property
    def counted_below(self) -> bytes | None:
        """Keys from here on are not in the counters yet; None: all are."""
        return self._old.counted_below

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()

    def has_live_lease(self) -> bool:
        """Tell whether a lease runs that lives in this server's memory."""
        now_ns = self._clock.now_ns()
        with self.mutex:
            return any(
                not cast("Held", slot.record).is_expired(now_ns) for slot in self.held.values()
            )

    def peek(self, key: bytes) -> Record:
        """Read a record as it is on disk, in the calling thread.

        Raises:
            CodecError: It is damaged.
        """
        (raw,), _ = self.engine.read([key])
        return None if raw is None else self._record(key, raw)

    def list_page(self, start: bytes, end: bytes, limit: int, only: Kind | None = None) -> Page:
        """List records as they are on disk, in the calling thread.

        Args:
            start: First key, inclusive.
            end: Last key, exclusive; empty: to the end.
            limit: Records in the page at most, above 0.
            only: Only held or only failed keys.

        Returns:
            The page. A record that cannot be decoded raises `CodecError`.
        """
        if only is Kind.DONE:
            raise ValueError("done keys have no index")
        if only is not None and not (only is Kind.HELD and not self.engine.shared):
            return self._list_index(only, start, end, limit)
        if only is Kind.HELD:
            found = self._list_held(start, end, limit + 1)
        else:
            found = self.scan(start, end, limit + 1)
        next_start = found[limit][0] if len(found) > limit else b""
        return Page(found[:limit], next_start)

    def count(self, namespace: bytes) -> tuple[Counts, bool]:
        """Count a namespace from its counters.

        Returns:
            The counts, and whether they are complete (an old database may still be being counted).
        """
        kinds = (Kind.DONE, Kind.FAILED, Kind.HELD)
        raws, _ = self.engine.read([codec.counter_key(namespace, kind) for kind in kinds])
        # Resetting a damaged record may count one too few: its kind is not known for sure.
        done, failed, held = (max(0, decode_counter(raw)) for raw in raws)
        now_ns = self._clock.now_ns()
        with self.mutex:
            expired = sum(
                1
                for key, slot in self.held.items()
                if codec.namespace_of(key) == namespace
                and cast("Held", slot.record).is_expired(now_ns)
            )
        expired = min(expired, held)
        return Counts(done, held - expired, expired, failed), self._old.is_counted

    def count_range(self, start: bytes, end: bytes) -> Counts:
        """Count keys with start <= key < end by reading them; an empty `end` is open."""
        counts, next_start = self.count_piece(start, end)
        while next_start:
            more, next_start = self.count_piece(next_start, end)
            counts = counts.plus(more)
        return counts

    def count_piece(self, start: bytes, end: bytes) -> tuple[Counts, bytes]:
        """Count the first keys of a range; say where the next piece starts, empty: nowhere."""
        done = held = expired = failed = 0
        now_ns = self._clock.now_ns()
        page = self.engine.scan(start, end, _PAGE)
        for key, raw in page:
            kind = _kind(key, raw)
            if kind is Kind.DONE:
                done += 1
            elif kind is Kind.FAILED:
                failed += 1
            elif cast("Held", self._record(key, raw)).is_expired(now_ns):
                expired += 1
            else:
                held += 1
        next_start = page[-1][0] + b"\x00" if len(page) == _PAGE else b""
        return Counts(done, held, expired, failed), next_start

    def read(self, keys: Iterable[bytes]) -> tuple[dict[bytes, Slot], int]:
        """Read what a group names; held keys are known already.

        Returns:
            A slot for each key, its record not decoded yet, and the engine's time or 0.
        """
        wanted = dict.fromkeys(keys)
        # Only this thread adds to or removes from `_held`; renewals replace values.
        unknown = [key for key in wanted if key not in self.held]
        slots = dict.fromkeys(wanted, ABSENT_SLOT)
        if not unknown and not self.engine.shared:
            return slots, 0
        raws, engine_now_ns = self.engine.read(unknown)
        for key, raw in zip(unknown, raws, strict=True):
            if raw is not None:
                # Decoded by the request that needs it: if it is damaged, that one fails alone.
                slots[key] = Slot(NOT_DECODED, raw)
        return slots, engine_now_ns

    def fetch(self, key: bytes) -> Slot:
        """Read a key for the committer.

        Raises:
            DamagedRecordError: Its record is damaged.
        """
        held = self.held.get(key)
        if held is not None:
            return held
        (raw,), _ = self.engine.read([key])
        return ABSENT_SLOT if raw is None else self.decode(key, raw)

    def decode(self, key: bytes, raw: bytes) -> Slot:
        """Decode a record.

        Raises:
            DamagedRecordError: It is damaged.
        """
        try:
            return Slot(codec.decode(raw, self._opened), raw)
        except codec.CodecError as error:
            raise DamagedRecordError(key, raw, error) from error

    def _record(self, key: bytes, raw: bytes) -> Record:
        """Decode a committed record for a reader outside the committer."""
        if not self.engine.shared and _kind(key, raw) is Kind.HELD:
            for slot in (self.held.get(key), self.writing.get(key)):
                # The same bytes: what is still on its way to the disk is not shown.
                if slot is not None and slot.raw == raw:
                    return slot.record
        return self.decode(key, raw).record

    def scan(self, start: bytes, end: bytes, limit: int) -> list[tuple[bytes, Record]]:
        """List committed records of user keys; an empty `end` is open."""
        found = self.engine.scan(start, min(end or SYSTEM_PREFIX, SYSTEM_PREFIX), limit)
        return [(key, self._record(key, raw)) for key, raw in found]

    def _list_held(self, start: bytes, end: bytes, limit: int) -> list[tuple[bytes, Record]]:
        with self.mutex:
            slots = list(self.held.items())
        # Without the mutex, and without a sort of all: with many held keys that takes a while, and
        # no other thread can do anything meanwhile.
        within = {
            key: slot.record for key, slot in slots if start <= key and (not end or key < end)
        }
        return [(key, within[key]) for key in heapq.nsmallest(limit, within)]

    def _list_index(self, kind: Kind, start: bytes, end: bytes, limit: int) -> Page:
        """List by an index; the page is short where keys left the kind between the two reads."""
        first, last = codec.index_key(kind, start), codec.index_key(kind, end or SYSTEM_PREFIX)
        skip = len(codec.index_key(kind, b""))
        keys = [key[skip:] for key, _ in self.engine.scan(first, last, limit + 1)]
        next_start = keys[limit] if len(keys) > limit else b""
        keys = keys[:limit]
        raws, _ = self.engine.read(keys)
        records = [
            (key, self._record(key, raw))
            for key, raw in zip(keys, raws, strict=True)
            if raw is not None and _kind(key, raw) is kind
        ]
        return Page(records, next_start)

    def _open_store(self) -> tuple[bytes, Counters]:
        keys = [
            codec.FORMAT_KEY,
            codec.DATABASE_ID_KEY,
            codec.REVISION_KEY,
            codec.TOKEN_KEY,
            codec.GENERATION_KEY,
        ]
        (stored_format, database_id, revision, token, generation), _ = self.engine.read(keys)
        counters = Counters(*map(decode_counter, (revision, token, generation)))
        if stored_format is None:
            database_id = uuid.uuid4().bytes
            puts = ((codec.FORMAT_KEY, codec.FORMAT), (codec.DATABASE_ID_KEY, database_id))
            old = self._old.begin()
            self.engine.commit([], Meta(puts + counters_meta(counters).puts + old))
        elif stored_format != codec.FORMAT:
            msg = (
                f"the database has format {stored_format!r}, this server reads {codec.FORMAT!r}: "
                "use the version of distlock that wrote it, or a newer one"
            )
            raise EngineError(msg)
        else:
            self._old.resume()
        return database_id or b"", counters

    def _load_held(self) -> None:
        """Take the held keys into memory, each with its full ttl from now."""
        start = codec.index_key(Kind.HELD, b"")
        end = codec.index_key(Kind.HELD, SYSTEM_PREFIX)
        skip = len(start)
        while True:
            page = self.engine.scan(start, end, _PAGE)
            keys = [key[skip:] for key, _ in page]
            raws, _ = self.engine.read(keys)
            for key, raw in zip(keys, raws, strict=True):
                if raw is not None:
                    self._load(key, raw)
            if len(page) < _PAGE:
                return
            start = page[-1][0] + b"\x00"

    def _load_spans(self) -> None:
        """Take the keys into memory that have an index entry together."""
        start, empty = codec.span_key(0), list[tuple[bytes, None]]()
        while True:
            page = self.engine.scan(start, codec.SPANS_END, _SPANS_PAGE)
            for entry, joined in page:
                try:
                    first, keys = codec.decode_span(entry, joined)
                except codec.CodecError as error:
                    logger.error("%s", error)  # noqa: TRY400 - as in `_load`
                    continue
                raws, _ = self.engine.read(keys)
                n_left = 0
                for token, (key, raw) in enumerate(zip(keys, raws, strict=True), first):
                    # A damaged record may be of the span.
                    n_left += raw is not None and self._load(key, raw) in (token, None)
                if n_left:
                    self.held_index.load(first, len(keys), n_left)
                else:
                    empty.append((entry, None))
            if len(page) < _SPANS_PAGE:
                break
            start = page[-1][0] + b"\x00"
        if empty:
            self.engine.commit([], Meta(puts=tuple(empty)))

    def _load(self, key: bytes, raw: bytes) -> int | None:
        """Take a key into memory if it is held.

        Returns:
            The token of its lease, 0 if there is none; None: the record is damaged.
        """
        try:
            if codec.kind_of(raw) is not Kind.HELD:
                return 0
            slot = self.held[key] = self.decode(key, raw)
        except codec.CodecError as error:
            # Whoever asks for the key is told; the others must not go without a server.
            logger.error("%s", error)  # noqa: TRY400 - a traceback would say nothing more
            return None
        return cast("Held", slot.record).token

    def count_old(self) -> None:
        """Count a piece of a database that was written without counters."""
        found = self._old.count_piece()
        with self.mutex:
            for key, raw in found:
                if key not in self.held:
                    self.held[key] = self.decode(key, raw)

    def store_expired(self) -> None:
        """Mark the leases that ran out, so that they do not run anew after the restart."""
        now_ns = self._clock.now_ns()
        expired = [
            (key, slot)
            for key, slot in self.held.items()
            if isinstance(slot.record, Held) and slot.record.is_expired(now_ns)
        ]
        try:
            for first in range(0, len(expired), _PAGE):
                piece = expired[first : first + _PAGE]
                self.engine.commit(
                    [codec.expired_swap(k, s.record, s.raw) for k, s in piece], Meta()
                )
        except EngineError:
            logger.exception(
                "could not store which leases had expired; they run anew for their ttl"
            )


def _kind(key: bytes, raw: bytes) -> Kind:
    try:
        return codec.kind_of(raw)
    except codec.CodecError as error:
        raise DamagedRecordError(key, raw, error) from error
