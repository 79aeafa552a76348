"""What is done for many keys at once is what would be done for one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distlock_proto import legacy_pb2
from distlock_server import batch, codec
from distlock_server.batch import Item, Items
from distlock_server.group import (
    ABSENT_SLOT,
    NOT_DECODED,
    Change,
    Counters,
    DamagedRecordError,
    Group,
    Slot,
)
from distlock_server.plan import Write, index_puts, kind_of_record, plan_write
from distlock_server.state import (
    Claim,
    Complete,
    Done,
    Fail,
    Failed,
    Held,
    Record,
    Release,
    Renew,
    Reset,
    Result,
    Stamp,
    Storage,
    claim_absent,
    step,
)

NOW, WALL, TTL = 10**15, 10**18, 10**10
OPENED = codec.Opened(NOW, WALL)
MINE, OTHERS = b"m" * 16, b"o" * 16
KEYS = [b"%s%d" % (namespace, n) for n in range(10) for namespace in (b"", b"\x1ens\x1f")]
COUNTERS = Counters(100, 200, 300)

HELD = Held(MINE, 5, NOW + TTL, TTL, "owner", WALL - 5, revision=3)
RECORDS: list[Record] = [
    HELD,
    HELD._replace(claim_id=OTHERS, token=6),
    HELD._replace(claim_id=OTHERS, token=7, deadline_ns=NOW, attempts=2, last_error="boom"),
    HELD._replace(claim_id=OTHERS, token=8, deadline_ns=NOW, ahead=True),
    HELD._replace(data=b"of 2021", token=9),
    Failed(MINE, 10, 1, "boom", WALL, revision=4),
    Failed(OTHERS, 11, 3, "", WALL, released=True, revision=5),
    Done(12, "owner", WALL, revision=6),
    Done(13, "owner", WALL, Result(Storage.INLINE, b"v", 1), revision=7),
]
RAWS = [codec.encode(record) for record in RECORDS if record is not None]
RAWS += [legacy_pb2.Lock(global_id="of 2021").SerializeToString(), RAWS[0][:-1] + b"?"]
SLOTS = [ABSENT_SLOT, Slot(None, None), *(Slot(NOT_DECODED, raw) for raw in RAWS)]
SLOTS += [Slot(record, codec.encode(record)) for record in RECORDS if record is not None]

all_held = [
    Slot(record, codec.encode(record))
    for record in (HELD._replace(token=1_000 + number) for number in range(len(KEYS)))
]
"""Each key held by the same claim."""

Request = Callable[[Group], Any]

some_keys = st.one_of(
    st.just(KEYS),
    st.lists(st.sampled_from(KEYS), unique=True),
    st.lists(st.sampled_from(KEYS), max_size=len(KEYS)),  # no request gets so far
)
some_ids = st.sampled_from([MINE, OTHERS, b"n" * 16])
claims = st.builds(
    Claim,
    claim_id=some_ids,
    ttl_ns=st.sampled_from([1, TTL]),
    owner=st.sampled_from(["", "somebody"]),
    max_attempts=st.integers(0, 3),
    ahead=st.booleans(),
    data=st.sampled_from([b"", b"data"]),
    may_grant=st.just(True),
)
some_tokens = st.integers(5, 13) | st.integers(COUNTERS.token, COUNTERS.token + 30)
some_results = st.sampled_from(
    [Result(), Result(Storage.INLINE, b"value", 5), Result(Storage.SERVER, b"", 5, b"#" * 32)]
)
held_tokens = dict(zip(KEYS, range(1_000, 1_000 + len(KEYS)), strict=True))
completed = st.builds(
    lambda keys, claim_id, wrong: batch.Completions(
        keys, claim_id, [held_tokens[key] + (n == wrong) for n, key in enumerate(keys)]
    ),
    st.just(KEYS) | st.lists(st.sampled_from(KEYS), unique=True, min_size=1),
    st.just(MINE) | some_ids,
    st.just(-1) | st.integers(0, len(KEYS)),
)
changes: st.SearchStrategy[batch.Change] = st.one_of(
    st.builds(Complete, some_ids, some_tokens, some_results),
    st.builds(Fail, some_ids, some_tokens, st.sampled_from(["", "boom"])),
    st.builds(Release, some_ids, some_tokens),
    st.builds(Renew, some_ids, some_tokens, st.sampled_from([1, 2 * TTL])),
    st.builds(Reset, st.just(2**63)),
)


def one_by_one(
    txn: Group, keys: Sequence[bytes], command: Claim, max_grants: int, *, wants_records: bool
) -> Items:
    """Claim as the rule of a batch is told: each key by itself."""
    if not wants_records and txn.are_plainly_done(keys):
        return batch.claim(txn, keys, command, max_grants, wants_records=False)
    held = [txn.get(key) for key in keys] if max_grants else []
    left = max_grants - sum(isinstance(r, Held) and r.claim_id == command.claim_id for r in held)
    items = []
    for key in keys:
        may_grant = not max_grants or left > 0
        _, record, outcome = txn.apply(key, command._replace(may_grant=may_grant))
        left -= outcome.is_new_grant
        items.append(Item(outcome.answer, record))
    return Items(items, txn.now_ns, txn.revision)


@st.composite
def requests(draw: st.DrawFn) -> tuple[Request, Request]:
    """Make a request, and the same one step by step."""
    if draw(st.booleans()):
        more: Any = {
            "keys": draw(some_keys),
            "command": draw(claims),
            "max_grants": draw(st.integers(0, len(KEYS) + 1)),
            "wants_records": draw(st.booleans()),
        }
        return partial(batch.claim, **more), partial(one_by_one, **more)
    commands = draw(st.lists(st.tuples(st.sampled_from(KEYS), changes), max_size=len(KEYS)))
    completions = draw(st.lists(completed, max_size=2))
    singly = commands + [command for run in completions for command in run.commands()]
    settle = partial(batch.settle, commands=commands, completions=completions)
    return settle, partial(batch.apply_each, commands=singly)


def answer(group: Group, request: Request) -> Any:
    """Run a request and give what it says, or what is wrong with a record that it needs."""
    try:
        return group.run(request)
    except DamagedRecordError as error:
        return str(error)


def make(slots: Sequence[Slot]) -> Group:
    """Make a group in which each key was read so."""
    return Group(
        dict(zip(KEYS, slots, strict=True)),
        COUNTERS,
        now_ns=NOW,
        wall_ns=WALL,
        fetch=lambda _key: ABSENT_SLOT,
        decode=decode,
        scan=lambda _start, _end, _limit: [],
    )


def decode(key: bytes, raw: bytes) -> Slot:
    """Decode as the store does."""
    try:
        return Slot(codec.decode(raw, OPENED), raw)
    except codec.CodecError as error:
        raise DamagedRecordError(key, raw, error) from error


def plan(group: Group) -> Write:
    """Plan a group's write, and check what goes with each of its records."""
    write = plan_write(group, stores_deadline=False, counted_below=None)
    for swap in itertools.chain.from_iterable(swap.parts() for swap in write.swaps):
        (key,), (expected,), (value,), marks, adds = swap
        was = None if expected is None else codec.kind_of(expected)
        now = kind_of_record(group.get(key))
        assert tuple((mark + key, entry) for mark, entry in marks) == index_puts(key, was, now)
        moves = [] if was is now else [(was, -1), (now, 1)]
        namespace = codec.namespace_of(key)
        assert list(adds) == [
            (codec.counter_key(namespace, kind), change) for kind, change in moves if kind
        ]
        record = group.get(key)
        assert value == (None if record is None else codec.encode(record))
        slots = write.held if isinstance(record, Held) else write.ended
        assert slots[key] == Slot(record, value)
    return write


