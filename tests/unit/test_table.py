"""The table: groups, renewals between writes, watches, restarts, failures."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any

import pytest

from distlock_server import batch, state
from distlock_server.codec import CodecError, Kind
from distlock_server.engines.base import EngineError
from distlock_server.pending import Rank, StorageError, TableClosedError
from distlock_server.state import Answer, Held
from tests.stepped_table import ID, OTHER, TTL, Setup


@pytest.fixture
def setup() -> Setup:
    """Give a table over memory."""
    return Setup()


# -- groups --------------------------------------------------------------------------------------


def test_a_group_is_one_write(setup: Setup) -> None:
    """All that waits is written at once, and told at once, in order."""
    pendings = [setup.claim(b"%d" % number) for number in range(5)]
    assert setup.table.step_once()
    assert setup.engine.n_commits == 1
    assert setup.told.groups == [pendings]
    assert not setup.table.step_once()


def test_answers_come_after_the_write(setup: Setup) -> None:
    """Nothing of a group is answered before its write returned, a refusal on it included."""
    granted = setup.claim(b"a")
    refused = setup.claim(b"a", claim_id=OTHER)
    setup.engine.before = lambda: _assert_equal(setup.told.groups, [])
    setup.table.step_once()
    assert granted.result().items[0].answer is Answer.GRANTED
    assert refused.result().items[0].answer is Answer.BUSY


def _assert_equal(one: object, other: object) -> None:
    assert one == other


def test_reading_writes_nothing(setup: Setup) -> None:
    """A group that changes nothing is not written."""
    setup.hold(b"a")
    setup.engine.n_commits = 0
    pending = setup.table.submit([b"a"], partial(batch.lookup, keys=[b"a"]))
    setup.claim(b"a", claim_id=OTHER)
    setup.table.step_once()
    assert pending.result().revision == 1
    assert setup.engine.n_commits == 0


def test_large_requests_go_alone(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group takes requests up to its bound of keys, and a single larger one by itself."""
    monkeypatch.setattr("distlock_server.table.MAX_GROUP_KEYS", 3)
    for keys in ([b"a", b"b"], [b"c"], [b"d"], [b"%d" % number for number in range(9)], [b"e"]):
        setup.claim(*keys)
    while setup.table.step_once():
        pass
    assert [len(group) for group in setup.told.groups] == [2, 1, 1, 1]


