"""One group: what requests see of each other, and what is written of it."""

from __future__ import annotations

from typing import Any

import pytest

from distlock_server import codec
from distlock_server.codec import Kind
from distlock_server.engines.base import decode_counter
from distlock_server.group import (
    ABSENT_SLOT,
    Counters,
    Group,
    Slot,
)
from distlock_server.plan import index_puts, plan_write
from distlock_server.state import Claim, Complete, Done, Fail, Held, Record, Release, Renew, Reset

NOW = 10**15
TTL = 10**10
ID = b"i" * 16
DONE = Done(token=3, owner="", since_wall_ns=0, revision=2)


def make(stored: dict[bytes, Record] | None = None) -> Group:
    """Make a group over some stored records."""
    slots = {
        key: Slot(record, codec.encode(record)) if record is not None else ABSENT_SLOT
        for key, record in (stored or {}).items()
    }

    def scan(start: bytes, end: bytes, limit: int) -> list[tuple[bytes, Record]]:
        found: list[tuple[bytes, Record]] = [
            (key, slot.record) for key, slot in sorted(slots.items()) if slot.record
        ]
        return [(k, r) for k, r in found if k >= start and (not end or k < end)][:limit]

    return Group(
        {},
        Counters(10, 20, 30),
        now_ns=NOW,
        wall_ns=0,
        decode=lambda key, raw: Slot(codec.decode(raw, codec.Opened(NOW, 0)), raw),
        fetch=lambda key: slots.get(key, ABSENT_SLOT),
        scan=scan,
    )


def write(group: Group, *, shared: bool = False, counted_below: bytes | None = None) -> Any:
    """Plan the write of a group."""
    return plan_write(group, stores_deadline=shared, counted_below=counted_below)


def test_requests_see_earlier_ones() -> None:
    """A request sees the changes of those before it, and running numbers go on."""
    group = make()
    _, held, _ = group.run(lambda txn: txn.apply(b"a", Claim(ID, TTL)))
    assert isinstance(held, Held)
    assert (held.token, held.revision) == (21, 11)
    assert group.run(lambda txn: txn.get(b"a")) is held
    _, done, _ = group.run(lambda txn: txn.apply(b"a", Complete(ID, 21)))
    assert group.get(b"a") is done
    assert group.counters == Counters(12, 21, 30)


def test_a_request_that_raises_is_undone() -> None:
    """What a failing request changed is gone, its numbers included; earlier changes stay."""
    group = make()
    group.run(lambda txn: txn.apply(b"a", Claim(ID, TTL)))

    def broken(txn: Group) -> None:
        txn.apply(b"a", Complete(ID, 21))
        txn.apply(b"b", Claim(ID, TTL))
        raise KeyError

    with pytest.raises(KeyError):
        group.run(broken)
    assert isinstance(group.get(b"a"), Held)
    assert group.get(b"b") is None
    assert group.counters == Counters(11, 21, 30)


def test_generation_counts_what_was_undone() -> None:
    """Only a done key that is undone raises the reset generation."""
    group = make({b"a": DONE})
    group.run(lambda txn: txn.apply(b"b", Claim(ID, TTL)))
    group.run(lambda txn: txn.apply(b"b", Reset(99)))
    assert group.generation == 30
    group.run(lambda txn: txn.apply(b"a", Reset(99)))
    assert group.generation == 31


def test_scan_sees_changes() -> None:
    """A scan shows what the group changed, added and removed, fills its page and keeps its ends."""
    stored: dict[bytes, Record] = dict.fromkeys((b"a", b"b", b"c", b"d", b"e"), DONE)
    group = make(stored)
    for key in (b"a", b"b"):
        group.run(lambda txn, key=key: txn.apply(key, Reset(99)))  # type: ignore[misc]
    group.run(lambda txn: txn.apply(b"bb", Claim(ID, TTL)))
    group.run(lambda txn: txn.apply(b"z", Claim(ID, TTL)))
    assert [key for key, _ in group.scan(b"", b"", 3)] == [b"bb", b"c", b"d"]
    assert [key for key, _ in group.scan(b"a", b"c", 9)] == [b"bb"]
    assert [key for key, _ in group.scan(b"d", b"", 9)] == [b"d", b"e", b"z"]


