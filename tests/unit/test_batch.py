"""Requests of many keys over one transaction."""

from __future__ import annotations

import pytest

from distlock_server import batch, codec
from distlock_server.group import ABSENT_SLOT, Counters, Group, Slot
from distlock_server.state import Answer, Claim, Complete, Fail, Held, Release, Renew

NOW = 10**15
TTL = 10**10
ID = b"i" * 16
OTHER = b"o" * 16
KEYS = [b"a", b"b", b"c", b"d"]


@pytest.fixture
def txn() -> Group:
    """Give a transaction over an empty table."""
    return Group(
        {},
        Counters(0, 0, 0),
        now_ns=NOW,
        wall_ns=0,
        decode=lambda key, raw: Slot(codec.decode(raw, codec.Opened(NOW, 0)), raw),
        fetch=lambda _key: ABSENT_SLOT,
        scan=lambda _start, _end, _limit: [],
    )


def answers(items: batch.Items) -> list[Answer]:
    """Give the answers alone."""
    return [item.answer for item in items.items]


def tokens(items: batch.Items) -> list[int]:
    """Give the tokens of granted keys."""
    return [
        item.record.token
        for item in items.items
        if item.answer is Answer.GRANTED and isinstance(item.record, Held)
    ]


def test_claim_in_order(txn: Group) -> None:
    """Keys are granted in the order of the request, with rising tokens."""
    items = batch.claim(txn, KEYS, Claim(ID, TTL), 0)
    assert answers(items) == [Answer.GRANTED] * 4
    assert tokens(items) == [1, 2, 3, 4]
    assert (items.now_ns, items.revision) == (NOW, 4)


def test_claim_stops_granting_at_the_limit(txn: Group) -> None:
    """Free keys beyond max_grants are NOT_ASKED; busy ones are BUSY and take no grant."""
    batch.claim(txn, [b"b"], Claim(OTHER, TTL), 0)
    items = batch.claim(txn, KEYS, Claim(ID, TTL), 2)
    assert answers(items) == [Answer.GRANTED, Answer.BUSY, Answer.GRANTED, Answer.NOT_ASKED]


def test_repeated_claim_gets_the_same(txn: Group) -> None:
    """With a limit, a repetition gets what it has, wherever it stands, and nothing new."""
    batch.claim(txn, [b"c", b"d"], Claim(ID, TTL), 2)
    items = batch.claim(txn, KEYS, Claim(ID, TTL), 2)
    assert answers(items) == [
        Answer.NOT_ASKED,
        Answer.NOT_ASKED,
        Answer.GRANTED,
        Answer.GRANTED,
    ]
    assert tokens(items) == [1, 2]
    more = batch.claim(txn, KEYS, Claim(ID, TTL), 3)
    assert answers(more) == [
        Answer.GRANTED,
        Answer.NOT_ASKED,
        Answer.GRANTED,
        Answer.GRANTED,
    ]


def test_repetition_over_the_limit_keeps_what_it_has(txn: Group) -> None:
    """Keys held by the claim id are granted again even where they are more than the limit."""
    batch.claim(txn, KEYS, Claim(ID, TTL), 0)
    assert answers(batch.claim(txn, KEYS, Claim(ID, TTL), 1)) == [Answer.GRANTED] * 4


def test_kinds_may_be_mixed(txn: Group) -> None:
    """Each key gets its own command and answer."""
    batch.claim(txn, KEYS, Claim(ID, TTL), 0)
    items = batch.apply_each(
        txn,
        [
            (b"a", Complete(ID, 1)),
            (b"b", Fail(ID, 2)),
            (b"c", Release(ID, 3)),
            (b"d", Renew(OTHER, 4, TTL)),
        ],
    )
    assert answers(items) == [Answer.COMPLETED, Answer.FAILED, Answer.RELEASED, Answer.LOST]
    assert answers(batch.claim(txn, [b"a", b"b"], Claim(OTHER, TTL), 0)) == [
        Answer.DONE,
        Answer.GRANTED,
    ]


def test_lookup_changes_nothing(txn: Group) -> None:
    """Lookup gives the records, and the revision stays."""
    batch.claim(txn, [b"a"], Claim(ID, TTL), 0)
    items = batch.lookup(txn, [b"a", b"b"])
    assert answers(items) == [Answer.FOUND, Answer.FOUND]
    assert isinstance(items.items[0].record, Held)
    assert items.items[1].record is None
    assert items.revision == 1
