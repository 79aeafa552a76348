"""What the calls of 2021 mean on the table: steps over a transaction, and locks as messages.

A permanent lock is a done key, `overwrite` a seize, a release a reset; failed keys are invisible.
The rules for a single key stand in `state.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import re2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from distlock_proto import legacy_pb2 as pb
from distlock_server.codec_2021 import MAX_STORED_NS, expires_in_ns
from distlock_server.limits import (
    MAX_LEGACY_BYTES,
    MAX_PATTERN_BYTES,
    MAX_PATTERNS,
    RequestError,
    check_key,
)
from distlock_server.messages import Room
from distlock_server.state import (
    CLAIM_ID_BYTES,
    Answer,
    Claim,
    Complete,
    Done,
    Failed,
    Held,
    Record,
    Reset,
    Seize,
)
from distlock_server.table import Txn

_NS_PER_S: Final = 10**9

_NEWEST_REVISION: Final = 2**64

_LOCK_BYTES: Final = 32
"""About what the numbers of a lock take in a list."""

_PATTERN_MEMORY: Final = (64 << 10, 1 << 20, 16 << 20)
"""What RE2 may use for one pattern at least and at most, and for all of a list."""

_TOO_LARGE: Final = "pattern too large"
"""RE2's complaint about a pattern that needs more."""

_MATCHES_PER_PIECE: Final = 20_000
_MAX_PIECE: Final = 1_000
"""Locks of a list that are looked at before others get their turn, times their patterns."""

_CUT_OWNER_CHARS: Final = 100
"""What is left of an owner's name in a reply that is full."""

_IDS_AT_ONCE: Final = 1_000
"""Claim ids drawn at once."""

_PERMANENT_STEP_TTL_NS: Final = 1
"""A permanent lock is claimed and completed in one step; nobody sees the lease in between."""


class Acquire(NamedTuple):
    """A checked AcquireLockRequest; `ttl_ns` 0: for ever."""

    key: bytes
    claim_id: bytes
    ttl_ns: int
    owner: str
    data: bytes
    is_overwrite: bool


class Acquired(NamedTuple):
    """What became of it: the lock as acquired, and what was there before; None: unset."""

    acquired: Record
    existing: Record


class Moment(NamedTuple):
    """Both times at which something was read."""

    now_ns: int
    wall_ns: int


# -- checking ------------------------------------------------------------------------------------


def parse_acquires(requests: Sequence[pb.AcquireLockRequest]) -> list[Acquire]:
    """Check requests, all of them before any is carried out.

    Raises:
        RequestError: Names the first that is wrong.
    """
    return [_parse_acquire(request, _claim_ids.take()) for request in requests]


class _ClaimIds:
    """Claim ids, drawn many at once.

    Each draw lets other threads go first, and the one that writes keeps the interpreter for
    milliseconds: a batch that drew one id a step held up the event loop for half a second.
    """

    def __init__(self) -> None:
        self._left: list[bytes] = []

    def take(self) -> bytes:
        if not self._left:
            drawn = os.urandom(CLAIM_ID_BYTES * _IDS_AT_ONCE)
            places = range(0, len(drawn), CLAIM_ID_BYTES)
            self._left = [drawn[place : place + CLAIM_ID_BYTES] for place in places]
        return self._left.pop()


_claim_ids: Final = _ClaimIds()


def _parse_acquire(request: pb.AcquireLockRequest, claim_id: bytes) -> Acquire:
    lock = request.lock
    key = parse_key(lock)
    if not lock.HasField("expires_in"):
        raise RequestError(
            f"lock.expires_in: missing for key {lock.global_id!r}; zero means for ever"
        )
    n_bytes = len(lock.data) + len(lock.last_owner_name.encode())
    if n_bytes > MAX_LEGACY_BYTES:
        raise RequestError(
            f"lock of key {lock.global_id!r}: {n_bytes} bytes of data and owner name, "
            f"at most {MAX_LEGACY_BYTES} are allowed"
        )
    asked_ns = expires_in_ns(lock)
    # A negative time was accepted in 2021, as a lock that is expired at once.
    ttl_ns = min(max(asked_ns, 1), MAX_STORED_NS) if asked_ns else 0
    return Acquire(key, claim_id, ttl_ns, lock.last_owner_name, lock.data, request.overwrite)


