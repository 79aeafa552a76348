"""The leases under which this process works on items right now; `notify_*` look here.

An item is handed out by an iterator and settled once: completed, failed or released. Whoever
settles it (the loop, `notify_success`, another thread) goes through `LiveItem`, which lets one of
them through and remembers the outcome for the others.

Leases belong to the process that claimed them: a forked child finds nothing here.
"""

from __future__ import annotations

import enum
import itertools
import operator
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Final, Generic, SupportsIndex, TypeVar

from distlock_proto import lock_table_pb2 as pb
from run_once.answers import SettleAnswer
from run_once.errors import AmbiguousKeyError, NotHeldError
from run_once.keys import display_key
from run_once.lease import Lease, LeaseHandle
from run_once.process import THIS
from run_once.task import AnyLease, Session, error_text

ItemT = TypeVar("ItemT")

MAX_EXPIRED_ITEMS: Final = 10_000
"""Items with `timeout=T` that ran out and were never settled are remembered up to so many."""

MAX_LOST_ITEMS: Final = 1_000
"""Lost items are remembered up to so many, so that `notify_failure` after a LOST is no error."""


class Outcome(enum.Enum):
    """What became of an item."""

    COMPLETED = "completed"
    FAILED = "failed"
    RELEASED = "released"
    LOST = "lost"


class LiveItem(Generic[ItemT]):
    """One item of an iterator, and the lease it is worked on under.

    Attributes:
        item: The caller's own object.
        outcome: What became of it; None: nothing yet.
        present_state: Behind a LOST, the key's present state (`KeyState`); else 0.
        is_current: The iterator handed it out last; it stays findable until the iterator goes on.
        is_loss_told: The caller knows of the LOST.
        is_handed_on: Its handle was taken, so that others may settle it.
        error: Why it could not be settled in the background.
    """

    __slots__ = (
        "_lock",
        "_on_settled",
        "_session",
        "error",
        "is_current",
        "is_handed_on",
        "is_kept",
        "is_loss_told",
        "item",
        "lease",
        "outcome",
        "present_state",
        "thread_id",
    )

    def __init__(
        self,
        item: ItemT,
        lease: AnyLease,
        session: Session,
        *,
        is_kept: bool,
        on_settled: Callable[[Sequence[LiveItem[Any]]], None] | None = None,
    ) -> None:
        """Begin with a lease that was granted.

        Args:
            item: The caller's own object.
            lease: Its lease.
            session: Where it is settled.
            is_kept: The lease is kept alive; False: it runs for its time only.
            on_settled: Called once, when the outcome is known, with others whose is known then.
        """
        self.item = item
        self.lease = lease
        self.is_kept = is_kept
        self.outcome: Outcome | None = None
        self.present_state = 0
        self.is_current = False
        self.is_loss_told = False
        self.thread_id = threading.get_ident()
        self._session = session
        self._on_settled = on_settled
        self._lock = threading.Lock()
        self.is_handed_on = False
        self.error: Exception | None = None
        if isinstance(lease, Lease):
            lease.on_lost = self._note_lost

    @property
    def key(self) -> bytes:
        """The key as stored."""
        return self.lease.key

    @property
    def token(self) -> int:
        """The fencing token, for storage that refuses older ones."""
        return self.lease.token

    @property
    def attempt(self) -> int:
        """Number of this attempt; the first is 1."""
        return self.lease.grant.attempt

    @property
    def held(self) -> bool:
        """Whether the lease still runs, as far as this process can tell."""
        return self.outcome is None and isinstance(self.lease, Lease) and self.lease.held

    @property
    def handle(self) -> LeaseHandle:
        """What another process needs to settle this item; it pickles.

        This process keeps the lease alive until it finds the item settled.
        """
        if not isinstance(self.lease, Lease):
            return self.lease
        self.is_handed_on = True
        return self.lease.handle

    @property
    def place(self) -> tuple[str, bytes]:
        """Server and stored key: there is one valid lease of these at most."""
        return self._session.address, self.key

    def complete(self) -> Outcome:
        """Settle the item as done, and wait for the acknowledgement."""
        return self._settle(Outcome.COMPLETED, lambda: self._session.complete(self.lease))

    def complete_soon(self) -> bool:
        """Have the item settled as done in the background; until then nobody else settles it.

        Returns:
            False: it has an outcome already.
        """
        assert isinstance(self.lease, Lease), "a handle is settled at once"
        self._lock.acquire()
        if self.outcome is not None:
            self._lock.release()
            return False
        self._session.settler.put(self.lease, self)
        return True

    @staticmethod
    def take_answers(ended: Sequence[LiveItem[Any]], answers: Sequence[SettleAnswer]) -> None:
        """Hear what became of items that were to be completed soon."""
        for item, answer in zip(ended, answers, strict=True):
            if answer.is_lost:
                item.present_state = answer.lost_state
                item.outcome = Outcome.LOST
            else:
                item.outcome = Outcome.COMPLETED
            item._lock.release()  # noqa: SLF001 (our own class)
        _end(ended)

    @staticmethod
    def take_error(ended: Sequence[LiveItem[Any]], error: Exception) -> None:
        """Hear that items could not be completed soon; their leases run out."""
        for item in ended:
            item.error = error
            item._lock.release()  # noqa: SLF001 (our own class)
        _end(ended)

    def fail(self, error: str) -> Outcome:
        """Settle the item as failed: others may try it at once."""
        return self._settle(Outcome.FAILED, lambda: self._session.fail(self.lease, error))

    def release(self) -> None:
        """Give the item back; its attempt does not count. Never raises for an absent server."""
        release_all([self])

    def mark_taken(self) -> None:
        """Note that it is worked on from now on, by whoever asked the iterator last."""
        self.is_current = True
        if isinstance(self.lease, Lease):
            self.lease.is_taken = True

    def mark_released(self) -> None:
        """Note that the lease was given back."""
        # Whoever settles it at this moment has its outcome, or was interrupted in that.
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self.outcome is not None:
                return
            self.outcome = Outcome.RELEASED
        finally:
            self._lock.release()
        self._end()

    def _note_lost(self, lease: Lease) -> None:
        """Hear from the keeper that the server said LOST, which is final.

        An item whose handle was taken was most likely settled by it, which is no loss.
        """
        # A settlement that is under way in this or another thread gets the same answer itself.
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self.outcome is not None:
                return
            self.present_state = lease.lost_state
            self.outcome = Outcome.RELEASED if self.is_handed_on else Outcome.LOST
        finally:
            self._lock.release()
        self._end()

    def _settle(self, wanted: Outcome, send: Callable[[], Any]) -> Outcome:
        """Let one settlement through; later ones learn what became of it."""
        with self._lock:
            if self.outcome is not None:
                return self.outcome
            answer = send()
            if answer.state == pb.KEY_STATE_LOST:
                self.present_state = answer.lost_state
                self.outcome = Outcome.LOST
            else:
                self.outcome = wanted
        self._end()
        return self.outcome

    def _end(self) -> None:
        """Tell those who wait for the outcome."""
        _end([self])