def test_renewals_do_not_wait_for_claims(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many claims wait, a renewal that must be written is in the next group."""
    monkeypatch.setattr("distlock_server.table.MAX_GROUP_KEYS", 4)
    token = setup.hold(b"a", ahead=True)
    claims = [setup.claim(b"%d" % number) for number in range(20)]
    renew = [(b"a", state.Renew(ID, token, TTL, started=True))]
    renewal = setup.table.submit(
        [b"a"], partial(batch.apply_each, commands=renew), rank=Rank.RENEWAL
    )
    setup.table.step_once()
    assert setup.told.groups[-1] == [renewal, *claims[:3]]


def test_a_request_that_raises_stands_alone(setup: Setup) -> None:
    """A request that raises gets its error, leaves no trace, and the others are answered."""

    def broken(txn: Any) -> None:
        txn.apply(b"a", state.Claim(ID, TTL))
        raise ZeroDivisionError("planted")

    bad = setup.table.submit([b"a"], broken)
    good = setup.claim(b"b")
    setup.table.step_once()
    with pytest.raises(ZeroDivisionError):
        bad.result()
    assert good.result().items[0].record.token == 1
    assert setup.table.store.peek(b"a") is None


def test_keys_that_were_not_named_are_read(setup: Setup) -> None:
    """A request may touch keys that it did not name."""
    setup.hold(b"a")
    fresh = setup.reopened()
    pending = fresh.table.submit([], lambda txn: txn.get(b"a"))
    fresh.table.step_once()
    assert isinstance(pending.result(), Held)


def test_threaded_committer_answers() -> None:
    """With its own thread the table answers, from several threads at once, and closes."""
    setup = Setup()
    setup.table.start()

    def ask(number: int) -> None:
        for count in range(50):
            setup.claim(b"%d-%d" % (number, count))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    last = setup.claim(b"last")
    deadline_s = time.monotonic() + 20
    while last.value is None and time.monotonic() < deadline_s:
        time.sleep(0.005)
    setup.table.close()
    answered = [pending for group in setup.told.groups for pending in group]
    assert len(answered) == 201
    assert sorted(p.result().items[0].record.token for p in answered) == list(range(1, 202))


# -- renewals ------------------------------------------------------------------------------------


def test_renewing_writes_nothing(setup: Setup) -> None:
    """A renewal that moves only the deadline is answered at once and not written."""
    token = setup.hold(b"a")
    setup.clock.advance(5)
    setup.engine.n_commits = 0
    answer = setup.table.try_renew(b"a", state.Renew(ID, token, TTL))
    assert answer is not None
    outcome, record = answer
    assert outcome.answer is Answer.RENEWED
    assert isinstance(record, Held)
    assert record.deadline_ns == setup.clock.now_ns() + TTL
    assert setup.apply(b"a", state.Renew(ID, token, TTL)) is Answer.RENEWED
    assert setup.engine.n_commits == 0


@pytest.mark.parametrize("command", [{"ttl_ns": TTL + 1}, {"ttl_ns": TTL, "started": True}])
def test_renewals_that_must_be_stored(setup: Setup, command: dict[str, Any]) -> None:
    """A longer ttl and a start are not promised before they are on disk."""
    token = setup.hold(b"a", ahead=True)
    renew = state.Renew(ID, token, **command)
    assert setup.table.try_renew(b"a", renew) is None
    setup.engine.n_commits = 0
    assert setup.apply(b"a", renew) is Answer.RENEWED
    assert setup.engine.n_commits == 1
    reopened = setup.reopened().table.store.peek(b"a")
    assert isinstance(reopened, Held)
    assert (reopened.ttl_ns, reopened.ahead) == (command["ttl_ns"], "started" not in command)


def test_renewing_an_unknown_key_is_queued(setup: Setup) -> None:
    """Whether a key that is not known to be held is LOST is for the committer to say."""
    assert setup.table.try_renew(b"a", state.Renew(ID, 1, TTL)) is None


def test_no_renewal_beside_a_write(setup: Setup) -> None:
    """While a key is being written its renewal is queued: the write may be its end."""
    token = setup.hold(b"a")
    seen: list[Any] = []
    setup.engine.before = lambda: seen.append(
        setup.table.try_renew(b"a", state.Renew(ID, token, TTL))
    )
    assert setup.apply(b"a", state.Release(ID, token)) is Answer.RELEASED
    assert seen == [None]


def test_renewals_during_a_write_are_kept(setup: Setup) -> None:
    """A renewal of another key that comes in during a write is not overwritten by it."""
    token = setup.hold(b"a")
    setup.hold(b"b", claim_id=OTHER)

    def renew() -> None:
        setup.clock.advance(5)
        assert setup.table.try_renew(b"a", state.Renew(ID, token, TTL)) is not None

    setup.engine.before = renew
    setup.hold(b"c")
    record = setup.table.store.peek(b"a")
    assert isinstance(record, Held)
    assert record.deadline_ns == setup.clock.now_ns() + TTL


# -- watches -------------------------------------------------------------------------------------


def test_watches(setup: Setup) -> None:
    """A watch is told when a key leaves its lease, once per group; not of grants and renewals."""
    watch = setup.table.watch([b"a", b"b"], "mine")
    tokens = [setup.hold(key) for key in (b"a", b"b")]
    assert setup.apply(b"a", state.Renew(ID, tokens[0], 2 * TTL)) is Answer.RENEWED
    assert setup.told.changes == []
    setup.table.submit(
        [b"a", b"b"],
        partial(
            batch.apply_each,
            commands=[(b"a", state.Complete(ID, tokens[0])), (b"b", state.Fail(ID, tokens[1]))],
        ),
    )
    setup.table.step_once()
    assert setup.told.changes == [[watch]]
    setup.table.unwatch(watch)
    setup.table.unwatch(watch)
    setup.apply(b"a", state.Reset(99))
    assert setup.told.changes == [[watch]]


# -- failures ------------------------------------------------------------------------------------


def test_failed_write_ends_the_table() -> None:
    """A failed write answers its group as unknown, refuses what comes later, and is told."""
    setup = Setup()

    def fail() -> None:
        raise EngineError("planted")

    setup.engine.before = fail
    first, second = setup.claim(b"a"), setup.claim(b"b")
    setup.table.start()
    thread: Any = setup.table._thread
    thread.join(20)
    for pending in (first, second):
        with pytest.raises(StorageError, match="may or may not"):
            pending.result()
    later = setup.claim(b"c")
    with pytest.raises(StorageError, match="planted"):
        later.result()
    assert [str(error) for error in setup.told.deaths] == ["planted"]
    setup.table.close()


def test_closed_table_refuses(setup: Setup) -> None:
    """A closed table refuses what waited and what comes, with an error that says to try again."""
    waiting = setup.claim(b"a")
    setup.table.close()
    setup.table.close()
    later = setup.claim(b"b")
    for pending in (waiting, later):
        with pytest.raises(TableClosedError, match="try again"):
            pending.result()
    assert setup.told.groups == [[waiting], [later]]


def test_damaged_record_is_one_requests_error(setup: Setup) -> None:
    """A damaged record fails the requests that name it, by its key; others are answered."""
    setup.store.write({b"bad": b"\x11damaged"})
    bad = setup.claim(b"good1", b"bad")
    good = setup.claim(b"good2")
    setup.table.step_once()
    with pytest.raises(CodecError, match="bad"):
        bad.result()
    assert good.result().items[0].answer is Answer.GRANTED
    assert setup.table.store.peek(b"good1") is None
    with pytest.raises(CodecError):
        setup.table.store.peek(b"bad")


# -- lists ---------------------------------------------------------------------------------------


def test_list_ranges(setup: Setup) -> None:
    """Ranges are half-open, pages say where the next one starts, done keys have no index."""
    for key in (b"a", b"b", b"c", b"d"):
        setup.hold(key)
    page = setup.table.store.list_page(b"b", b"d", 1)
    assert ([key for key, _ in page.records], page.next_start) == ([b"b"], b"c")
    page = setup.table.store.list_page(b"c", b"d", 9, Kind.HELD)
    assert ([key for key, _ in page.records], page.next_start) == ([b"c"], b"")
    assert setup.table.store.list_page(b"x", b"a", 9).records == []
    with pytest.raises(ValueError, match="done"):
        setup.table.store.list_page(b"", b"", 9, Kind.DONE)


def test_list_of_an_index_goes_on_over_gaps(setup: Setup) -> None:
    """An index entry whose key changed meanwhile shortens its page, and does not end the list."""
    for key in (b"a", b"b", b"c", b"d"):
        setup.apply(key, state.Fail(ID, setup.hold(key)))
    setup.store.write({b"a": None})
    page = setup.table.store.list_page(b"", b"", 2, Kind.FAILED)
    assert ([key for key, _ in page.records], page.next_start) == ([b"b"], b"c")


def test_held_keys_are_read_with_their_deadline(setup: Setup) -> None:
    """Lists and peeks show renewed deadlines, which are in memory only."""
    token = setup.hold(b"a")
    setup.clock.advance(5)
    setup.table.try_renew(b"a", state.Renew(ID, token, TTL))
    for _, record in (
        *setup.table.store.list_page(b"", b"", 9).records,
        *setup.table.store.list_page(b"", b"", 9, Kind.HELD).records,
    ):
        assert isinstance(record, Held)
        assert record.deadline_ns == setup.clock.now_ns() + TTL
    assert setup.table.store.has_live_lease()
    setup.clock.advance(10)
    assert not setup.table.store.has_live_lease()