def parse_key(lock: pb.Lock) -> bytes:
    """Check the key of a lock and give it as stored.

    Raises:
        RequestError: It is empty or too long.
    """
    key = lock.global_id.encode()
    check_key(key, "lock.global_id")
    return key


# -- steps ---------------------------------------------------------------------------------------


def acquire(txn: Txn, wanted: Acquire) -> Acquired:
    """Acquire one lock if it is free, or whatever its state."""
    if wanted.is_overwrite:
        seize = Seize(wanted.claim_id, wanted.ttl_ns, wanted.owner, wanted.data)
        before, after, _ = txn.apply(wanted.key, seize)
        return Acquired(after, _visible(before))
    claim = Claim(
        wanted.claim_id, wanted.ttl_ns or _PERMANENT_STEP_TTL_NS, wanted.owner, data=wanted.data
    )
    before, after, outcome = txn.apply(wanted.key, claim)
    if outcome.answer is not Answer.GRANTED:
        return Acquired(None, after)
    if wanted.ttl_ns == 0 and isinstance(after, Held):
        _, after, _ = txn.apply(wanted.key, Complete(wanted.claim_id, after.token))
    return Acquired(after, _visible(before))


def acquire_many(txn: Txn, wanted: Iterable[Acquire], limit: int | None) -> list[Acquired]:
    """Acquire locks in order, and stop after the one that reaches the limit."""
    answers: list[Acquired] = []
    n_acquired = 0
    for one in wanted:
        answers.append(acquire(txn, one))
        n_acquired += answers[-1].acquired is not None
        if n_acquired == limit:
            break
    return answers


def release(txn: Txn, key: bytes) -> Record:
    """Remove a lock; return what was there."""
    before, _, _ = txn.apply(key, Reset(_NEWEST_REVISION))
    return _visible(before)


def _visible(record: Record) -> Record:
    return None if isinstance(record, Failed) else record


# -- lists ---------------------------------------------------------------------------------------


