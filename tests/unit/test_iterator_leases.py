"""The loop's leases: how long they last, and what happens where others hold keys."""

# ruff: noqa: PT012, PT031 (loops are left and leases lost in the middle of a block)

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest

from distlock_proto import lock_table_pb2 as pb
from run_once import (
    DistributedIterator,
    LeaseLostError,
    LeaseLostWarning,
    NotHeldError,
    lease_of,
    notify_failure,
    notify_success,
)
from run_once.config import load_config
from run_once.task import Session
from tests.other_client import Other, until
from tests.servers import InprocServer

ABSENT, DONE, FAILED = pb.KEY_STATE_ABSENT, pb.KEY_STATE_DONE, pb.KEY_STATE_FAILED
BUSY = pb.KEY_STATE_BUSY
pytestmark = pytest.mark.usefixtures("configured_server")


# ---------------------------------------------------------------- timeouts


def test_kept_alive() -> None:
    """Without a timeout the lease is under the keeper's care while the item is worked on."""
    for item in DistributedIterator(["a"], lease_s=30):
        lease = lease_of(item)
        assert lease.held
        assert lease.token > 0
        assert lease.attempt == 1
        assert lease.lease in Session.get(load_config(lease_s=30)).keeper.leases()


@pytest.mark.parametrize("timeout", [60, 60.0, timedelta(minutes=1)])
def test_timeout_is_not_renewed(
    other: Other, timeout: Any, configured_server: InprocServer
) -> None:
    """With a timeout only `notify_success` makes done; the lease is not renewed, and runs out."""
    for item in DistributedIterator(["a", "b"], timeout=timeout):
        assert not any(
            lease.key == item.encode() for lease in Session.get(load_config()).keeper.leases()
        )
        if item == "b":
            notify_success(item)
    assert other.states("a", "b") == [BUSY, DONE]
    configured_server.advance(61)
    assert other.states("a") == [pb.KEY_STATE_EXPIRED]
    notify_success("a")  # nobody else was granted the key
    assert other.states("a") == [DONE]


def test_timeout_outlives_the_loop(other: Other) -> None:
    """`break` leaves an item with a timeout alone: it is exclusively ours for that time."""
    for _item in DistributedIterator(["a"], timeout=60):
        break
    assert other.states("a") == [BUSY]


def test_timeout_zero(other: Other) -> None:
    """With timeout=0 an item is done, acknowledged, before it is handed out, whatever comes."""
    loop = DistributedIterator(["a", "b"], timeout=0)
    for item in loop:
        assert other.states(item) == [DONE]
        break
    assert loop.counts.completed == 1
    with pytest.raises(NotHeldError):
        notify_failure("a")
    assert list(DistributedIterator(["a", "b"], timeout=0)) == ["b"]


# ---------------------------------------------------------------- others


def test_busy_keys_are_left_to_others(other: Other) -> None:
    """Without `wait`, keys that others work on are passed over."""
    other.claim("a")
    loop = DistributedIterator(["a", "b"])
    assert list(loop) == ["b"]
    assert loop.counts.busy == 1


def test_wait_takes_over(other: Other, configured_server: InprocServer) -> None:
    """With `wait` the loop stays, takes over what runs out or is dropped, and sees what is done."""
    dying, failing, working = other.claim("a"), other.claim("b"), other.claim("c")
    seen: list[str] = []

    def work() -> None:
        seen.extend(DistributedIterator(["a", "b", "c", "d"], wait=True))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        until(lambda: other.states("d") == [DONE])
        other.settle(failing, "fail")
        until(lambda: other.states("b") == [DONE])
        assert thread.is_alive()
        configured_server.advance(30)
        other.client.renew([(working[0], 60.0, True)])
        configured_server.advance(40)
        until(lambda: other.states("a") == [DONE])
        assert thread.is_alive()
        other.settle(working, "complete")
    finally:
        thread.join(60)
    assert not thread.is_alive()
    assert sorted(seen) == ["a", "b", "d"]
    assert dying[0].token > 0


