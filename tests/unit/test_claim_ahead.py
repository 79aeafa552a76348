"""Keys held ahead: handed out in order, given back in time, never yielded when lost."""

# ruff: noqa: PT012, PT031 (loops are left and leases lost in the middle of a block)

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from distlock_proto import lock_table_pb2 as pb
from run_once import (
    DistributedIterator,
    LeaseLostWarning,
    ServerUnavailableError,
    lease_of,
    notify_success,
)
from run_once.config import load_config
from run_once.key_pass import KeyPass
from run_once.key_source import BLOCK_KEYS, KeySource, key_maker
from run_once.live import LiveItem
from run_once.loop import Loop
from run_once.pass_options import PassOptions
from run_once.task import Session
from tests.other_client import Other, until
from tests.servers import InprocServer

ABSENT, DONE, FAILED = pb.KEY_STATE_ABSENT, pb.KEY_STATE_DONE, pb.KEY_STATE_FAILED
BUSY, AHEAD = pb.KEY_STATE_BUSY, pb.KEY_STATE_BUSY_AHEAD
MS = 1_000_000
pytestmark = pytest.mark.usefixtures("configured_server")

OPTIONS = PassOptions(
    ttl_s=60.0,
    is_kept=True,
    is_for_good=False,
    is_explicit=False,
    chunksize=10,
    waits=False,
    max_attempts=0,
    max_ahead=1_000,
)


class Hand:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.ns = 10**12

    def now_ns(self) -> int:
        """Give its time."""
        return self.ns


class Ahead:
    """A pass whose bodies and requests take what the test says.

    Attributes:
        running: The pass.
        clock: What it measures by.
    """

    def __init__(self, items: Iterable[Any], *, body_ms: float = 10, **options: Any) -> None:
        self.clock = Hand()
        self.running = KeyPass(
            KeySource(items, key_maker(None, 0, ""), clock=self.clock),
            Session.get(load_config()),
            replace(OPTIONS, **options),
            self.clock,
        )
        self.running.pace.note_body(round(body_ms * MS))
        self.running.pace.note_request(50 * MS)

    def next(self) -> LiveItem[Any]:
        """Take an item."""
        live = self.running.claim_next()
        assert live is not None
        live.mark_taken()
        return live

    def held_ahead(self) -> list[str]:
        """Name what is held ahead."""
        return [item for item, _ in self.running._ready]

    def close(self) -> None:
        """Give back what is held."""
        self.running.session.release(self.running.close())


@pytest.fixture
def letters() -> Iterator[Ahead]:
    """Give a pass over many keys that holds some ahead, with one item out."""
    made = Ahead([f"k{number:02d}" for number in range(100)])
    yield made
    made.close()


def test_held_ahead_in_order(letters: Ahead, other: Other) -> None:
    """What is held ahead is marked so on the server, and comes in the given order."""
    assert letters.next().item == "k00"
    assert letters.held_ahead()[:2] == ["k01", "k02"]
    assert other.states("k01", "k02", "k50") == [AHEAD, AHEAD, ABSENT]
    assert [letters.next().item for _ in range(5)] == [f"k{number:02d}" for number in range(1, 6)]


def test_the_thread_fills_up(letters: Ahead) -> None:
    """When half of what is wanted is used up, a step claims more; otherwise it claims nothing."""
    letters.next()
    n_held = len(letters.held_ahead())
    letters.running.step_ahead()
    assert len(letters.held_ahead()) == n_held
    while len(letters.held_ahead()) > n_held // 3:
        letters.next()
    letters.running.step_ahead()
    assert len(letters.held_ahead()) > n_held // 2


def test_started_late_is_told(letters: Ahead, other: Other) -> None:
    """An item that was held ahead counts as started on the server once it takes a while."""
    letters.next()
    item = letters.next().item
    letters.running.step_ahead()
    assert other.states(item) == [AHEAD]
    letters.clock.ns += 101 * MS
    letters.running.step_ahead()
    assert other.states(item) == [BUSY]


def test_overdue_is_given_back(letters: Ahead, other: Other) -> None:
    """A body that takes much longer than expected keeps no key from others; they come later."""
    letters.next()
    letters.clock.ns += 209 * MS
    letters.running.step_ahead()
    assert other.states("k01") == [AHEAD]
    letters.clock.ns += 2 * MS
    assert letters.running.step_ahead() is None
    assert letters.held_ahead() == []
    assert other.states("k01", "k02") == [ABSENT, ABSENT]
    letters.running.step_ahead()
    assert letters.held_ahead() == []
    assert letters.next().item == "k01"


