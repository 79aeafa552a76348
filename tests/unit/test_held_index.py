"""The index of held keys: one entry for keys that were granted together."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from distlock_server import batch, codec, state
from distlock_server.codec import Kind
from distlock_server.engines.base import SYSTEM_PREFIX
from distlock_server.held_index import MIN_SPAN_KEYS, HeldIndex, Put
from distlock_server.state import Held
from distlock_server.verify import verify
from tests.stepped_table import ID, OTHER, TTL, Setup

KEYS = [b"%02d" % number for number in range(MIN_SPAN_KEYS + 4)]


def own_entries(setup: Setup) -> list[bytes]:
    """Give the held keys that have entries of their own."""
    first, end = codec.index_key(Kind.HELD, b""), codec.index_key(Kind.HELD, SYSTEM_PREFIX)
    return [key[len(first) :] for key, _ in setup.engine.scan(first, end, 1_000)]


def spans(setup: Setup) -> list[tuple[int, list[bytes]]]:
    """Give the spans that are stored: first token and keys."""
    entries = setup.engine.scan(codec.span_key(0), codec.SPANS_END, 1_000)
    return [codec.decode_span(entry, raw) for entry, raw in entries]


def check_index(setup: Setup) -> None:
    """Check that each held key is in the index, once, and nothing else is."""
    records = {key: setup.table.store.peek(key) for key, _ in setup.engine.scan(b"", b"", 1_000)}
    leases = {key: record.token for key, record in records.items() if isinstance(record, Held)}
    listed = own_entries(setup)
    for first, keys in spans(setup):
        still = [key for token, key in enumerate(keys, first) if leases.get(key) == token]
        assert still, "a span of which nothing is left"
        listed += still
    assert sorted(listed) == sorted(leases)
    assert setup.table.store.held.keys() == leases.keys()
    assert setup.table.store.held_index.n_spans == len(spans(setup))


def claimed() -> tuple[Setup, dict[bytes, int]]:
    """Claim all keys in one request; give their tokens."""
    setup = Setup()
    pending = setup.claim(*KEYS)
    setup.table.step_once()
    items = pending.result().items
    return setup, {key: item.record.token for key, item in zip(KEYS, items, strict=True)}


def test_keys_granted_together_have_one_entry() -> None:
    """Keys claimed in one request share an entry; few have entries of their own."""
    setup, tokens = claimed()
    assert spans(setup) == [(tokens[KEYS[0]], KEYS)]
    assert own_entries(setup) == []
    few = [b"few-%d" % number for number in range(MIN_SPAN_KEYS - 1)]
    setup.claim(*few)
    setup.table.step_once()
    assert own_entries(setup) == few
    check_index(setup)


def test_entry_goes_with_the_last_of_its_keys() -> None:
    """However leases end: until the last one has, the entry stays."""
    setup, tokens = claimed()
    ends: list[Callable[[bytes, int], batch.Change]] = [
        state.Complete,
        partial(state.Fail, error="boom"),
        state.Release,
    ]
    for number, key in enumerate(KEYS):
        assert len(spans(setup)) == 1
        end = ends[number % 3]
        setup.apply(key, end(ID, tokens[key]))
        check_index(setup)
    assert spans(setup) == []


def test_a_lease_that_is_taken_over_leaves_its_span() -> None:
    """The new holder's lease has an entry of its own, and is found by a restart."""
    setup, _ = claimed()
    setup.clock.advance(TTL / 1e9 + 1)
    pending = setup.claim(KEYS[3], claim_id=OTHER)
    setup.table.step_once()
    (item,) = pending.result().items
    check_index(setup)
    assert own_entries(setup) == [KEYS[3]]
    setup = Setup(setup.store, setup.clock)
    check_index(setup)
    record = setup.table.store.held[KEYS[3]].record
    assert isinstance(record, Held)
    assert (record.claim_id, record.token) == (OTHER, item.record.token)


def test_restart_finds_the_keys_of_a_span() -> None:
    """Those that were held still, with their tokens; an entry of which none is left is deleted."""
    setup, tokens = claimed()
    for key in KEYS[:4]:
        setup.apply(key, state.Complete(ID, tokens[key]))
    again = Setup(setup.store, setup.clock)
    held = {key: slot.record for key, slot in again.table.store.held.items()}
    assert {key: lease.token for key, lease in held.items() if isinstance(lease, Held)} == {
        key: tokens[key] for key in KEYS[4:]
    }
    check_index(again)
    setup.store.write(dict.fromkeys(KEYS))  # as if their records had been lost
    assert spans(Setup(setup.store, setup.clock)) == []


