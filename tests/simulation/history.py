"""Checks a recorded history: each key by itself, and the order of revisions over all.

Keys are independent registers, so that no search is needed: operations are sorted by the store
revision that their replies carry, that order is tested against real time, and each key is replayed
through it. The replay does not decide what an answer should be, as `state.py` does; it says which
answers cannot be true together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from distlock_proto import lock_table_pb2 as pb
from tests.simulation.observed import Item, Operation, describe


class BrokenPromiseError(AssertionError):
    """What must never happen, happened.

    Attributes:
        promise: Which of the promises, I1 to I11; I0 is a bug of the simulation's own making.
    """

    def __init__(self, promise: str, text: str) -> None:
        super().__init__(f"{promise}: {text}")
        self.promise = promise


class Survivor(NamedTuple):
    """What a restarted server found for a key.

    Attributes:
        key: The key.
        kind: absent, held, failed, free (given back) or done.
        token: Of the record; 0 if there is none.
        claim_id: Of the record; empty if it has none.
        revision: Of the record's last change; 0 if there is none.
        may_be_gone: A request that removes the key was under way and never answered.
    """

    key: bytes
    kind: str
    token: int
    claim_id: bytes
    revision: int
    may_be_gone: bool


class Restart(NamedTuple):
    """A power cut, and what it left; it comes before all else of its life."""

    revision: int
    life: int
    rank: int
    place: int
    survivors: tuple[Survivor, ...]


class Register:
    """What the history so far says of one key."""

    __slots__ = ("claim_id", "first", "kind", "last", "past", "token")

    def __init__(self) -> None:
        self.kind = "absent"
        self.token = 0
        self.claim_id = b""
        self.first = 0  # the last change was made between these two revisions
        self.last = 0
        self.past: list[tuple[int, str, int]] = [(0, "absent", 0)]

    def become(self, kind: str, token: int, claim_id: bytes, first: int, last: int) -> None:
        """Note a change."""
        self.kind, self.token, self.claim_id = kind, token, claim_id
        self.first, self.last = first, last
        self.past.append((last, kind, token))

    def is_at(self, kind: str, token: int) -> bool:
        """Tell whether this is the state, of this token."""
        return self.kind == kind and self.token == token

    def was_at(self, kind: str, token: int, since: int) -> bool:
        """Tell whether this was the state at some revision from `since` on."""
        for revision, one_kind, one_token in reversed(self.past):
            if one_kind == kind and one_token == token:
                return True
            if revision <= since:
                return False
        return False

    def __repr__(self) -> str:
        return f"{self.kind} {self.token} since {self.last}"


_HELD_STATES: Final = (pb.KEY_STATE_BUSY, pb.KEY_STATE_BUSY_AHEAD, pb.KEY_STATE_EXPIRED)
_BUSY_STATES: Final = _HELD_STATES[:2]


class Replay:
    """Replays a history that is sorted by revision."""

    def __init__(self) -> None:
        self._registers: dict[bytes, Register] = {}
        self._max_token = 0
        self._max_revision = 0
        self._operation = Operation(0, 0, 0, 0, "", (), 0, 0, 0)

    def take(self, operation: Operation) -> None:
        """Take the next operation."""
        self._operation = operation
        has_changed = False
        for item in operation.items:
            register = self._registers.setdefault(item.key, Register())
            has_changed |= _STEPS[item.what](self, register, item)
        if has_changed:
            if operation.revision <= self._max_revision:
                self._broken("I8", f"a change at a revision that was there before: {operation}")
            self._max_revision = operation.revision

    def take_restart(self, restart: Restart) -> None:
        """Compare what a power cut left with what was acknowledged before."""
        for found in restart.survivors:
            register = self._registers.setdefault(found.key, Register())
            if self._is_as_known(register, found):
                continue
            is_unacknowledged = (
                found.may_be_gone if found.kind == "absent" else (found.revision > register.last)
            )
            if not is_unacknowledged:
                raise BrokenPromiseError(
                    "I7", f"key {found.key!r}: known is {register}, left was {found}"
                )
            revision = found.revision or restart.revision
            self._max_token = max(self._max_token, found.token)
            register.become(found.kind, found.token, found.claim_id, revision, revision)
        if restart.revision < self._max_revision:
            raise BrokenPromiseError("I7", f"the revision went back to {restart.revision}")
        self._max_revision = restart.revision

    @staticmethod
    def _is_as_known(register: Register, found: Survivor) -> bool:
        if register.kind == "free":  # given back: absent, or free with attempts that count
            return found.kind in {"absent", "free"}
        return register.kind == found.kind and (
            found.kind == "absent" or register.token == found.token
        )

    # -- what each answer says of the key before it, and after it ---------------------------------

    def _claim(self, register: Register, item: Item) -> bool:
        state = item.state
        if state == pb.KEY_STATE_GRANTED:
            return self._grant(register, item)
        is_mine = register.kind == "held" and register.claim_id == item.claim_id
        if state in _BUSY_STATES:
            self._require(register.kind == "held" and not is_mine, "I5", register, item)
        elif state == pb.KEY_STATE_DONE:
            self._require(register.kind == "done", "I8", register, item)
        elif state == pb.KEY_STATE_LOST:
            was_mine = register.claim_id == item.claim_id
            self._require(register.kind in {"failed", "free"} and was_mine, "I5", register, item)
        else:
            self._require(register.kind != "done" and not is_mine, "I5", register, item)
        return False

    def _grant(self, register: Register, item: Item) -> bool:
        if register.is_at("held", item.token):
            self._require(register.claim_id == item.claim_id, "I5", register, item)
            return False
        self._require(register.kind != "done", "I4", register, item)
        is_repeated = register.kind in {"held", "failed"} and register.claim_id == item.claim_id
        self._require(not is_repeated, "I5", register, item)
        self._require(item.token > self._max_token, "I2", register, item)
        self._max_token = item.token
        return self._change(register, "held", item.token, item.claim_id)

    def _renew(self, register: Register, item: Item) -> bool:
        # Keys of one renewal may be renewed one after another, each at once.
        is_held = register.is_at("held", item.token)
        if item.state == pb.KEY_STATE_RENEWED:
            was_held = register.was_at("held", item.token, self._operation.first_revision)
            self._require(is_held or was_held, "I6", register, item)
        else:
            self._require(not is_held, "I6", register, item)
        return False

    def _complete(self, register: Register, item: Item) -> bool:
        is_held = register.is_at("held", item.token)
        is_done = register.is_at("done", item.token)
        if item.state == pb.KEY_STATE_COMPLETED:
            promise = "I3" if register.kind == "done" else "I6"
            self._require(is_held or is_done, promise, register, item)
            return is_held and self._change(register, "done", item.token, b"")
        self._require(not is_held and not is_done, "I6", register, item)
        return False

    def _fail(self, register: Register, item: Item) -> bool:
        is_held = register.is_at("held", item.token)
        is_failed = register.is_at("failed", item.token)
        if item.state == pb.KEY_STATE_FAILED:
            self._require(is_held or is_failed, "I6", register, item)
            return is_held and self._change(register, "failed", item.token, item.claim_id)
        self._require(not is_held and not is_failed, "I6", register, item)
        return False

    def _release(self, register: Register, item: Item) -> bool:
        is_held = register.is_at("held", item.token)
        if item.state == pb.KEY_STATE_RELEASED:
            is_free = register.kind in {"absent", "free"}
            self._require(is_held or is_free, "I6", register, item)
            return is_held and self._change(register, "free", item.token, item.claim_id)
        self._require(not is_held, "I6", register, item)
        return False

    def _look(self, register: Register, item: Item) -> bool:
        kind, state = register.kind, item.state
        if state == pb.KEY_STATE_ABSENT:
            self._require(kind in {"absent", "free"}, "I8", register, item)
        elif state == pb.KEY_STATE_FAILED:
            self._require(kind in {"failed", "free"}, "I8", register, item)
        else:
            wanted = "done" if state == pb.KEY_STATE_DONE else "held"
            is_same = item.token in {0, register.token}
            self._require(kind == wanted and is_same, "I8", register, item)
        return False

    def _reset(self, register: Register, item: Item) -> bool:
        if item.state != pb.KEY_STATE_RESET:
            return False
        if register.kind in {"absent", "free"}:  # free: it may have been absent already
            register.kind = "absent"
            return False
        self._require(item.number >= register.first, "I6", register, item)
        return self._change(register, "absent", 0, b"")

    def _invalidate(self, register: Register, item: Item) -> bool:
        is_done = register.is_at("done", item.token)
        self._require(is_done == (item.state == pb.KEY_STATE_RESET), "I3", register, item)
        return is_done and self._change(register, "absent", 0, b"")

    def _change(self, register: Register, kind: str, token: int, claim_id: bytes) -> bool:
        operation = self._operation
        first = operation.revision - len(operation.items) + 1
        register.become(kind, token, claim_id, first, operation.revision)
        return True

    def _require(self, holds: bool, promise: str, register: Register, item: Item) -> None:
        if not holds:
            self._broken(promise, f"{describe(item)}, where the key was {register}")

    def _broken(self, promise: str, text: str) -> None:
        raise BrokenPromiseError(promise, f"{text}, at revision {self._operation.revision}")


_STEPS: Final[dict[str, Callable[[Replay, Register, Item], bool]]] = {
    "claim": Replay._claim,
    "renew": Replay._renew,
    "complete": Replay._complete,
    "fail": Replay._fail,
    "release": Replay._release,
    "look": Replay._look,
    "reset": Replay._reset,
    "invalidate": Replay._invalidate,
}


def check_history(entries: Iterable[Operation | Restart]) -> None:
    """Check a history.

    Raises:
        BrokenPromiseError: It cannot have come from one table.
    """
    ordered = sorted(entries, key=lambda entry: entry[:4])
    check_real_time([entry for entry in ordered if isinstance(entry, Operation)])
    replay = Replay()
    for entry in ordered:
        if isinstance(entry, Operation):
            replay.take(entry)
        else:
            replay.take_restart(entry)


def check_real_time(ordered: Sequence[Operation]) -> None:
    """Check that no operation ended before one of an earlier revision began."""
    latest_ns = of_revision_ns = 0
    revision = 0
    for operation in ordered:
        if operation.revision != revision:
            latest_ns = max(latest_ns, of_revision_ns)
            revision, of_revision_ns = operation.revision, 0
        if operation.left_ns < latest_ns:
            raise BrokenPromiseError("I8", f"the revision went back after {operation}")
        of_revision_ns = max(of_revision_ns, operation.arrived_ns)