def test_lost_ahead_is_never_handed_out(
    letters: Ahead, other: Other, configured_server: InprocServer
) -> None:
    """A key held ahead whose lease was lost is passed over, whether this process knows or not."""
    letters.next()
    configured_server.advance(200)
    assert len(other.claim("k01", "k03")) == 2
    session = letters.running.session
    lease = letters.running._ready[0][1]
    session.keeper.renew_now([lease])
    assert lease.is_lost
    for _, unknown in letters.running._ready:
        unknown.grant = unknown.grant._replace(expires_ns=0)
    assert [letters.next().item for _ in range(2)] == ["k02", "k04"]


def test_reset_ahead_is_claimed_again(letters: Ahead, other: Other) -> None:
    """A key that was reset while it was held ahead is nobody's: it is not left out."""
    letters.next()
    other.client.reset([b"k01"], other.client.lookup([b"k01"]).revision)
    lease = letters.running._ready[0][1]
    letters.running.session.keeper.renew_now([lease])
    assert lease.is_lost
    seen = [letters.next().item for _ in range(len(letters.held_ahead()) + 1)]
    assert "k01" in seen


def test_close_gives_back_at_once(letters: Ahead, other: Other) -> None:
    """What was held ahead is free once the loop is left."""
    letters.next()
    letters.close()
    assert other.states("k01", "k02") == [ABSENT, ABSENT]