@pytest.mark.parametrize("seed", range(20))
def test_index_holds_whatever_is_done(seed: int) -> None:
    """Over random requests, groups of them and restarts: exactly the held keys are listed."""
    rng = random.Random(seed)
    setup = Setup()
    keys = [b"%02d" % number for number in range(40)]
    for _ in range(60):
        if rng.random() < 0.1:
            setup = Setup(setup.store, setup.clock)
        setup.table.store.held_index.min_keys = rng.choice([2, MIN_SPAN_KEYS])
        if rng.random() < 0.2:
            setup.clock.advance(TTL / 1e9 + 1)
        for _ in range(rng.randint(1, 3)):
            request(setup, rng, rng.sample(keys, rng.choice([1, 3, 12, 30])))
        while setup.table.step_once():
            pass
        check_index(setup)


def request(setup: Setup, rng: random.Random, keys: list[bytes]) -> None:
    """Queue a request for these keys."""
    claim_id = rng.choice([ID, OTHER])
    slots = setup.table.store.held
    leases = {key: slots[key].record for key in keys if key in slots}
    mine = [(key, lease) for key, lease in leases.items() if isinstance(lease, Held)]
    if rng.random() < 0.4:
        setup.claim(*keys, claim_id=claim_id)
        return
    if rng.random() < 0.5:
        run = batch.Completions(
            [key for key, _ in mine], claim_id, [lease.token for _, lease in mine]
        )
        setup.table.submit(keys, partial(batch.settle, commands=[], completions=[run]))
        return
    commands: list[tuple[bytes, Any]] = []
    for key, lease in mine:
        holder = lease.claim_id, lease.token
        command = rng.choice(
            [
                state.Complete(*holder),
                state.Fail(*holder, "boom"),
                state.Release(*holder),
                state.Renew(*holder, 2 * TTL, started=True),
                state.Reset(2**63),
                state.Seize(b"", TTL),
                state.Seize(b"", 0),
            ]
        )
        commands.append((key, command))
    setup.table.submit(keys, partial(batch.apply_each, commands=commands))


def test_spans_next_to_each_other() -> None:
    """The token behind the last of a span is not of it, and one that is gone leaves the others."""
    index = HeldIndex()
    puts: list[Put] = []
    for first in (10, 20, 40):
        assert index.add(KEYS[:10], range(first, first + 10)) is not None
    assert index.leave([9], puts) is False
    assert index.leave([30], puts) is False
    assert index.leave([19, 30], puts) is None
    assert index.leave([*range(10, 20), *range(20, 29)], puts) is True
    assert puts == [(codec.span_key(10), None)]
    assert index.leave([29], puts) is True
    assert index.leave([10, 20], puts) is False
    assert index.leave(list(range(40, 50)), puts) is True
    assert index.n_spans == 0
    assert puts == [(codec.span_key(first), None) for first in (10, 20, 40)]


def test_tokens_that_do_not_follow_each_other_make_no_span() -> None:
    """Nor do they if the number of tokens is right."""
    index = HeldIndex()
    tokens = [*range(1, 10), 11]
    assert index.add(KEYS[:10], tokens) is None
    assert index.n_spans == 0


def test_check_knows_spans(tmp_path: Path) -> None:
    """A database with spans is sound; without the entry of one, its keys are missed."""
    setup, tokens = claimed()
    setup.apply(KEYS[0], state.Complete(ID, tokens[KEYS[0]]))
    assert verify(setup.engine, tmp_path).complaints == []
    setup.store.write({codec.span_key(tokens[KEYS[0]]): None})
    complaints = verify(setup.engine, tmp_path).complaints
    assert len(complaints) == len(KEYS) - 1
    assert "the index lacks" in complaints[0]


def test_a_damaged_entry_costs_only_itself(tmp_path: Path) -> None:
    """The server starts with all that other entries name, and the check says what is wrong."""
    setup, _ = claimed()
    setup.store.write({codec.span_key(0)[:2] + b"short": b"\xff".join(KEYS)})
    again = Setup(setup.store, setup.clock)
    assert sorted(again.table.store.held) == KEYS
    assert again.table.store.held_index.n_spans == 1
    assert any("no entry of a span" in text for text in verify(again.engine, tmp_path).complaints)


def test_a_damaged_record_keeps_its_span() -> None:
    """It may be of the span: the entry stays until a start finds that nothing of it is left."""
    setup, tokens = claimed()
    setup.store.write({KEYS[0]: b"\x11\x01damaged" + bytes(40)})
    again = Setup(setup.store, setup.clock)
    assert sorted(again.table.store.held) == KEYS[1:]
    for key in KEYS[1:]:
        again.apply(key, state.Complete(ID, tokens[key]))
    assert len(spans(again)) == 1
    again.apply(KEYS[0], state.Reset(2**63))
    assert spans(Setup(setup.store, setup.clock)) == []
