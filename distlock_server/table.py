"""The lock table: read, step, commit; one committer, many waiting requests.

Requests are queued and run in the committer's thread, a group at a time. All changes of a group
share one synced write, and no reply of the group leaves before it: a negative answer that rests on
a change of the same group waits for the disk as well.

What lives in memory only: the deadlines of held keys (a shared engine keeps them in the record).
After a crash each lease runs anew for its full ttl, so renewals need no write, and are answered
between two writes without waiting for either (`try_renew`).

Locking: `_mutex` guards everything named there. It is held while a group runs and while its outcome
is taken over, never during I/O. `_base_*` may be read by the committer without it, as it alone
changes it.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Generic, NamedTuple, Protocol, TypeVar, cast

from distlock_server import codec
from distlock_server.clock import Clock
from distlock_server.codec import Kind, Opened
from distlock_server.engines.base import (
    APPLIED,
    SYSTEM_PREFIX,
    Engine,
    EngineError,
    Meta,
    decode_counter,
)
from distlock_server.group import (
    ABSENT_SLOT,
    Counters,
    Group,
    Slot,
    Write,
    counters_meta,
    is_stored_as_expired,
    keys_within,
    plan_write,
)
from distlock_server.oldbase import OldBase
from distlock_server.state import (
    Answer,
    Held,
    Outcome,
    Record,
    Renew,
    Stamp,
    is_stored_change,
    step,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_GROUP_KEYS: Final = 20_000
"""Keys that one group may name before it is written; a single larger request is a group."""

MAX_LOST_SWAPS: Final = 20
"""Times a request is run again because another server changed its keys first."""

_PAGE: Final = 2_000
"""Records read at once by counts and by opening and closing."""

Txn = Group
"""What a request sees of the table while it runs."""


class TableClosedError(Exception):
    """The table is shutting down; ask again, the server may come back."""


class StorageError(Exception):
    """The disk refused a write; its outcome is unknown, and the server must end."""


class ContendedError(Exception):
    """Other servers kept changing the same keys."""


class Pending(Generic[T]):
    """A request in the queue, and later its answer.

    Attributes:
        keys: The keys it may touch.
        value: What its function returned.
        error: What went wrong instead; None if nothing did.
        revision: The store revision its answer rests on.
        context: The submitter's own, untouched.
    """

    __slots__ = ("context", "error", "keys", "lost_swaps", "revision", "run", "value")

    def __init__(self, keys: Sequence[bytes], run: Callable[[Group], T], context: object) -> None:
        """Make a request; see `Table.submit`."""
        self.keys = keys
        self.run = run
        self.context = context
        self.value: T | None = None
        self.error: BaseException | None = None
        self.revision = 0
        self.lost_swaps = 0

    def result(self) -> T:
        """Give the value.

        Raises:
            BaseException: What went wrong.
        """
        if self.error is not None:
            raise self.error
        return cast("T", self.value)


class Notify(Protocol):
    """Tells the outside what is ready; called in the committer's thread, must not block."""

    def answered(self, answered: Sequence[Pending[Any]]) -> None:
        """Take the answers of one group."""
        ...

    def changed(self, watches: Sequence[Watch]) -> None:
        """Take the watches of which a key is no longer under the lease it was under."""
        ...

    def died(self, error: BaseException) -> None:
        """Take the error that ended the committer: the process must end."""
        ...


class Watch:
    """Somebody waiting for some keys; `context` is the watcher's own."""

    __slots__ = ("context", "keys")

    def __init__(self, keys: Sequence[bytes], context: object) -> None:
        """Watch these keys."""
        self.keys = keys
        self.context = context


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


