"""The rules of the lock table, and nothing else.

Everything that decides what becomes of a key stands in this file. It is pure: no I/O, no
clock, no randomness. Whoever calls `step` brings the time, the next revision and the next
token in a `Stamp`, and keeps what comes back. The same input always gives the same output.

A key is absent (`None`), `Held`, `Failed` or `Done`. *Expired* is not stored: a held key is
expired when ``deadline_ns <= now_ns``. A command is answered by an `Outcome`; BUSY, DONE and
LOST are values, never exceptions.

The promise that follows from the rules: at most one valid lease per key at any time; at most
one accepted completion per key, ever (until someone resets it).
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias, cast

CLAIM_ID_BYTES: Final = 16
"""Length of a claim id: 128 random bits made by the client for each logical claim."""

NO_CLAIM_ID: Final = b""
"""The claim id of locks written in 2021; no client's claim id is equal to it."""


class Storage(enum.IntEnum):
    """Where the value of a done key is kept."""

    NONE = 0
    INLINE = 1
    SERVER = 2
    URL = 3


class Result(NamedTuple):
    """The value of a done key, or where it is.

    Attributes:
        storage: Where it is kept.
        payload: Its bytes (INLINE) or the URL it is at (URL, UTF-8); else empty.
        size_bytes: Length of the value.
        sha256: SHA-256 of the value, 32 bytes, or empty if not known.
    """

    storage: Storage = Storage.NONE
    payload: bytes = b""
    size_bytes: int = 0
    sha256: bytes = b""


NO_RESULT: Final = Result()


class Held(NamedTuple):
    """A key under a lease, live or expired.

    Attributes:
        claim_id: The claim it was granted to; never shown in lists.
        token: Fencing token of the grant.
        deadline_ns: The server's monotonic time at which the lease ends.
        ttl_ns: Length of the lease; after a crash of the server it runs anew for so long.
        owner: Label of the holder, for people.
        since_wall_ns: Wall time of the grant, for display.
        attempts: Grants that counted so far, this one included.
        ahead: Claimed before its holder is ready to start.
        last_error: Text of the last failure, kept over the retry. Empty: there was none.
        data: Opaque bytes of a 2021 client.
        revision: Store revision of the last change.
    """

    claim_id: bytes
    token: int
    deadline_ns: int
    ttl_ns: int
    owner: str
    since_wall_ns: int
    attempts: int = 1
    ahead: bool = False
    last_error: str = ""
    data: bytes = b""
    revision: int = 0

    def is_expired(self, now_ns: int) -> bool:
        """Tell whether the lease has run out."""
        return self.deadline_ns <= now_ns

    @property
    def counted_attempts(self) -> int:
        """Attempts that stay counted if the lease runs out: a claim ahead does not count."""
        return self.attempts - 1 if self.ahead else self.attempts


class Failed(NamedTuple):
    """A key that failed, or was given back after earlier attempts; it may be claimed.

    Attributes:
        claim_id: The last claim, whose late retries are told what became of it.
        token: The last grant's fencing token.
        attempts: Grants that counted so far, at least 1.
        error: Text of the last failure.
        since_wall_ns: Wall time of the change, for display.
        released: The last holder gave the key back; False: it reported a failure.
        revision: Store revision of the last change.
    """

    claim_id: bytes
    token: int
    attempts: int
    error: str
    since_wall_ns: int
    released: bool = False
    revision: int = 0


class Done(NamedTuple):
    """A completed key.

    Attributes:
        token: Fencing token of the accepted completion; 0 for keys done in 2021.
        owner: Label of the completer, for people.
        since_wall_ns: Wall time of the completion, for display.
        result: The value.
        data: Opaque bytes of a 2021 client.
        revision: Store revision of the last change.
    """

    token: int
    owner: str
    since_wall_ns: int
    result: Result = NO_RESULT
    data: bytes = b""
    revision: int = 0


Record: TypeAlias = Held | Failed | Done | None
"""What is stored for a key; `None` is absent."""


@dataclasses.dataclass(slots=True)
class Stamp:
    """What the table assigns to a command when it applies it; a step only reads it.

    Attributes:
        now_ns: The server's monotonic time.
        wall_ns: Wall time, for display only; no rule looks at it.
        revision: The store revision that a change made by the command gets.
        token: The fencing token that a grant made by the command gets.
    """

    now_ns: int
    wall_ns: int
    revision: int
    token: int