def changed(group: Group) -> list[Change]:
    """Give what became of each key."""
    return [part for change in group.changes() for part in change.parts()]


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
@given(
    slots=st.one_of(
        st.just(all_held),
        st.tuples(*(st.sampled_from([slot] * 8 + SLOTS) for slot in all_held)),
        st.lists(
            st.just(ABSENT_SLOT) | st.sampled_from(SLOTS), min_size=len(KEYS), max_size=len(KEYS)
        ),
    ),
    asked=st.lists(requests(), max_size=4),
)
def test_batch_is_one_step_after_another(
    slots: Sequence[Slot], asked: list[tuple[Request, Request]]
) -> None:
    """Whatever the keys are: same answers, records, tokens, revisions, and the same write."""
    at_once, stepwise = make(slots), make(slots)
    for request, steps in asked:
        assert answer(at_once, request) == answer(stepwise, steps)
        assert at_once.counters == stepwise.counters
    assert changed(at_once) == changed(stepwise)
    assert plan(at_once) == plan(stepwise)


def test_batch_of_absent_keys_is_sent_again() -> None:
    """The repetition in the same group gets the same tokens; another claim finds the keys busy."""
    group = make([ABSENT_SLOT] * len(KEYS))
    claim = partial(batch.claim, keys=KEYS, command=Claim(MINE, TTL), max_grants=0)
    first, again = group.run(claim), group.run(claim)
    assert first == again
    assert [item.record.token for item in first.items if isinstance(item.record, Held)] == [
        *range(COUNTERS.token + 1, COUNTERS.token + 1 + len(KEYS))
    ]
    other = group.run(partial(claim, command=Claim(OTHERS, TTL)))
    assert {item.answer.value for item in other.items} == {"busy"}


@pytest.mark.parametrize(
    ("change", "is_at_once"),
    [
        ({}, True),
        ({"deadline_ns": NOW - 1, "attempts": 3}, True),
        ({"claim_id": OTHERS}, False),
        ({"token": 7}, False),
        ({"owner": "somebody else"}, False),
        ({"data": b"of 2021"}, False),
    ],
)
def test_keys_held_alike_are_completed_at_once(change: dict[str, Any], is_at_once: bool) -> None:
    """One that differs in what its completion looks at or keeps has all asked one by one."""
    slots = list(all_held)
    slots[3] = Slot(all_held[3].record._replace(**change), b"")  # type: ignore[union-attr]
    group = make(slots)
    tokens = list(held_tokens.values())
    assert (group.complete_held(KEYS, MINE, tokens) is not None) == is_at_once
    assert group.has_counted == is_at_once


def test_batch_that_fails_leaves_nothing() -> None:
    """A damaged record among absent keys fails the request, whose grants are gone."""
    slots = [ABSENT_SLOT] * len(KEYS)
    slots[-1] = Slot(NOT_DECODED, RAWS[-1])
    group = make(slots)
    with pytest.raises(DamagedRecordError):
        group.run(partial(batch.claim, keys=KEYS, command=Claim(MINE, TTL), max_grants=0))
    assert group.counters == COUNTERS
    assert not plan(group).is_needed


@given(command=claims, may_grant=st.booleans(), count=st.integers(0, 5))
def test_absent_keys_are_claimed_one_after_the_other(
    command: Claim, may_grant: bool, count: int
) -> None:
    """The records are those of single steps, each with the next revision and token."""
    command = command._replace(may_grant=may_grant)
    records, outcome = claim_absent(command, Stamp(NOW, WALL, 7, 70), count)
    steps = [step(None, command, Stamp(NOW, WALL, 7 + n, 70 + n)) for n in range(count)]
    assert [(record, outcome) for record in records] == steps
    assert all(type(record) in (Held, type(None)) for record in records)