def test_ahead_is_come_back_to(other: Other) -> None:
    """A key that another holds only ahead is come back to, even without `wait`."""
    ahead = other.claim("a", ahead=True)
    seen: list[str] = []
    thread = threading.Thread(target=lambda: seen.extend(DistributedIterator(["a", "b"])))
    thread.start()
    until(lambda: other.states("b") == [DONE])
    other.settle(ahead, "release")
    thread.join(60)
    assert seen == ["b", "a"]


def test_ahead_that_starts_is_left(configured_server: InprocServer, other: Other) -> None:
    """Once the other starts, the loop without `wait` leaves the key to it and ends."""
    ahead = other.claim("a", ahead=True)
    seen: list[str] = []
    thread = threading.Thread(target=lambda: seen.extend(DistributedIterator(["a", "b"])))
    thread.start()
    until(lambda: other.states("b") == [DONE])
    other.client.renew([(ahead[0], 60.0, True)])

    def has_ended() -> bool:
        configured_server.advance(0.1)  # a start ends no long poll: it has to run out
        return not thread.is_alive()

    until(has_ended)
    assert seen == ["b"]


def test_lost_is_one_warning_and_a_count(configured_server: InprocServer, other: Other) -> None:
    """Lost leases: the first is a warning that points at the loop, all count, the loop goes on."""
    loop = DistributedIterator(["a", "b", "c"])
    seen = []
    with pytest.warns(LeaseLostWarning, match="'a'") as caught:
        for item in loop:
            seen.append(item)
            if item != "c":
                configured_server.advance(200)
                other.claim(item)
    assert seen == ["a", "b", "c"]
    assert loop.counts.lost == 2
    assert loop.counts.completed == 1
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_lost_while_working(configured_server: InprocServer, other: Other) -> None:
    """A loss that the keeper hears of shows in `held`, and is warned of at the next item."""
    loop = DistributedIterator(["a", "b"])
    with pytest.warns(LeaseLostWarning, match="'a'"):
        for item in loop:
            if item == "a":
                lease = lease_of(item)
                assert lease.held
                configured_server.advance(200)
                other.claim(item)
                session = Session.get(load_config())
                session.keeper.step(session.client.clock.now_ns() + 100_000_000_000)
                assert not lease.held
    assert (loop.counts.lost, loop.counts.completed) == (1, 1)


def test_lost_with_wait_is_done_again(configured_server: InprocServer, other: Other) -> None:
    """With `wait`, a lost key is come back to if its new holder drops it."""
    seen = []
    with pytest.warns(LeaseLostWarning):
        for item in DistributedIterator(["a", "b"], wait=True):
            seen.append(item)
            if seen == ["a"]:
                configured_server.advance(200)
                grants = other.claim("a")
            elif item == "b":
                other.settle(grants, "release")
    assert seen == ["a", "b", "a"]
    assert other.states("a") == [DONE]


def test_max_attempts(other: Other) -> None:
    """A key that failed as often as max_attempts allows is left alone."""
    for _ in range(2):
        for item in DistributedIterator(["a"], max_attempts=2):
            notify_failure(item)
    loop = DistributedIterator(["a", "b"], max_attempts=2)
    assert list(loop) == ["b"]
    assert loop.counts.exhausted == 1
    assert list(DistributedIterator(["a"])) == ["a"]


# ---------------------------------------------------------------- explicit claims


def test_claim_settles_by_how_the_block_ends(other: Other) -> None:
    """A block that ends well makes done, an exception fails, an interrupt gives back."""
    keys = DistributedIterator(["a", "b", "c"])
    with keys.claim() as lease:
        assert lease is not None
        assert (lease.item, lease.key, lease.held) == ("a", b"a", True)
    with pytest.raises(ValueError, match="bad"), keys.claim() as lease:
        raise ValueError("bad")
    with pytest.raises(KeyboardInterrupt), keys.claim() as lease:
        raise KeyboardInterrupt
    assert other.states("a", "b", "c") == [DONE, FAILED, ABSENT]
    with keys.claim() as lease:
        assert lease is None
    with keys.claim() as lease:
        assert lease is not None
        assert lease.item == "b"


def test_claim_lost_raises(configured_server: InprocServer, other: Other) -> None:
    """A block whose lease was lost ends with LeaseLostError."""
    keys = DistributedIterator(["a"])
    with pytest.raises(LeaseLostError, match="'a'"), keys.claim():
        configured_server.advance(200)
        other.claim("a")
