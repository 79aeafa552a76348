"""The lock table: read, step, commit; one committer, many waiting requests.

Requests are queued and run in the committer's thread, a group at a time. All changes of a group
share one synced write, and no reply of the group leaves before it: a negative answer that rests on
a change of the same group waits for the disk as well. Renewals that need no write are answered
between two writes without waiting for either (`try_renew`).

Locking: the store's mutex is held while a group runs and while its outcome is taken over, never
during I/O. A large group runs for long, so the event loop never waits for it: the queue and the
flags have a lock of their own, the watches another, and `try_renew` asks once.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from distlock_server.clock import Clock
from distlock_server.engines.base import APPLIED, Engine, EngineError
from distlock_server.failpoints import reach
from distlock_server.group import Group, Slot
from distlock_server.pending import (
    ContendedError,
    Notify,
    Pending,
    Rank,
    StorageError,
    TableClosedError,
    TableRunningError,
    Watch,
)
from distlock_server.plan import Write, is_stored_as_expired, plan_write
from distlock_server.queues import Queue
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
from distlock_server.store import Store

T = TypeVar("T")

MAX_GROUP_KEYS: Final = 20_000
"""Keys that one group may name before it is written; a single larger request is a group."""

MAX_LOST_SWAPS: Final = 20
"""Times a request is run again because another server changed its keys first."""

Txn = Group
"""What a request sees of the table while it runs."""


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
        self._store = Store(engine, clock)
        self._clock = clock
        self._notify = notify
        self._mutex = self._store.mutex
        self._ready = threading.Condition(threading.Lock())
        # Guarded by _ready: the queue, and whether the table is closing or dead.
        self._queue = Queue()
        self._closing = False
        self._dead: BaseException | None = None
        self._watching = threading.Lock()
        self._watches: dict[bytes, set[Watch]] = {}
        self._thread: threading.Thread | None = None

    # -- what requests come through ---------------------------------------------------------------

    @property
    def revision(self) -> int:
        """The store revision that is on disk."""
        return self._store.counters.revision

    @property
    def generation(self) -> int:
        """The reset generation that is on disk."""
        return self._store.counters.generation

    def blocks_done(self, digests: Sequence[bytes]) -> tuple[bytes, int]:
        """Tell of blocks of keys whether all of each is known to be done: 1, else 0.

        Returns:
            The answers, and the store revision that they rest on.
        """
        # Both numbers of one moment: the committer may put others in their place meanwhile.
        counters = self._store.counters
        known = self._store.done_blocks.known(digests, counters.generation)
        return known, counters.revision

    @property
    def engine_kind(self) -> str:
        """Name of the engine."""
        return self._store.engine.kind

    @property
    def is_shared(self) -> bool:
        """Whether other servers may change the keys as well."""
        return self._store.engine.shared

    @property
    def store(self) -> Store:
        """The store, for reading without the queue."""
        return self._store

    @property
    def database_id(self) -> bytes:
        """16 bytes made when the database was made."""
        return self._store.database_id

    def submit(
        self,
        keys: Sequence[bytes],
        run: Callable[[Group], T],
        context: object = None,
        *,
        rank: Rank = Rank.OTHER,
    ) -> Pending[T]:
        """Queue a request.

        Args:
            keys: The keys it names; others that `run` touches cost a read each.
            run: Called in the committer's thread with the group; quick, and pure but for it. It may
                be called again (another server changed a key first). If it raises, nothing it did
                is kept, and the error goes to this request alone.
            context: Handed back with the answer.
            rank: What it does: who renews goes first; see `queues.py`.

        Returns:
            The request; `Notify.answered` is called when it is answered.
        """
        pending = Pending(keys, run, context, rank=rank)
        with self._ready:
            if self._closing or self._dead is not None:
                pending.error = self._refusal()
            else:
                self._queue.put(pending)
                self._ready.notify()
                return pending
        self._notify.answered([pending])
        return pending

    def try_renew(self, key: bytes, command: Renew) -> tuple[Outcome, Record] | None:
        """Renew at once if nothing need be written.

        Returns:
            The outcome and the key's present state; None if the renewal must be queued: the key is
            being written, or the change is to be stored, or the key is not known to be held.

        Raises:
            TableRunningError: A group is run just now; ask again in a moment.
        """
        if self._store.engine.shared:
            return None
        if not self._mutex.acquire(blocking=False):
            raise TableRunningError
        try:
            return self._renew(key, command)
        finally:
            self._mutex.release()

    def _renew(self, key: bytes, command: Renew) -> tuple[Outcome, Record] | None:
        """Be `try_renew`; the mutex is held."""
        slot = self._store.held.get(key)
        if slot is None or key in self._store.writing:
            return None
        if self._closing or self._dead is not None:
            # Which leases are stored as expired may be settled already: promise no more time.
            return None
        now_ns = self._clock.now_ns()
        after, outcome = step(slot.record, command, Stamp(now_ns, 0, 0, 0))
        if is_stored_change(slot.record, after) or is_stored_as_expired(slot.raw):
            return None
        if outcome.answer is Answer.RENEWED:
            self._store.held[key] = Slot(after, slot.raw)
        return outcome, after

    # -- waiting ----------------------------------------------------------------------------------

    def watch(self, keys: Sequence[bytes], context: object) -> Watch:
        """Ask to be told (`Notify.changed`) when a key leaves its lease, or gets a shorter one."""
        watch = Watch(keys, context)
        with self._watching:
            for key in keys:
                self._watches.setdefault(key, set()).add(watch)
        return watch

    def unwatch(self, watch: Watch) -> None:
        """End a watch; ending it twice is no error."""
        with self._watching:
            for key in watch.keys:
                watchers = self._watches.get(key)
                if watchers is not None:
                    watchers.discard(watch)
                    if not watchers:
                        del self._watches[key]

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
        with self._mutex:
            pass  # a renewal that did not see the flag is over now
        if self._dead is None and not self._store.engine.shared:
            self._store.store_expired()
        reach("end.stored")
        self._store.close()
        reach("end.closed")

    def step_once(self) -> bool:
        """Run one group in the calling thread; tests and simulation use it instead of `start`.

        Returns:
            Whether there was anything to do.
        """
        with self._ready:
            batch = self._queue.take(MAX_GROUP_KEYS)
        if batch:
            reach("group.taken")
            self._run_batch(batch)
        elif not self._store.is_counted:
            self._store.count_old()
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
            while not self._queue and not self._closing and self._store.is_counted:
                self._ready.wait()
            return not self._closing

    def _run_batch(self, batch: list[Pending[Any]]) -> None:
        try:
            answered, watches = self._commit(batch)
        except BaseException as error:
            self._fail(batch, StorageError(f"the change may or may not be stored: {error}"))
            raise
        self._notify.answered(answered)
        reach("group.answered")
        if watches:
            self._notify.changed(watches)

    def _commit(self, batch: list[Pending[Any]]) -> tuple[list[Pending[Any]], list[Watch]]:
        store = self._store
        slots, engine_now_ns = store.read(key for pending in batch for key in pending.keys)
        reach("group.read")
        with self._mutex:
            # Renewals may have come in since the read: the deadlines in memory are the newest.
            slots.update((key, store.held[key]) for key in slots if key in store.held)
            group = Group(
                slots,
                store.counters,
                now_ns=engine_now_ns or self._clock.now_ns(),
                wall_ns=self._clock.wall_ns(),
                fetch=store.fetch,
                decode=store.decode,
                scan=store.scan,
            )
            for pending in batch:
                _run_pending(group, pending)
            reach("group.run")
            is_shared = store.engine.shared
            write = plan_write(
                group,
                stores_deadline=is_shared,
                counted_below=store.counted_below,
                index=None if is_shared else store.held_index,
            )
            store.writing = {**write.held, **write.ended}
        reach("group.planned")
        lost = self._write(write)
        reach("group.written")
        with self._mutex:
            store.counters = group.counters
            self._remember_done(group)
            reach("group.counted")
            watches = self._take_over(write, lost)
            store.writing = {}
        reach("group.taken_over")
        answered = self._sort_out_lost(batch, lost) if lost else batch
        return answered, watches

    def _remember_done(self, group: Group) -> None:
        """Remember which blocks were found done, unless something was undone since."""
        if self._store.engine.shared:
            return
        for keys, generation in group.done_blocks:
            self._store.done_blocks.add(keys, generation)

    def _write(self, write: Write) -> set[bytes]:
        """Put a write on disk; return the keys whose swaps were lost to another server."""
        if not write.is_needed:
            return set()
        applied = self._store.engine.commit(write.swaps, write.meta)
        keys = itertools.chain.from_iterable(swap.keys for swap in write.swaps)
        lost = {key for key, outcome in zip(keys, applied, strict=True) if outcome is not APPLIED}
        if lost and not self._store.engine.shared:
            msg = f"the database changed under the server: {min(lost)!r}"
            raise EngineError(msg)
        return lost

    def _take_over(self, write: Write, lost: set[bytes]) -> list[Watch]:
        """Take over what was written; give the watches of which a key left its lease."""
        for key in lost:
            write.held.pop(key, None)
            write.ended.pop(key, None)
        held = self._store.held
        known = list(filter(held.__contains__, write.held))
        ended = [key for key in known if _ends_sooner(write.held[key], held[key])]
        ended += write.ended
        if not self._store.engine.shared:
            held.update(write.held)
        for key in write.ended:
            held.pop(key, None)
        with self._watching:
            watched = filter(self._watches.__contains__, ended) if self._watches else ()
            found = [watch for key in watched for watch in self._watches[key]]
        return list(dict.fromkeys(found))

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
            self._queue.put_back(again)
        return answered

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
        with self._ready:
            left = self._queue.clear()
        if left:
            self._fail(left, self._refusal())

    def _die(self, error: BaseException) -> None:
        with self._ready:
            self._dead = error
        self._refuse_queued()
        self._notify.died(error)


def _ends_sooner(slot: Slot, before: Slot) -> bool:
    """Tell whether a lease was taken over by a shorter one: waits for its end set their clock."""
    now, then = slot.record, before.record
    return isinstance(now, Held) and isinstance(then, Held) and now.deadline_ns < then.deadline_ns


def _run_pending(group: Group, pending: Pending[Any]) -> None:
    try:
        pending.value = group.run(pending.run)
    except Exception as error:  # noqa: BLE001 - one bad request must not end the others
        pending.error = error
    pending.revision = group.revision
