"""Requests of many keys as functions of a transaction: what each does, in which order.

Each function is run by the table's committer over a `Txn`; the rules for a single key stand in
`state.py`. The services turn messages into these calls and the answers into messages.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final, NamedTuple, TypeAlias

from distlock_server.quick import maker
from distlock_server.state import (
    NO_CLAIM_ID,
    Answer,
    Claim,
    Complete,
    Done,
    Fail,
    Held,
    Invalidate,
    Lookup,
    Record,
    Release,
    Renew,
    Reset,
    Stamp,
    step,
)
from distlock_server.table import Txn

Change: TypeAlias = Renew | Complete | Fail | Release | Reset | Invalidate
"""What a request may ask of each of its keys by itself."""


class Completions(NamedTuple):
    """Keys that their holder completes without values.

    Attributes:
        keys: The keys, each once.
        claim_id: The claim that all of them were granted to.
        tokens: The token that each was granted with.
    """

    keys: Sequence[bytes]
    claim_id: bytes
    tokens: Sequence[int]

    def commands(self) -> list[tuple[bytes, Complete]]:
        """Give the command for each key."""
        both = zip(self.keys, self.tokens, strict=True)
        return [(key, Complete(self.claim_id, token)) for key, token in both]


class Item(NamedTuple):
    """The answer for one key and the key's state after it."""

    answer: Answer
    record: Record


_make_item: Final = maker(Item)


class Items(NamedTuple):
    """The answers of one request, in the order of its keys.

    Attributes:
        items: One per key.
        now_ns: The server's time at which they were given; deadlines count from it.
        revision: The store revision they rest on.
        is_all_done: All keys are done, and their records were not read.
    """

    items: list[Item]
    now_ns: int
    revision: int
    is_all_done: bool = False


_MANY: Final = 4
"""Fewer keys are claimed one by one, which is quicker then."""

_A_DONE: Final = Done(token=1, owner="", since_wall_ns=0)
_CLAIMED_DONE: Final = Item(
    step(_A_DONE, Claim(NO_CLAIM_ID, ttl_ns=1), Stamp(0, 0, 0, 0))[1].answer, _A_DONE
)
"""What a claim of a done key is answered, whatever the claim and the record."""


def claim(
    txn: Txn,
    keys: Sequence[bytes],
    command: Claim,
    max_grants: int,
    *,
    wants_records: bool = True,
) -> Items:
    """Claim keys in order; of done ones, the records are given only if they are wanted.

    Keys already held by this claim id count first towards `max_grants` (0: no limit), so that a
    retry gets what the lost reply had granted; new grants fill up what is left.
    """
    if not wants_records and txn.are_plainly_done(keys):
        return _all_done(txn, keys)
    absent = txn.are_absent(keys) if len(keys) >= _MANY else [False] * len(keys)
    left = max_grants or len(keys)
    if max_grants:
        others = [key for key, is_absent in zip(keys, absent, strict=True) if not is_absent]
        left -= sum(_is_held_by(txn.get(key), command.claim_id) for key in others)
    refused = command._replace(may_grant=False) if max_grants else command
    items: list[Item] = []
    for is_absent, _run in itertools.groupby(absent):
        run = keys[len(items) : len(items) + len(list(_run))]
        if is_absent:
            n_free = max(0, min(left, len(run)))
            left -= _claim_absent(txn, run[:n_free], command, items)
            _claim_absent(txn, run[n_free:], refused, items)
            continue
        for key in run:
            _, record, outcome = txn.apply(key, command if left > 0 else refused)
            left -= outcome.is_new_grant
            items.append(Item(outcome.answer, record))
    return Items(items, txn.now_ns, txn.revision)


def _claim_absent(txn: Txn, keys: Sequence[bytes], command: Claim, items: list[Item]) -> int:
    """Claim keys that are absent, add what is answered, and give the number of grants."""
    if not keys:
        return 0
    records, outcome = txn.claim_absent(keys, command)
    items += map(_make_item, zip(itertools.repeat(outcome.answer), records))
    return len(keys) if outcome.is_new_grant else 0


def settle(
    txn: Txn, commands: Sequence[tuple[bytes, Change]], completions: Sequence[Completions]
) -> Items:
    """Apply one command to each key, in order, then complete others without values."""
    items = apply_each(txn, commands).items
    for run in completions:
        found = txn.complete_held(*run)
        if found is not None:
            records, outcome = found
            items += map(_make_item, zip(itertools.repeat(outcome.answer), records))
        else:
            items += apply_each(txn, run.commands()).items
    return Items(items, txn.now_ns, txn.revision)


def apply_each(txn: Txn, commands: Sequence[tuple[bytes, Change]]) -> Items:
    """Apply one command to each key, in order; kinds may be mixed."""
    items: list[Item] = []
    for key, command in commands:
        _, record, outcome = txn.apply(key, command)
        items.append(_make_item((outcome.answer, record)))
    return Items(items, txn.now_ns, txn.revision)


def lookup(txn: Txn, keys: Sequence[bytes], *, wants_records: bool = True) -> Items:
    """Read keys; of done ones, the records are given only if they are wanted."""
    if not wants_records and txn.are_plainly_done(keys):
        return _all_done(txn, keys)
    command = Lookup()
    items: list[Item] = []
    for key in keys:
        _, record, outcome = txn.apply(key, command)
        items.append(_make_item((outcome.answer, record)))
    return Items(items, txn.now_ns, txn.revision)


def _all_done(txn: Txn, keys: Sequence[bytes]) -> Items:
    txn.note_done(keys)
    return Items([_CLAIMED_DONE] * len(keys), txn.now_ns, txn.revision, is_all_done=True)


def _is_held_by(record: Record, claim_id: bytes) -> bool:
    return isinstance(record, Held) and record.claim_id == claim_id