class Claim(NamedTuple):
    """Ask for a lease.

    Attributes:
        claim_id: 16 random bytes of one logical claim.
        ttl_ns: Length of the lease, above 0.
        owner: Label for people.
        max_attempts: Do not grant at or over so many attempts; 0: no limit.
        ahead: The holder is not ready to start.
        data: Opaque bytes of a 2021 client.
        may_grant: False once the request's limit on grants is reached; a repetition is granted.
    """

    claim_id: bytes
    ttl_ns: int
    owner: str = ""
    max_attempts: int = 0
    ahead: bool = False
    data: bytes = b""
    may_grant: bool = True


class Renew(NamedTuple):
    """Let the lease run for ttl_ns from now; `started` clears the ahead mark."""

    claim_id: bytes
    token: int
    ttl_ns: int
    started: bool = False


class Complete(NamedTuple):
    """Settle: the body ended well."""

    claim_id: bytes
    token: int
    result: Result = NO_RESULT


class Fail(NamedTuple):
    """Settle: the body failed."""

    claim_id: bytes
    token: int
    error: str = ""


class Release(NamedTuple):
    """Settle: the holder gives the key back, and its attempt does not count."""

    claim_id: bytes
    token: int


class Lookup(NamedTuple):
    """Read the key."""


class Reset(NamedTuple):
    """Make the key absent unless it changed after `max_revision`."""

    max_revision: int


class Seize(NamedTuple):
    """Take the key whatever its state, as `overwrite` of 2021 did.

    Attributes:
        claim_id: Identity of the new lease.
        ttl_ns: Length of the lease; 0: for ever, which is done.
        owner: Label for people.
        data: Opaque bytes.
    """

    claim_id: bytes
    ttl_ns: int
    owner: str = ""
    data: bytes = b""


class Invalidate(NamedTuple):
    """Make a done key absent whose result, stored under `token`, cannot be used."""

    token: int


Command: TypeAlias = Claim | Renew | Complete | Fail | Release | Lookup | Reset | Seize | Invalidate


class Answer(enum.Enum):
    """What became of a command."""

    __hash__ = object.__hash__  # that of enums is a call in Python, made for each key of a reply

    GRANTED = "granted"
    BUSY = "busy"
    DONE = "done"
    EXHAUSTED = "exhausted"
    NOT_ASKED = "not asked"
    LOST = "lost"
    RENEWED = "renewed"
    COMPLETED = "completed"
    FAILED = "failed"
    RELEASED = "released"
    FOUND = "found"
    RESET = "reset"
    KEPT = "kept"
    SEIZED = "seized"


class Outcome(NamedTuple):
    """The answer to a command, and whether it was a new grant.

    The key's state before and after stand beside it: `step` is given the one and returns the other.
    LOST is thus always reported together with the key's present state.
    """

    answer: Answer
    is_new_grant: bool = False


_GRANTED_ANEW: Final = Outcome(Answer.GRANTED, is_new_grant=True)
_GRANTED_AGAIN: Final = Outcome(Answer.GRANTED)
_BUSY: Final = Outcome(Answer.BUSY)
_DONE: Final = Outcome(Answer.DONE)
_EXHAUSTED: Final = Outcome(Answer.EXHAUSTED)
_NOT_ASKED: Final = Outcome(Answer.NOT_ASKED)
_LOST: Final = Outcome(Answer.LOST)
_RENEWED: Final = Outcome(Answer.RENEWED)
_COMPLETED: Final = Outcome(Answer.COMPLETED)
_FAILED: Final = Outcome(Answer.FAILED)
_RELEASED: Final = Outcome(Answer.RELEASED)
_FOUND: Final = Outcome(Answer.FOUND)
_RESET: Final = Outcome(Answer.RESET)
_KEPT: Final = Outcome(Answer.KEPT)
_SEIZED: Final = Outcome(Answer.SEIZED, is_new_grant=True)

_TOKEN: Final = Held._fields.index("token")
_REVISION: Final = Held._fields.index("revision")
_DONE_TOKEN: Final = Done._fields.index("token")
_DONE_REVISION: Final = Done._fields.index("revision")

_Step: TypeAlias = tuple[Record, Outcome]


def step(record: Record, command: Command, stamp: Stamp) -> _Step:
    """Apply one command to one key.

    Args:
        record: What is stored for the key now.
        command: What is asked.
        stamp: Time, next revision and next token.

    Returns:
        What is to be stored, and the answer. The record is the very object that came in if
        nothing changed. `stamp.token` is used up if the outcome's `is_new_grant` is true, and
        `stamp.revision` if the stored record differs in more than its deadline.
    """
    return _STEPS[type(command)](record, command, stamp)