class Filter:
    """The includes and excludes of a list."""

    def __init__(self, request: pb.ListLocksRequest) -> None:
        """Compile the patterns; as in 2021, one that is no RE2 pattern matches nothing.

        That may take a while: not for the event loop. `check_patterns` comes first.

        Raises:
            RequestError: One is too complex.
        """
        n_patterns = len(request.includes) + len(request.excludes)
        self._takes_all = not request.includes
        self._includes = _compile(request.includes, n_patterns)
        self._excludes = _compile(request.excludes, n_patterns)
        self.piece = max(1, min(_MAX_PIECE, _MATCHES_PER_PIECE // max(1, n_patterns)))
        self.reads_per_lock = 1 + n_patterns

    def matches(self, key: bytes, record: Record, now_ns: int) -> bool:
        """Tell whether a lock is listed."""
        if record is None or isinstance(record, Failed):
            return False
        is_expired = isinstance(record, Held) and record.is_expired(now_ns)
        if not self._takes_all and not _any(self._includes, key, is_expired=is_expired):
            return False
        return not _any(self._excludes, key, is_expired=is_expired)


def check_patterns(request: pb.ListLocksRequest) -> None:
    """Check how many patterns a list has, and their length.

    Raises:
        RequestError: There are too many, or they are too long.
    """
    n_patterns = len(request.includes) + len(request.excludes)
    if n_patterns > MAX_PATTERNS:
        raise RequestError(
            f"includes, excludes: {n_patterns} patterns, at most {MAX_PATTERNS} are allowed"
        )
    n_bytes = sum(
        len(expression.global_id_regex.encode())
        for expressions in (request.includes, request.excludes)
        for expression in expressions
    )
    if n_bytes > MAX_PATTERN_BYTES:
        raise RequestError(
            f"includes, excludes: patterns of {n_bytes} bytes, at most {MAX_PATTERN_BYTES} are "
            "allowed"
        )


def _compile(
    expressions: Iterable[pb.LockMatchExpression], n_patterns: int
) -> list[tuple[re2._Regexp, bool]]:
    least, most, together = _PATTERN_MEMORY
    options = re2.Options()
    options.log_errors = False
    options.max_mem = max(least, min(most, together // max(1, n_patterns)))
    compiled = []
    for expression in expressions:
        try:
            # Not re2.compile, which keeps what it compiled.
            pattern = re2._Regexp(expression.global_id_regex, options)  # noqa: SLF001
        except re2.error as error:
            if _TOO_LARGE in str(error):
                raise RequestError(
                    f"includes, excludes: the pattern {expression.global_id_regex[:100]!r} is too "
                    f"complex for a list with {n_patterns} patterns"
                ) from None
            continue
        compiled.append((pattern, expression.is_expired))
    return compiled


def _any(patterns: Iterable[tuple[re2._Regexp, bool]], key: bytes, *, is_expired: bool) -> bool:
    return any(
        wants_expired == is_expired and pattern.fullmatch(key.decode()) is not None
        for pattern, wants_expired in patterns
    )


class LockPage:
    """The locks of a list, until it is full."""

    def __init__(self, locks: Filter, room: Room) -> None:
        """Start empty.

        Raises:
            RequestError: The lists before it in the same request have used up the room.
        """
        if room.left <= 0:
            raise RequestError("list_locks_request: the batch lists too much; ask by ListLocks")
        self._filter = locks
        self._room = room
        self.locks: list[pb.Lock] = []

    def add(self, records: Iterable[tuple[bytes, Record]], moment: Moment) -> bool:
        """Add those records that match; False once the page is full."""
        for key, record in records:
            if not self._filter.matches(key, record, moment.now_ns):
                continue
            lock = lock_message(key, record, moment)
            assert lock is not None, "what matches is held or done"
            n_bytes = _LOCK_BYTES + len(key) + len(lock.data) + len(lock.last_owner_name)
            # A client of 2021 takes a page of one lock for the last page.
            if not self._room.take(n_bytes):
                if len(self.locks) >= 2:  # noqa: PLR2004
                    return False
                self._room.left -= n_bytes
            self.locks.append(lock)
        return True


# -- messages ------------------------------------------------------------------------------------


def lock_message(
    key: bytes, record: Record, moment: Moment, room: Room | None = None
) -> pb.Lock | None:
    """Make the message of a lock; None if there is none.

    Without its data, and with the start of its owner's name, if there is no room for them: a
    request may name one large lock many times.

    A held lock was acquired a lease's age before now, so that a client of 2021, which adds up
    acquired_since and expires_in, sees the end of the lease where the server does.
    """
    if isinstance(record, Held):
        age_ns = moment.now_ns - (record.deadline_ns - record.ttl_ns)
        expires_in_ns_, since_ns = max(record.ttl_ns, 1), moment.wall_ns - age_ns
    elif isinstance(record, Done):
        expires_in_ns_, since_ns = 0, record.since_wall_ns
    else:
        return None
    owner, data = record.owner, record.data
    if room is not None and not room.take(len(owner) + len(data)):
        owner, data = owner[:_CUT_OWNER_CHARS], b""
    return pb.Lock(
        global_id=key.decode(),
        expires_in=duration(expires_in_ns_),
        acquired_since=timestamp(since_ns),
        last_owner_name=owner,
        data=data,
    )


def acquire_response(
    key: bytes, answer: Acquired, moment: Moment, room: Room
) -> pb.AcquireLockResponse:
    """Make the response to one request."""
    return pb.AcquireLockResponse(
        acquired_lock=lock_message(key, answer.acquired, moment),
        existing_lock=lock_message(key, answer.existing, moment, room),
    )


def duration(ns: int) -> Duration:
    """Make a Duration of nanoseconds, 0 or more."""
    seconds, nanos = divmod(ns, _NS_PER_S)
    return Duration(seconds=seconds, nanos=nanos)


def timestamp(wall_ns: int) -> Timestamp:
    """Make a Timestamp of nanoseconds since 1970; earlier times become 1970."""
    seconds, nanos = divmod(max(wall_ns, 0), _NS_PER_S)
    return Timestamp(seconds=seconds, nanos=nanos)
