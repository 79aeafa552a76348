"""What the table finds on disk: after restarts, beside other servers, from 2021."""

from __future__ import annotations

from functools import partial

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from distlock_proto.legacy_pb2 import Lock
from distlock_server import batch, codec, state
from distlock_server.clock import ManualClock
from distlock_server.codec import Kind
from distlock_server.engines.base import EngineError
from distlock_server.engines.memory import MemoryStore
from distlock_server.pending import ContendedError
from distlock_server.state import Answer, Done, Held
from distlock_server.table import Table
from tests.stepped_table import ID, OTHER, SECOND, TTL, CountingEngine, Setup


@pytest.fixture
def setup() -> Setup:
    """Give a table over memory."""
    return Setup()


# -- restarts ------------------------------------------------------------------------------------


def test_crash_runs_leases_anew(setup: Setup) -> None:
    """After a crash a lease runs for its whole ttl, expired or not."""
    setup.hold(b"a")
    setup.clock.advance(100)
    record = setup.reopened().table.store.peek(b"a")
    assert isinstance(record, Held)
    assert record.deadline_ns == setup.clock.now_ns() + TTL


def test_clean_end_keeps_expired(setup: Setup) -> None:
    """After a clean end expired leases stay so; those that ran, run anew."""
    setup.hold(b"a")
    setup.clock.advance(100)
    setup.hold(b"b")
    setup.table.close()
    fresh = setup.reopened()
    assert fresh.table.store.count(b"")[0] == (0, 1, 1, 0)


def test_late_renewal_after_a_clean_end_is_stored(setup: Setup) -> None:
    """A lease stored as expired, then renewed, runs anew after a crash: the renewal is written."""
    token = setup.hold(b"a")
    setup.clock.advance(100)
    setup.table.close()
    second = setup.reopened()
    renew = state.Renew(ID, token, TTL)
    assert second.table.try_renew(b"a", renew) is None
    assert second.apply(b"a", renew) is Answer.RENEWED
    third = setup.reopened()
    record = third.table.store.peek(b"a")
    assert isinstance(record, Held)
    assert not record.is_expired(third.clock.now_ns())


def test_running_numbers_survive(setup: Setup) -> None:
    """Revision, tokens, generation and database id go on after a crash."""
    token = setup.hold(b"a")
    setup.apply(b"a", state.Complete(ID, token))
    setup.apply(b"a", state.Reset(99))
    fresh = setup.reopened()
    assert (fresh.table.revision, fresh.table.generation) == (3, 1)
    assert fresh.table.database_id == setup.table.database_id
    assert fresh.hold(b"a") == token + 1


def test_token_of_a_cancelled_grant_is_not_given_again(setup: Setup) -> None:
    """A token granted and released within one group is used up, over a crash too."""
    granted = setup.claim(b"a")
    setup.table.submit([b"a"], partial(batch.apply_each, commands=[(b"a", state.Release(ID, 1))]))
    setup.table.step_once()
    assert granted.result().items[0].record.token == 1
    assert setup.table.store.peek(b"a") is None
    assert setup.reopened().hold(b"b") == 2


def test_newer_format_is_refused(setup: Setup) -> None:
    """A database of an unknown format is refused in a sentence."""
    setup.store.write({codec.FORMAT_KEY: b"run-once 999"})
    with pytest.raises(EngineError, match="format"):
        setup.reopened()


# -- several servers on one engine ---------------------------------------------------------------


def shared_pair() -> tuple[Setup, Setup]:
    """Give two tables over one shared store."""
    clock, store = ManualClock(), MemoryStore()
    pair = []
    for _ in range(2):
        setup = Setup(store, clock)
        setup.engine = CountingEngine(store, shared=True, clock=clock)
        setup.table = Table(setup.engine, clock, setup.told)
        setup.engine.n_commits = 0
        pair.append(setup)
    return pair[0], pair[1]


def test_lost_swap_is_run_again() -> None:
    """A request whose key another server changed first is run again on what is there now."""
    one, two = shared_pair()
    claims = iter([OTHER])

    def disturb() -> None:
        for claim_id in claims:
            two.hold(b"a", claim_id=claim_id)

    one.engine.before = disturb
    pending = one.claim(b"a")
    other = one.claim(b"b")
    while one.table.step_once():
        pass
    assert pending.result().items[0].answer is Answer.BUSY
    assert other.result().items[0].answer is Answer.GRANTED


def test_swaps_lost_for_ever_are_given_up() -> None:
    """A request that loses again and again is told so, and is not run for ever."""
    one, two = shared_pair()
    count = iter(range(1000))

    def disturb() -> None:
        two.apply(b"a", state.Reset(2**62))
        two.hold(b"a", claim_id=b"%016d" % next(count), ttl=1)
        two.clock.advance(1)

    one.engine.before = disturb
    pending = one.claim(b"a")
    for _ in range(100):
        if not one.table.step_once():
            break
    with pytest.raises(ContendedError):
        pending.result()


def test_shared_deadlines_are_in_the_records() -> None:
    """Two servers see each other's leases with the same deadline; every renewal is written."""
    one, two = shared_pair()
    token = one.hold(b"a")
    assert one.table.try_renew(b"a", state.Renew(ID, token, TTL)) is None
    one.clock.advance(3)
    assert one.apply(b"a", state.Renew(ID, token, TTL)) is Answer.RENEWED
    record = two.table.store.peek(b"a")
    assert isinstance(record, Held)
    assert record.deadline_ns == one.clock.now_ns() + TTL
    pending = two.claim(b"a", claim_id=OTHER)
    two.table.step_once()
    assert pending.result().items[0].answer is Answer.BUSY


# -- databases of 2021 ---------------------------------------------------------------------------


def lock_2021(key: bytes, expires_in_s: int, acquired_s: int) -> bytes:
    """Give a record as the server of 2021 wrote it."""
    lock = Lock(
        global_id=key.decode(),
        expires_in=Duration(seconds=expires_in_s),
        acquired_since=Timestamp(seconds=acquired_s),
    )
    return lock.SerializeToString()


def test_old_database_is_counted_by_and_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of 2021 are usable at once, counted in pieces, and changes meanwhile counted right."""
    monkeypatch.setattr("distlock_server.oldbase.PIECE", 3)
    clock, store = ManualClock(), MemoryStore()
    wall_s = clock.wall_ns() // SECOND
    store.write({b"d%d" % number: lock_2021(b"d%d" % number, 0, 5) for number in range(8)})
    store.write(
        {b"h1": lock_2021(b"h1", 100, wall_s - 10), b"h2": lock_2021(b"h2", 5, wall_s - 10)}
    )
    setup = Setup(store, clock)
    assert setup.table.store.count(b"") == ((0, 0, 0, 0), False)
    assert setup.table.step_once()  # one piece: d0, d1, d2
    setup.apply(b"d0", state.Reset(9))  # counted already
    setup.apply(b"d7", state.Reset(9))  # not yet
    setup.hold(b"h2")  # expired in 2021, taken over before it is counted
    setup.hold(b"new-and-above")
    setup = setup.reopened()
    while setup.table.step_once():
        pass
    assert setup.table.store.count(b"") == ((6, 3, 0, 0), True)
    assert setup.table.store.count_range(b"", b"") == (6, 3, 0, 0)
    listed = [key for key, _ in setup.table.store.list_page(b"", b"", 9, Kind.HELD).records]
    assert listed == [b"h1", b"h2", b"new-and-above"]
    assert isinstance(setup.table.store.peek(b"d1"), Done)