def _end(items: Sequence[LiveItem[Any]]) -> None:
    """Tell those who wait for outcomes: those of one pass together."""
    for item in items:
        if isinstance(item.lease, Lease):
            # Nothing new is told of it, and what points at each other is freed late.
            item.lease.on_lost = None
    registry().settled(items)
    for on_settled, run in itertools.groupby(items, operator.attrgetter("_on_settled")):
        if on_settled is not None:
            on_settled(list(run))


class LiveItems:
    """The live items of this process, by stored key and by the caller's object."""

    def __init__(self) -> None:
        self.pid = THIS.pid
        self._lock = threading.RLock()
        self._items: dict[LiveItem[Any], None] = {}
        self._lost: dict[LiveItem[Any], None] = {}
        # Names are looked up when somebody asks for one: most items come and go without.
        self._unnamed: dict[LiveItem[Any], None] = {}
        self._by_name: dict[Hashable, list[LiveItem[Any]]] = {}

    def add(self, item: LiveItem[Any]) -> None:
        """Register an item that is about to be handed out."""
        with self._lock:
            self._items[item] = self._unnamed[item] = None
            if len(self._items) > MAX_EXPIRED_ITEMS:
                self._drop_expired()

    def settled(self, items: Sequence[LiveItem[Any]]) -> None:
        """Note outcomes; what is settled is forgotten, but for current and lost items."""
        with self._lock:
            for item in items:
                if item not in self._items:
                    continue
                if item.outcome is Outcome.LOST:
                    self._lost[item] = None
                    if len(self._lost) > MAX_LOST_ITEMS:
                        self.remove(next(iter(self._lost)))
                elif not item.is_current:
                    self.remove(item)

    def remove(self, item: LiveItem[Any]) -> None:
        """Forget an item; forgetting it twice is no error."""
        with self._lock:
            if item not in self._items:
                return
            self._lost.pop(item, None)
            if item in self._unnamed:
                del self._unnamed[item]
            else:
                self._take_names(item)
            del self._items[item]  # last: what an interrupt cuts short is done by the next try

    def _take_names(self, item: LiveItem[Any]) -> None:
        """Have an item found no more."""
        for name in _names(item):
            others = [other for other in self._by_name.get(name, ()) if other is not item]
            if others:
                self._by_name[name] = others
            else:
                self._by_name.pop(name, None)

    def forget(self, leases: Sequence[Lease]) -> None:
        """Forget the items under these leases, which nobody was given."""
        gone = set(leases)
        with self._lock:
            found = [item for item in self._items if item.lease in gone]
        for item in found:
            self.remove(item)

    def find(self, key: object) -> LiveItem[Any]:
        """Find the item that a user means.

        Args:
            key: The yielded object, or the stored key (as text, number or bytes).

        Raises:
            NotHeldError: There is none.
            AmbiguousKeyError: There are several.
        """
        with self._lock:
            self._name_all()
            found: dict[LiveItem[Any], None] = {}
            for name in _names_of(key):
                found.update(dict.fromkeys(self._by_name.get(name, ())))
        if not found:
            raise NotHeldError(
                f"this process holds no lease on key {show(key)}. Give the object that the "
                "iterator yielded, or the stored key; in another process, the lease's handle "
                "(run_once.lease_of(item).handle)"
            )
        return _choose(key, list(found))

    def held(self, *, is_kept_only: bool) -> list[LiveItem[Any]]:
        """Give the items without an outcome."""
        with self._lock:
            return [
                item
                for item in self._items
                if item.outcome is None and (item.is_kept or not is_kept_only)
            ]

    def _name_all(self) -> None:
        """Put what came since the last time under its names."""
        for item in self._unnamed:
            for name in _names(item):
                self._by_name.setdefault(name, []).append(item)
        self._unnamed.clear()

    def _drop_expired(self) -> None:
        """Forget the oldest item if it ran out and nobody settled it."""
        oldest = next(iter(self._items))
        if not oldest.is_kept and not oldest.held:
            self.remove(oldest)