def test_a_claim_under_way_at_the_end_is_given_back(
    letters: Ahead, other: Other, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a claim gets that the end of the loop overtook is given back."""
    letters.next()
    claim = Session.claim

    def overtaken(session: Session, keys: Any, **options: Any) -> Any:
        claimed = claim(session, keys, **options)
        letters.close()
        return claimed

    monkeypatch.setattr(Session, "claim", overtaken)
    while letters.held_ahead():
        letters.next()
    letters.running.step_ahead()
    assert other.states("k50") == [ABSENT]
    assert all(state in {ABSENT, BUSY, AHEAD} for state in other.states("k20", "k30"))
    held = other.client.list(only="held")
    assert {info.key for info in held} == set(letters.running._out)


def test_fixed_time_is_nearly_whole(other: Other, configured_server: InprocServer) -> None:
    """With `timeout=T`, what is held ahead is kept alive, and has 95 % of T when it is handed out.

    From then on it is not renewed.
    """
    ahead = Ahead("abcdefgh", is_kept=False, is_explicit=True)
    assert ahead.next().item == "a"
    keeper = ahead.running.session.keeper
    kept = [lease.key for lease in keeper.leases()]
    assert kept == [b"b", b"c", b"d", b"e", b"f", b"g", b"h"][: len(kept)] != []
    configured_server.advance(50)
    for _, lease in ahead.running._ready:
        lease.grant = lease.grant._replace(expires_ns=lease.grant.expires_ns - 50_000 * MS)
    assert ahead.next().item == "b"
    (info,) = other.client.lookup([b"b"], want_infos=True).infos
    assert info.state == BUSY
    assert info.remaining_ns >= 0.95 * 60_000 * MS
    assert b"b" not in [lease.key for lease in keeper.leases()]
    ahead.close()


def test_fixed_time_starts_without_more_time(other: Other, configured_server: InprocServer) -> None:
    """Telling the server that a `timeout=T` item has started gives it no more time."""
    ahead = Ahead("abcdefgh", is_kept=False, is_explicit=True)
    ahead.next()
    ahead.next()
    configured_server.advance(10)
    ahead.close()
    (info,) = other.client.lookup([b"b"], want_infos=True).infos
    assert info.state == BUSY
    assert info.remaining_ns == pytest.approx(50_000 * MS, abs=2_000 * MS)


def test_nothing_is_for_good_before_it_is_handed_out(other: Other) -> None:
    """With `timeout=0` what is held ahead is not done, and free again when the loop is left."""
    ahead = Ahead("abcdefgh", is_kept=False, is_for_good=True, is_explicit=True)
    assert ahead.next().item == "a"
    assert other.states("a", "b") == [DONE, AHEAD]
    assert ahead.next().item == "b"
    assert other.states("b") == [DONE]
    ahead.close()
    assert other.states("c") == [ABSENT]


def test_max_attempts_holds_nothing_ahead(other: Other) -> None:
    """A key that kills its worker must count as attempted: with a limit none is held ahead."""
    ahead = Ahead("abcdefgh", max_attempts=3)
    ahead.next()
    assert ahead.held_ahead() == []
    assert other.states("a", "b") == [BUSY, ABSENT]
    ahead.close()


def test_named_twice_while_held_ahead() -> None:
    """A key that the list names again while it is held ahead is handed out once."""
    names = ["a", "b", "c", "a", "b", "c", "d"]
    ahead = Ahead(names, chunksize=3)
    seen = []
    while (live := ahead.running.claim_next()) is not None:
        seen.append(live.item)
        live.complete_soon()
    assert seen == ["a", "b", "c", "d"]


def test_a_repeated_claim_loses_no_key(other: Other, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim that is sent again may pass over keys that have become free: they come later.

    The keys that it was granted the first time count first.
    """
    ahead = Ahead("abc", max_ahead=0)
    client = ahead.running.session.client
    claim_id = client.new_claim_id()
    assert client.claim([b"b"], ttl_s=60, claim_id=claim_id).grants
    ids = iter([claim_id, *(client.new_claim_id() for _ in range(9))])
    monkeypatch.setattr(client, "new_claim_id", lambda: next(ids))
    seen = []
    while (live := ahead.running.claim_next()) is not None:
        seen.append(live.item)
        live.complete_soon()
    assert seen == ["b", "a", "c"]


# ---------------------------------------------------------------- settling in the background


def test_settles_in_order_and_in_few_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Completions go out in the order in which bodies ended, many in one request."""
    requests: list[list[bytes]] = []
    complete_all = Session.complete_all

    def noted(session: Session, leases: Any) -> Any:
        requests.append([lease.key for lease in leases])
        return complete_all(session, leases)

    session = Session.get(load_config())
    monkeypatch.setattr(session.settler, "_complete", lambda leases: noted(session, leases))
    keys = [f"{number:04d}" for number in range(2_000)]
    loop = DistributedIterator(keys)
    assert list(loop) == keys
    assert list(itertools.chain.from_iterable(requests)) == [key.encode() for key in keys]
    assert len(requests) < len(keys) / 4
    assert loop.counts.completed == len(keys)


def test_a_server_that_is_gone_is_an_error(
    configured_server: InprocServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Completions that cannot be sent raise at the next item, and none is counted."""
    monkeypatch.setenv("RUN_ONCE_RETRY_S", "0.3")
    loop = DistributedIterator([f"k{number}" for number in range(5_000)])
    with pytest.raises(ServerUnavailableError):
        for item in loop:
            if item == "k600":
                configured_server.server.stop()
    assert loop.counts.completed <= 601


def test_lost_in_the_background(configured_server: InprocServer, other: Other) -> None:
    """An item that was lost is warned of and counted though its loop has gone on."""
    loop = DistributedIterator(["a", "b", "c"])
    with pytest.warns(LeaseLostWarning, match="'a'"):
        for item in loop:
            if item == "a":
                configured_server.advance(200)
                other.claim("a")
    assert (loop.counts.lost, loop.counts.completed) == (1, 2)


def test_a_break_settles_what_was_before(other: Other) -> None:
    """When the loop is left, everything before the present item is done, and it is free."""
    for number in DistributedIterator(range(1_000)):
        if number == 500:
            break
    assert other.states("0", "250", "499", "500", "501", "999") == [DONE] * 3 + [ABSENT] * 3
    assert not list(other.client.list(only="held"))


def test_explicit_items_of_short_bodies_stay_ours(other: Other) -> None:
    """Leaving an explicit loop gives back only what was not handed out; the rest has started."""
    loop = iter(DistributedIterator(range(1_000), settle="explicit"))
    assert isinstance(loop, Loop)
    taken = [next(loop) for _ in range(300)]
    assert lease_of(299).held
    loop.close()
    infos = {info.key: info.state for info in other.client.list(only="held")}
    assert infos == {str(item).encode(): BUSY for item in taken}
    for item in taken:
        notify_success(item)


def test_settling_while_notifying_in_another_thread(other: Other) -> None:
    """`lease_of(item).complete()` of an item that is being settled waits for that one answer."""
    loop = iter(DistributedIterator(["a", "b"]))
    assert next(loop) == "a"
    live = lease_of("a")
    assert next(loop) == "b"
    outcomes: list[Any] = []
    thread = threading.Thread(target=lambda: outcomes.append(live.complete().value))
    thread.start()
    until(lambda: other.states("a") == [DONE])
    thread.join(30)
    assert outcomes == ["completed"]
    assert list(loop) == []


# ---------------------------------------------------------------- reading and skipping


def test_blocks_lie_at_the_same_places() -> None:
    """However much is read at once, blocks end at their multiples, and whole ones say so."""
    source = KeySource(range(3 * BLOCK_KEYS + 5), key_maker(None, 0, ""), clock=Hand())
    pieces = [source.read(size, 0) for size in (10, 40, *[10**6] * 6)]
    assert [len(piece.keys) for piece in pieces] == [10, 40, 4_950, 5_000, 5_000, 5, 0, 0]
    assert [piece.is_first for piece in pieces] == [True] + [False] * 2 + [True] * 5
    assert [piece.is_block for piece in pieces] == [False] * 2 + [True] * 3 + [False] * 3
    assert source.is_exhausted


def test_skipping_counts_everything(other: Other) -> None:
    """A long finished stretch is passed over, and what is left in it is done."""
    keys = [f"k{number}" for number in range(20_000)]
    other.finish(*keys[:7_777], *keys[7_778:])
    loop = DistributedIterator(iter(keys))
    assert list(loop) == ["k7777"]
    assert loop.counts.found_done == 19_999