def claim_absent(command: Claim, stamp: Stamp, count: int) -> tuple[list[Record], Outcome]:
    """Claim so many absent keys, one after the other.

    A step puts revision and token of its stamp into the record and does nothing else with them: the
    step of the first key shows what becomes of each.

    Args:
        command: The claim.
        stamp: The stamp of the first; revision and token rise by one from key to key.
        count: Number of keys.

    Returns:
        What is to be stored for each, and the answer to each.
    """
    after, outcome = step(None, command, stamp)
    if not isinstance(after, Held):
        return [after] * count, outcome
    fields: list[Iterable[Any]] = [itertools.repeat(value) for value in after]
    fields[_TOKEN] = range(after.token, after.token + count)
    fields[_REVISION] = range(after.revision, after.revision + count)
    return list(map(Held._make, zip(*fields))), outcome  # noqa: B905 - some have no end


def complete_held(
    records: Sequence[Record], claim_id: bytes, tokens: Sequence[int], stamp: Stamp
) -> tuple[Sequence[Record], Outcome] | None:
    """Complete keys that one claim holds, one after the other, without values.

    A step puts the time and the revision of its stamp into the record, and takes over what the
    lease has: the step of the first key shows what becomes of each that differs in its token alone.

    Args:
        records: What is stored for each key, at least one.
        claim_id: The claim.
        tokens: The token that each was granted with.
        stamp: The stamp of the first; the revision rises by one from key to key.

    Returns:
        What is to be stored for each, and the answer to each; None if they are not all alike, or
        not all completed.
    """
    after, outcome = step(records[0], Complete(claim_id, tokens[0]), stamp)
    if set(map(type, records)) != {Held} or not isinstance(after, Done):
        return None
    held = dict(zip(Held._fields, zip(*cast("Sequence[Held]", records)), strict=True))  # noqa: B905
    same = (("claim_id", claim_id), ("owner", after.owner), ("data", after.data))
    if held["token"] != tuple(tokens) or any(
        held[name].count(value) != len(records) for name, value in same
    ):
        return None
    fields: list[Iterable[Any]] = [itertools.repeat(value) for value in after]
    fields[_DONE_TOKEN] = tokens
    fields[_DONE_REVISION] = range(after.revision, after.revision + len(records))
    return list(map(Done._make, zip(*fields))), outcome  # noqa: B905 - some have no end


def is_stored_change(before: Record, after: Record) -> bool:
    """Tell whether a change must reach the disk.

    A renewal that only moves the deadline, or promises a shorter lease than is stored, need not:
    after a crash every lease runs anew for its stored ttl.
    """
    if before is after:
        return False
    if isinstance(before, Held) and isinstance(after, Held):
        return before._replace(deadline_ns=after.deadline_ns) != after
    return True


def _claim(record: Record, command: Claim, stamp: Stamp) -> _Step:
    """Claim: absent and failed keys and those of expired holders are granted."""
    if isinstance(record, Done):
        return record, _DONE
    attempts = 0
    last_error = ""
    if isinstance(record, Held):
        if record.claim_id == command.claim_id != NO_CLAIM_ID:
            return record, _GRANTED_AGAIN
        if not record.is_expired(stamp.now_ns):
            return record, _BUSY
        attempts, last_error = record.counted_attempts, record.last_error
    elif isinstance(record, Failed):
        if record.claim_id == command.claim_id:
            return record, _LOST
        attempts, last_error = record.attempts, record.error
    if 0 < command.max_attempts <= attempts:
        return record, _EXHAUSTED
    if not command.may_grant:
        return record, _NOT_ASKED
    held = Held(
        claim_id=command.claim_id,
        token=stamp.token,
        deadline_ns=stamp.now_ns + command.ttl_ns,
        ttl_ns=command.ttl_ns,
        owner=command.owner,
        since_wall_ns=stamp.wall_ns,
        attempts=attempts + 1,
        ahead=command.ahead,
        last_error=last_error,
        data=command.data,
        revision=stamp.revision,
    )
    return held, _GRANTED_ANEW


def _is_held_by(record: Record, command: Renew | Complete | Fail | Release) -> bool:
    """Tell whether the command comes from the newest holder; expiry alone does not end that."""
    return (
        isinstance(record, Held)
        and record.claim_id == command.claim_id != NO_CLAIM_ID
        and record.token == command.token
    )