def _choose(key: object, found: list[LiveItem[Any]]) -> LiveItem[Any]:
    """Choose the one item that is meant: unsettled ones first, then this thread's."""
    me = threading.get_ident()
    for narrow in (
        lambda item: item.outcome is None,
        lambda item: not item.is_handed_on,
        lambda item: item.thread_id == me,
        lambda item: item.held,
    ):
        narrower = [item for item in found if narrow(item)]
        found = narrower or found
    if len({item.place for item in found}) == 1:
        mine = [item for item in found if item.thread_id == me]
        if mine or len(found) == 1:
            return max(mine or found, key=lambda item: item.token)
    first, second = found[:2]
    raise AmbiguousKeyError(
        f"key {show(key)} fits more than one item that this process works on: "
        f"{show(first.key)} (token {first.token}) and {show(second.key)} (token {second.token}). "
        "Give the stored key or the lease's handle"
    )


_registry: LiveItems | None = None
_registry_lock: threading.Lock = threading.Lock()


def registry() -> LiveItems:
    """Give this process's live items; a forked child has none."""
    global _registry, _registry_lock  # noqa: PLW0603 (one per process)
    if _registry is not None and _registry.pid == THIS.pid:
        return _registry
    if _registry is not None:
        _registry_lock = threading.Lock()  # a thread that does not exist here may hold the old one
    with _registry_lock:
        if _registry is None or _registry.pid != THIS.pid:
            _registry = LiveItems()
    return _registry


def release_all(items: Iterable[LiveItem[Any]]) -> None:
    """Give items back, one request for each server; what an absent server misses runs out.

    At the end of the process sessions do the same for all leases that are kept alive.
    """
    by_session: dict[Session, list[LiveItem[Any]]] = {}
    for item in items:
        if item.outcome is None:
            by_session.setdefault(item._session, []).append(item)  # noqa: SLF001 (our own class)
    for session, given_back in by_session.items():
        session.release([item.lease for item in given_back])
        for item in given_back:
            item.mark_released()


def lease_of(item: object) -> LiveItem[Any]:
    """Give the lease under which this process works on an item.

    Args:
        item: What an iterator of this process yielded, or its stored key.

    Returns:
        The item with its lease: `token`, `attempt`, `held`, and `handle` for another process.

    Raises:
        NotHeldError: This process does not hold it.
        AmbiguousKeyError: It holds several that fit.
    """
    return registry().find(item)


def describe(error: BaseException | str | None) -> str:
    """Give an error as the text that is kept with a failed key."""
    if isinstance(error, BaseException):
        return error_text(error)
    return error or ""


def show(key: object) -> str:
    """Give a key as messages show it: a namespace by its name, long ones cut."""
    if isinstance(key, bytes):
        found = display_key(key)
        if found.namespace:
            return f"{found.text!r} (namespace {found.namespace!r})"
        key = found.text
    shown = repr(key)
    return shown if len(shown) <= 200 else f"{shown[:190]}..."  # noqa: PLR2004 (about two lines)


def _names(item: LiveItem[Any]) -> list[Hashable]:
    """Give the names under which an item is found."""
    names: list[Hashable] = [item.key]
    own = _name_of(item.item)
    if own is not None:
        names.append(own)
    return names


def _names_of(key: object) -> list[Hashable]:
    """Give the names that a user may mean by a key."""
    names: list[Hashable] = []
    if isinstance(key, bytes):
        names.append(key)
    elif isinstance(key, (str, int)) and not isinstance(key, bool):
        names.append(str(key).encode("utf-8", "surrogatepass"))
    own = _name_of(key)
    if own is not None:
        names.append(own)
    return names


def _name_of(item: object) -> Hashable:
    """Give an object's name: itself if it can be hashed, else its identity; numbers as text.

    It stands in a tuple, so that an item that is bytes is not taken for a stored key.
    """
    if item is None:
        return None
    try:
        if isinstance(item, SupportsIndex) and not isinstance(item, bool):
            return ("item", str(operator.index(item)))
        hash(item)
    except TypeError:
        return ("identity", id(item))
    return ("item", item)