def test_swaps_expect_what_was_read() -> None:
    """A swap expects the exact bytes that were read, however often the key changed in between."""
    failed_group = make({b"a": DONE})
    failed_group.run(lambda txn: txn.apply(b"a", Reset(99)))
    failed_group.run(lambda txn: txn.apply(b"a", Claim(ID, TTL)))
    plan = write(failed_group)
    (swap,) = plan.swaps
    assert swap.expected == [codec.encode(DONE)]
    assert swap.marks == ((codec.index_key(Kind.HELD, b""), b""),)
    assert swap.adds == (
        (codec.counter_key(b"", Kind.DONE), -1),
        (codec.counter_key(b"", Kind.HELD), 1),
    )
    assert [plan.held[b"a"].raw] == swap.values
    puts = dict(plan.meta.puts)
    assert decode_counter(puts[codec.REVISION_KEY]) == 12
    assert decode_counter(puts[codec.TOKEN_KEY]) == 21
    assert decode_counter(puts[codec.GENERATION_KEY]) == 31


def test_changes_that_cancel_keep_their_numbers() -> None:
    """A key claimed and released in one group is not written, but the token that it used is."""
    group = make()
    group.run(lambda txn: txn.apply(b"a", Claim(ID, TTL)))
    group.run(lambda txn: txn.apply(b"a", Release(ID, 21)))
    plan = write(group)
    assert plan.swaps == []
    assert plan.is_needed
    assert decode_counter(dict(plan.meta.puts)[codec.TOKEN_KEY]) == 21


def test_reading_needs_no_write() -> None:
    """A group that only read, or was only refused, needs no write."""
    group = make({b"a": DONE})
    group.run(lambda txn: txn.apply(b"a", Claim(ID, TTL)))
    group.run(lambda txn: txn.get(b"b"))
    assert not write(group).is_needed


def held(**more: Any) -> Held:
    """Make a held record."""
    return Held(ID, 5, NOW + 5, TTL, "", 0, revision=1, **more)


@pytest.mark.parametrize("shared", [False, True])
def test_renewals_are_stored_only_where_deadlines_are(shared: bool) -> None:
    """A moved deadline is written on shared engines, and kept in memory on others."""
    group = make({b"a": held()})
    group.run(lambda txn: txn.apply(b"a", Renew(ID, 5, TTL)))
    plan = write(group, shared=shared)
    assert len(plan.swaps) == shared
    assert plan.held[b"a"].record.deadline_ns == NOW + TTL


def test_namespaces_have_their_own_counters() -> None:
    """A change moves the counters of its key's namespace."""
    key = b"\x1ens\x1fa"
    group = make()
    group.run(lambda txn: txn.apply(key, Claim(ID, TTL)))
    group.run(lambda txn: txn.apply(key, Fail(ID, 21)))
    (swap,) = write(group).swaps
    assert swap.adds == ((codec.counter_key(b"ns", Kind.FAILED), 1),)
    assert swap.marks == ((codec.index_key(Kind.FAILED, b""), b""),)


def test_uncounted_keys_move_no_counters() -> None:
    """Keys above the border of a database being counted move no counters, and are indexed."""
    group = make()
    for key in (b"a", b"x"):
        group.run(lambda txn, key=key: txn.apply(key, Claim(ID, TTL)))  # type: ignore[misc]
    below, above = sorted(write(group, counted_below=b"m").swaps)
    assert below.adds
    assert not above.adds
    assert above.marks


@pytest.mark.parametrize(
    ("was", "now", "entries"),
    [
        (None, Kind.HELD, [("held", True)]),
        (Kind.HELD, Kind.FAILED, [("held", False), ("failed", True)]),
        (Kind.HELD, Kind.DONE, [("held", False)]),
        (Kind.FAILED, Kind.HELD, [("failed", False), ("held", True)]),
        (Kind.HELD, Kind.HELD, []),
        (None, Kind.DONE, []),
        (Kind.FAILED, None, [("failed", False)]),
    ],
)
def test_index_entries(was: Kind | None, now: Kind | None, entries: list[tuple[str, bool]]) -> None:
    """Exactly the held and the failed keys have an index entry."""
    kinds = {"held": Kind.HELD, "failed": Kind.FAILED}
    expected = {
        codec.index_key(kinds[name], b"k"): (b"" if is_set else None) for name, is_set in entries
    }
    assert dict(index_puts(b"k", was, now)) == expected