class Table:
    """The lock table over one engine."""

    def __init__(self, engine: Engine, clock: Clock, notify: Notify) -> None:
        """Open the table.

        Args:
            engine: Where records are kept; closed with the table.
            clock: The server's time.
            notify: Where answers go.

        Raises:
            EngineError: The database cannot be read, or is of a newer format.
        """
        self._engine = engine
        self._clock = clock
        self._notify = notify
        self._opened = Opened(clock.now_ns(), clock.wall_ns())
        self._mutex = threading.Lock()
        self._ready = threading.Condition(self._mutex)
        self._queue: deque[Pending[Any]] = deque()
        self._writing: dict[bytes, Slot] = {}
        self._held: dict[bytes, Slot] = {}
        self._watches: dict[bytes, set[Watch]] = {}
        self._closing = False
        self._dead: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._old = OldBase(engine, self._opened)
        self.database_id, self._counters = self._open_store()
        if not engine.shared:
            self._load_held()

    # -- what requests come through ---------------------------------------------------------------

    @property
    def revision(self) -> int:
        """The store revision that is on disk."""
        return self._counters.revision

    @property
    def generation(self) -> int:
        """The reset generation that is on disk."""
        return self._counters.generation

    @property
    def engine_kind(self) -> str:
        """Name of the engine."""
        return self._engine.kind

    @property
    def is_shared(self) -> bool:
        """Whether other servers may change the keys as well."""
        return self._engine.shared

    def has_live_lease(self) -> bool:
        """Tell whether a lease runs that lives in this server's memory."""
        now_ns = self._clock.now_ns()
        with self._mutex:
            return any(
                not cast("Held", slot.record).is_expired(now_ns) for slot in self._held.values()
            )

    def submit(
        self, keys: Sequence[bytes], run: Callable[[Group], T], context: object = None
    ) -> Pending[T]:
        """Queue a request.

        Args:
            keys: The keys it names; others that `run` touches cost a read each.
            run: Called in the committer's thread with the group; quick, and pure but for it. It may
                be called again (another server changed a key first). If it raises, nothing it did
                is kept, and the error goes to this request alone.
            context: Handed back with the answer.

        Returns:
            The request; `Notify.answered` is called when it is answered.
        """
        pending = Pending(keys, run, context)
        with self._ready:
            if self._closing or self._dead is not None:
                pending.error = self._refusal()
            else:
                self._queue.append(pending)
                self._ready.notify()
                return pending
        self._notify.answered([pending])
        return pending

    def try_renew(self, key: bytes, command: Renew) -> tuple[Outcome, Record] | None:
        """Renew at once if nothing need be written.

        Returns:
            The outcome and the key's present state; None if the renewal must be queued: the key is
            being written, or the change is to be stored, or the key is not known to be held.
        """
        if self._engine.shared:
            return None
        with self._mutex:
            slot = self._held.get(key)
            if slot is None or key in self._writing or self._dead is not None:
                return None
            now_ns = self._clock.now_ns()
            after, outcome = step(slot.record, command, Stamp(now_ns, 0, 0, 0))
            if is_stored_change(slot.record, after) or is_stored_as_expired(slot.raw):
                return None
            if outcome.answer is Answer.RENEWED:
                self._held[key] = Slot(after, slot.raw)
            return outcome, after

    # -- waiting ----------------------------------------------------------------------------------

    def watch(self, keys: Sequence[bytes], context: object) -> Watch:
        """Ask to be told (`Notify.changed`) when one of the keys leaves its lease."""
        watch = Watch(keys, context)
        with self._mutex:
            for key in keys:
                self._watches.setdefault(key, set()).add(watch)
        return watch

    def unwatch(self, watch: Watch) -> None:
        """End a watch; ending it twice is no error."""
        with self._mutex:
            for key in watch.keys:
                watchers = self._watches.get(key)
                if watchers is not None:
                    watchers.discard(watch)
                    if not watchers:
                        del self._watches[key]

    # -- reading without the queue ----------------------------------------------------------------

    def peek(self, key: bytes) -> Record:
        """Read a record as it is on disk, in the calling thread.

        Raises:
            CodecError: It is damaged.
        """
        (raw,), _ = self._engine.read([key])
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
        if only is not None and not (only is Kind.HELD and not self._engine.shared):
            return self._list_index(only, start, end, limit)
        if only is Kind.HELD:
            found = self._list_held(start, end, limit + 1)
        else:
            found = self._scan_committed(start, end, limit + 1)
        next_start = found[limit][0] if len(found) > limit else b""
        return Page(found[:limit], next_start)

    def count(self, namespace: bytes) -> tuple[Counts, bool]:
        """Count a namespace from its counters.

        Returns:
            The counts, and whether they are complete (an old database may still be being counted).
        """
        kinds = (Kind.DONE, Kind.FAILED, Kind.HELD)
        raws, _ = self._engine.read([codec.counter_key(namespace, kind) for kind in kinds])
        done, failed, held = (decode_counter(raw) for raw in raws)
        now_ns = self._clock.now_ns()
        with self._mutex:
            expired = sum(
                1
                for key, slot in self._held.items()
                if codec.namespace_of(key) == namespace
                and cast("Held", slot.record).is_expired(now_ns)
            )
        expired = min(expired, held)
        return Counts(done, held - expired, expired, failed), self._old.is_counted

    def count_range(self, start: bytes, end: bytes) -> Counts:
        """Count keys with start <= key < end by reading them; an empty `end` is open."""
        done = held = expired = failed = 0
        now_ns = self._clock.now_ns()
        while True:
            page = self._engine.scan(start, end, _PAGE)
            for key, raw in page:
                kind = codec.kind_of(raw)
                if kind is Kind.DONE:
                    done += 1
                elif kind is Kind.FAILED:
                    failed += 1
                elif cast("Held", self._record(key, raw)).is_expired(now_ns):
                    expired += 1
                else:
                    held += 1
            if len(page) < _PAGE:
                return Counts(done, held, expired, failed)
            start = page[-1][0] + b"\x00"

    # -- the committer ----------------------------------------------------------------------------

    def start(self) -> None:
        """Start the committer's thread."""
        self._thread = threading.Thread(target=self._work, name="committer", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer what is being written, refuse the rest, store expired leases, close the engine."""
        with self._ready:
            if self._closing:
                return
            self._closing = True
            self._ready.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._refuse_queued()
        if self._dead is None and not self._engine.shared:
            self._store_expired()
        self._engine.close()

    def step_once(self) -> bool:
        """Run one group in the calling thread; tests and simulation use it instead of `start`.

        Returns:
            Whether there was anything to do.
        """
        with self._mutex:
            batch = self._take_batch()
        if batch:
            self._run_batch(batch)
        elif not self._old.is_counted:
            self._count_old()
        else:
            return False
        return True

    def _work(self) -> None:
        try:
            while self._await_work():
                self.step_once()
        except BaseException as error:  # noqa: BLE001 - whatever it is, nobody would be answered again
            self._die(error)

    def _await_work(self) -> bool:
        with self._ready:
            while not self._queue and not self._closing and self._old.is_counted:
                self._ready.wait()
            return not self._closing

    def _take_batch(self) -> list[Pending[Any]]:
        batch: list[Pending[Any]] = []
        n_keys = 0
        while self._queue and n_keys < MAX_GROUP_KEYS:
            n_keys += len(self._queue[0].keys)
            if batch and n_keys > MAX_GROUP_KEYS:
                break
            batch.append(self._queue.popleft())
        return batch

    def _run_batch(self, batch: list[Pending[Any]]) -> None:
        try:
            answered, watches = self._commit(batch)
        except BaseException as error:
            self._fail(batch, StorageError(f"the change may or may not be stored: {error}"))
            raise
        self._notify.answered(answered)
        if watches:
            self._notify.changed(watches)

    def _commit(self, batch: list[Pending[Any]]) -> tuple[list[Pending[Any]], list[Watch]]:
        slots, engine_now_ns = self._read(batch)
        with self._mutex:
            # Renewals may have come in since the read: the deadlines in memory are the newest.
            slots.update((key, self._held[key]) for key in slots if key in self._held)
            group = Group(
                slots,
                self._counters,
                now_ns=engine_now_ns or self._clock.now_ns(),
                wall_ns=self._clock.wall_ns(),
                fetch=self._fetch,
                scan=self._scan_committed,
            )
            for pending in batch:
                _run_pending(group, pending)
            write = plan_write(
                group, stores_deadline=self._engine.shared, counted_below=self._old.counted_below
            )
            self._writing = write.slots
        lost = self._write(write)
        with self._mutex:
            self._counters = group.counters
            watches = self._take_over(write.slots, lost)
            self._writing = {}
        answered = self._sort_out_lost(batch, lost) if lost else batch
        return answered, watches

    def _write(self, write: Write) -> set[bytes]:
        """Put a write on disk; return the keys whose swaps were lost to another server."""
        if not write.is_needed:
            return set()
        applied = self._engine.commit(write.swaps, write.meta)
        lost = {
            swap.key
            for swap, outcome in zip(write.swaps, applied, strict=True)
            if outcome is not APPLIED
        }
        if lost and not self._engine.shared:
            msg = f"the database changed under the server: {min(lost)!r}"
            raise EngineError(msg)
        return lost

    def _take_over(self, slots: dict[bytes, Slot], lost: set[bytes]) -> list[Watch]:
        watches: dict[Watch, None] = {}
        for key, slot in slots.items():
            if key in lost:
                continue
            if isinstance(slot.record, Held):
                if not self._engine.shared:
                    self._held[key] = slot
                continue
            self._held.pop(key, None)
            watches.update(dict.fromkeys(self._watches.get(key, ())))
        return list(watches)

    def _sort_out_lost(self, batch: list[Pending[Any]], lost: set[bytes]) -> list[Pending[Any]]:
        """Queue the requests again that touched a lost key; return the others.

        A request that comes round finds what it already did and gets the same answers again.
        """
        answered: list[Pending[Any]] = []
        again: list[Pending[Any]] = []
        for pending in batch:
            if lost.isdisjoint(pending.keys):
                answered.append(pending)
            elif pending.lost_swaps >= MAX_LOST_SWAPS:
                pending.error = ContendedError("other servers keep changing these keys; try again")
                answered.append(pending)
            else:
                pending.lost_swaps += 1
                pending.error = None
                again.append(pending)
        with self._ready:
            self._queue.extendleft(reversed(again))
        return answered

    # -- reading ----------------------------------------------------------------------------------

    def _read(self, batch: Iterable[Pending[Any]]) -> tuple[dict[bytes, Slot], int]:
        """Read what a batch names; held keys are known already."""
        wanted = {key: None for pending in batch for key in pending.keys}
        # Only this thread adds to or removes from `_held`; renewals replace values.
        unknown = [key for key in wanted if key not in self._held]
        slots = dict.fromkeys(wanted, ABSENT_SLOT)
        if not unknown and not self._engine.shared:
            return slots, 0
        raws, engine_now_ns = self._engine.read(unknown)
        for key, raw in zip(unknown, raws, strict=True):
            if raw is None:
                continue
            try:
                slots[key] = self._slot(key, raw)
            except codec.CodecError:
                # Left out: the request that names it fetches it by itself, and fails alone.
                del slots[key]
        return slots, engine_now_ns

    def _fetch(self, key: bytes) -> Slot:
        held = self._held.get(key)
        if held is not None:
            return held
        (raw,), _ = self._engine.read([key])
        return ABSENT_SLOT if raw is None else self._slot(key, raw)

    def _slot(self, key: bytes, raw: bytes) -> Slot:
        try:
            return Slot(codec.decode(raw, self._opened), raw)
        except codec.CodecError as error:
            msg = f"the record of key {key!r} is damaged: {error}"
            raise codec.CodecError(msg) from error

    def _record(self, key: bytes, raw: bytes) -> Record:
        """Decode a committed record for a reader outside the committer."""
        kind = codec.kind_of(raw)
        if kind is not Kind.HELD or self._engine.shared:
            return self._slot(key, raw).record
        slot = self._held.get(key) or self._writing.get(key)
        if slot is not None and isinstance(slot.record, Held):
            return slot.record
        return self._slot(key, raw).record

    def _scan_committed(self, start: bytes, end: bytes, limit: int) -> list[tuple[bytes, Record]]:
        found = self._engine.scan(start, min(end or SYSTEM_PREFIX, SYSTEM_PREFIX), limit)
        return [(key, self._record(key, raw)) for key, raw in found]

    def _list_held(self, start: bytes, end: bytes, limit: int) -> list[tuple[bytes, Record]]:
        with self._mutex:
            slots = list(self._held.items())
        # Sorted without the mutex: with many held keys that takes a while.
        records = {key: slot.record for key, slot in slots}
        wanted = keys_within(sorted(records), start, end, limit)
        return [(key, records[key]) for key in wanted]

    def _list_index(self, kind: Kind, start: bytes, end: bytes, limit: int) -> Page:
        """List by an index; the page is short where keys left the kind between the two reads."""
        first, last = codec.index_key(kind, start), codec.index_key(kind, end or SYSTEM_PREFIX)
        skip = len(codec.index_key(kind, b""))
        keys = [key[skip:] for key, _ in self._engine.scan(first, last, limit + 1)]
        next_start = keys[limit] if len(keys) > limit else b""
        keys = keys[:limit]
        raws, _ = self._engine.read(keys)
        records = [
            (key, self._record(key, raw))
            for key, raw in zip(keys, raws, strict=True)
            if raw is not None and codec.kind_of(raw) is kind
        ]
        return Page(records, next_start)

    # -- opening and closing ----------------------------------------------------------------------

    def _open_store(self) -> tuple[bytes, Counters]:
        keys = [
            codec.FORMAT_KEY,
            codec.DATABASE_ID_KEY,
            codec.REVISION_KEY,
            codec.TOKEN_KEY,
            codec.GENERATION_KEY,
        ]
        (stored_format, database_id, revision, token, generation), _ = self._engine.read(keys)
        counters = Counters(*map(decode_counter, (revision, token, generation)))
        if stored_format is None:
            database_id = uuid.uuid4().bytes
            puts = ((codec.FORMAT_KEY, codec.FORMAT), (codec.DATABASE_ID_KEY, database_id))
            old = self._old.begin()
            self._engine.commit([], Meta(puts + counters_meta(counters).puts + old))
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
            page = self._engine.scan(start, end, _PAGE)
            keys = [key[skip:] for key, _ in page]
            raws, _ = self._engine.read(keys)
            for key, raw in zip(keys, raws, strict=True):
                if raw is not None and codec.kind_of(raw) is Kind.HELD:
                    self._held[key] = self._slot(key, raw)
            if len(page) < _PAGE:
                return
            start = page[-1][0] + b"\x00"

    def _count_old(self) -> None:
        """Count a piece of a database that was written without counters."""
        found = self._old.count_piece()
        with self._mutex:
            for key, raw in found:
                if key not in self._held:
                    self._held[key] = self._slot(key, raw)

    def _store_expired(self) -> None:
        """Mark the leases that ran out, so that they do not run anew after the restart."""
        now_ns = self._clock.now_ns()
        expired = [
            (key, slot)
            for key, slot in self._held.items()
            if isinstance(slot.record, Held) and slot.record.is_expired(now_ns)
        ]
        try:
            for first in range(0, len(expired), _PAGE):
                piece = expired[first : first + _PAGE]
                self._engine.commit(
                    [codec.expired_swap(k, s.record, s.raw) for k, s in piece], Meta()
                )
        except EngineError:
            logger.exception(
                "could not store which leases had expired; they run anew for their ttl"
            )

    # -- ending badly -----------------------------------------------------------------------------

    def _refusal(self) -> Exception:
        if self._dead is not None:
            return StorageError(f"the server is ending: {self._dead}")
        return TableClosedError("the server is shutting down; try again")

    def _fail(self, batch: list[Pending[Any]], error: Exception) -> None:
        for pending in batch:
            pending.error = error
        self._notify.answered(batch)

    def _refuse_queued(self) -> None:
        with self._mutex:
            left = list(self._queue)
            self._queue.clear()
        if left:
            self._fail(left, self._refusal())

    def _die(self, error: BaseException) -> None:
        with self._mutex:
            self._dead = error
        self._refuse_queued()
        self._notify.died(error)


def _run_pending(group: Group, pending: Pending[Any]) -> None:
    try:
        pending.value = group.run(pending.run)
    except Exception as error:  # noqa: BLE001 - one bad request must not end the others
        pending.error = error
    pending.revision = group.revision