def _renew(record: Record, command: Renew, stamp: Stamp) -> _Step:
    """Renew: the newest holder goes on, even after expiry, as long as nobody else was granted.

    The stored ttl only grows: a shorter lease then needs no write, since a restart that gives the
    longer one is merely patient. The deadline, too, is never moved back.
    """
    if not isinstance(record, Held) or not _is_held_by(record, command):
        return record, _LOST
    ttl_ns = max(record.ttl_ns, command.ttl_ns)
    ahead = record.ahead and not command.started
    stored_changes = ttl_ns != record.ttl_ns or ahead != record.ahead
    return (
        record._replace(
            deadline_ns=max(record.deadline_ns, stamp.now_ns + command.ttl_ns),
            ttl_ns=ttl_ns,
            ahead=ahead,
            revision=stamp.revision if stored_changes else record.revision,
        ),
        _RENEWED,
    )


def _complete(record: Record, command: Complete, stamp: Stamp) -> _Step:
    """Complete: the newest holder's is accepted; its repetition is answered alike."""
    if isinstance(record, Done):
        # Token 0 marks keys done in 2021; no grant of ours has it.
        is_same = record.token == command.token != 0
        return record, _COMPLETED if is_same else _LOST
    if not isinstance(record, Held) or not _is_held_by(record, command):
        return record, _LOST
    # By position, since names take as long as all else here.
    token, owner, data = record.token, record.owner, record.data
    return Done(token, owner, stamp.wall_ns, command.result, data, stamp.revision), _COMPLETED


def _give_up(record: Record, command: Fail | Release) -> _Step | None:
    """Do what fail and release share; None if the command's own row applies."""
    if isinstance(record, Failed):
        is_same = record.claim_id == command.claim_id and record.token == command.token
        if not is_same:
            return record, _LOST
        return record, _RELEASED if record.released else _FAILED
    if record is not None and not _is_held_by(record, command):
        return record, _LOST
    return None


def _fail(record: Record, command: Fail, stamp: Stamp) -> _Step:
    """Fail: the key may be claimed again, and its attempt counts."""
    shared = _give_up(record, command)
    if shared is not None:
        return shared
    if not isinstance(record, Held):
        return record, _LOST
    failed = Failed(
        claim_id=record.claim_id,
        token=record.token,
        attempts=record.attempts,
        error=command.error,
        since_wall_ns=stamp.wall_ns,
        revision=stamp.revision,
    )
    return failed, _FAILED


def _release(record: Record, command: Release, stamp: Stamp) -> _Step:
    """Release: the attempt is given back; earlier attempts and their error stay known."""
    shared = _give_up(record, command)
    if shared is not None:
        return shared
    if not isinstance(record, Held) or record.attempts <= 1:
        return None, _RELEASED
    failed = Failed(
        claim_id=record.claim_id,
        token=record.token,
        attempts=record.attempts - 1,
        error=record.last_error,
        since_wall_ns=stamp.wall_ns,
        released=True,
        revision=stamp.revision,
    )
    return failed, _RELEASED


def _lookup(record: Record, command: Lookup, stamp: Stamp) -> _Step:  # noqa: ARG001 - as all steps
    """Lookup: changes nothing."""
    return record, _FOUND


def _reset(record: Record, command: Reset, stamp: Stamp) -> _Step:  # noqa: ARG001 - as all steps
    """Reset: anything becomes absent, but not what is newer than the caller has seen."""
    if record is not None and record.revision > command.max_revision:
        return record, _KEPT
    return None, _RESET


def _seize(record: Record, command: Seize, stamp: Stamp) -> _Step:
    """Seize: taken whatever its state; a done key asked for ever stays as it is."""
    if command.ttl_ns == 0:
        if isinstance(record, Done):
            return record, _DONE
        done = Done(
            token=stamp.token,
            owner=command.owner,
            since_wall_ns=stamp.wall_ns,
            data=command.data,
            revision=stamp.revision,
        )
        return done, _SEIZED
    held = Held(
        claim_id=command.claim_id,
        token=stamp.token,
        deadline_ns=stamp.now_ns + command.ttl_ns,
        ttl_ns=command.ttl_ns,
        owner=command.owner,
        since_wall_ns=stamp.wall_ns,
        data=command.data,
        revision=stamp.revision,
    )
    return held, _SEIZED


def _invalidate(record: Record, command: Invalidate, stamp: Stamp) -> _Step:  # noqa: ARG001 - as all steps
    """Invalidate: done becomes absent, for the token whose result was found unusable."""
    if isinstance(record, Done) and record.token == command.token:
        return None, _RESET
    return record, _KEPT


_STEPS: Final[dict[type[Any], Callable[[Record, Any, Stamp], _Step]]] = {
    Claim: _claim,
    Renew: _renew,
    Complete: _complete,
    Fail: _fail,
    Release: _release,
    Lookup: _lookup,
    Reset: _reset,
    Seize: _seize,
    Invalidate: _invalidate,
}
