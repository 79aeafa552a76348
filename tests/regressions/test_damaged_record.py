"""A damaged record could neither be used nor removed: its key was out of use for ever."""

from __future__ import annotations

import pytest

from distlock_server import codec, legacy_batch, state
from distlock_server.codec import CodecError, Kind
from distlock_server.group import Group
from distlock_server.state import Answer
from tests.stepped_table import ID, TTL, Setup


@pytest.fixture
def setup() -> Setup:
    """Give a table that was opened over a done, a failed and a held record, all damaged."""
    first = Setup()
    for key in (b"done", b"failed", b"held"):
        first.hold(key)
    first.apply(b"done", state.Complete(ID, 1))
    first.apply(b"failed", state.Fail(ID, 2))
    for key in (b"done", b"failed", b"held"):
        (raw,) = first.store.get([key])
        assert raw is not None
        first.store.write({key: raw[:-1] + bytes((raw[-1] ^ 1,))})
    return first.reopened()


@pytest.mark.parametrize("key", [b"done", b"failed", b"held"])
def test_reset_repairs(setup: Setup, key: bytes) -> None:
    """A reset, and nothing else, gets past the damage; counters and indexes are right after it."""
    with pytest.raises(CodecError, match="reset the key"):
        setup.apply(key, state.Complete(ID, 1))
    generation = setup.table.generation
    assert setup.apply(key, state.Reset(0)) is Answer.RESET
    assert setup.table.generation == generation + 1
    assert setup.store.get([key, codec.index_key(Kind.HELD, key)]) == [None, None]
    assert setup.store.get([codec.index_key(Kind.FAILED, key)]) == [None]
    kinds = {b"done": 0, b"held": 1, b"failed": 3}
    counts = [1, 1, 0, 1]
    counts[kinds[key]] = 0
    assert list(setup.table.store.count(b"")[0]) == counts
    assert setup.apply(key, state.Reset(0)) is Answer.RESET
    assert setup.hold(key) == 4


def test_release_of_2021_repairs(setup: Setup) -> None:
    """ReleaseLock removes a damaged lock too, and shows nothing of it."""
    pending = setup.table.submit([b"done"], lambda txn: legacy_batch.release(txn, b"done"))
    setup.table.step_once()
    assert pending.result() is None
    assert setup.table.store.peek(b"done") is None


def test_reset_is_undone_with_its_request(setup: Setup) -> None:
    """A request that fails behind the reset leaves the damage as it was, for all to see."""

    def fail(txn: Group) -> None:
        txn.apply(b"done", state.Reset(0))
        raise ValueError("planned")

    setup.table.submit([b"done"], fail)
    claim = setup.claim(b"done")
    setup.table.step_once()
    with pytest.raises(CodecError):
        claim.result()
    assert setup.engine.n_commits == 0


def test_claim_behind_a_reset_in_one_group(setup: Setup) -> None:
    """The key can be claimed in the very group of its reset, and the claim is what is stored."""
    setup.table.submit([b"held"], lambda txn: txn.apply(b"held", state.Reset(0)))
    claim = setup.claim(b"held", claim_id=b"n" * 16, ttl=2 * TTL)
    setup.table.step_once()
    assert claim.result().items[0].answer is Answer.GRANTED
    fresh = setup.reopened()
    record = fresh.table.store.peek(b"held")
    assert isinstance(record, state.Held)
    assert (record.claim_id, record.ttl_ns) == (b"n" * 16, 2 * TTL)
    assert fresh.table.store.count(b"")[0].held == 1


def test_page_names_the_damaged_key(setup: Setup) -> None:
    """A list over a record of no known format says which key it is."""
    setup.store.write({b"done": b"\x00"})
    with pytest.raises(CodecError, match="key b'done' is damaged"):
        setup.table.store.list_page(b"", b"", 10)
    with pytest.raises(CodecError, match="key b'done' is damaged"):
        setup.table.store.count_range(b"", b"")
