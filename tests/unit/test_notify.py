"""`notify_success` and `notify_failure`: which item is meant, and what becomes of it."""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from distlock_proto import lock_table_pb2 as pb
from distlock_server.clock import ManualClock
from distlock_server.engines.memory import MemoryEngine
from run_once import (
    AlreadyDoneError,
    AmbiguousKeyError,
    DistributedIterator,
    LeaseLostError,
    LeaseLostWarning,
    NotHeldError,
    lease_of,
    notify_failure,
    notify_success,
)
from run_once.config import load_config
from run_once.live import registry
from run_once.task import Session
from tests.other_client import Other
from tests.servers import InprocServer

ABSENT, DONE, FAILED = pb.KEY_STATE_ABSENT, pb.KEY_STATE_DONE, pb.KEY_STATE_FAILED
BUSY = pb.KEY_STATE_BUSY
pytestmark = pytest.mark.usefixtures("configured_server")


def test_notify_success_settles(other: Other) -> None:
    """`notify_success` returns when the key is done, and asking for the next item adds nothing."""
    loop = DistributedIterator(["a", "b"])
    for item in loop:
        notify_success(item)
        assert other.states(item) == [DONE]
    assert loop.counts.completed == 2


def test_notify_failure_settles(other: Other) -> None:
    """A failed item is free for others at once, has its error, and does not come again here."""
    seen = []
    loop = DistributedIterator(["a", "b"], wait=True)
    for item in loop:
        seen.append(item)
        try:
            if item == "a":
                raise ValueError("broken input")  # noqa: TRY301
        except ValueError:
            notify_failure(item)
    assert seen == ["a", "b"]
    assert loop.counts.failed == 1
    info = other.client.lookup([b"a"], want_infos=True).infos[0]
    assert info.state == FAILED
    assert "broken input" in info.error
    assert list(DistributedIterator(["a", "b"])) == ["a"]


def test_notify_by_any_name() -> None:
    """The yielded object, an equal one, the stored key as text, number or bytes: all are found."""
    names: list[tuple[Any, Any]] = [(7, 7), (8, "8"), (9, b"9_v001"), ("x", "x_v001"), ("y", "y")]
    for item, name in names:
        for _ in DistributedIterator([item], version=1, timeout=60):
            notify_success(name)
    big = [1, 2]
    for got in DistributedIterator([big], key=len, timeout=60):
        notify_success(got)
    assert list(DistributedIterator([item for item, _ in names], version=1)) == []


def test_notify_not_held(other: Other) -> None:
    """A key that this process does not hold, or gave up, is an error that says how to go on."""
    other.claim("a")
    with pytest.raises(NotHeldError, match=r"lease_of\(item\)\.handle"):
        notify_success("a")
    with pytest.raises(NotHeldError):
        notify_failure("a")
    loop = iter(DistributedIterator(["b"]))
    next(loop)
    loop.close()
    with pytest.raises(NotHeldError):
        notify_success("b")


def test_notify_twice() -> None:
    """A second success, as in 2021, is a ValueError; a failure after a success is refused, too."""
    for item in DistributedIterator(["a"]):
        notify_success(item)
        with pytest.raises(AlreadyDoneError):
            notify_success(item)
        notify_success(item, assert_unique=False)
        with pytest.raises(ValueError, match="done already"):
            notify_failure(item)


def test_notify_ambiguous(other: Other) -> None:
    """A name that fits two items is an error naming both; the stored key tells them apart."""
    one = iter(DistributedIterator(["a"], version=1))
    two = iter(DistributedIterator(["a"], version=2))
    next(one)
    next(two)
    with pytest.raises(AmbiguousKeyError, match=r"'a_v001'.*'a_v002'"):
        notify_success("a")
    notify_success("a_v002")
    assert other.states("a_v001", "a_v002") == [BUSY, DONE]
    notify_success("a")
    assert other.states("a_v001") == [DONE]


def test_notify_means_this_threads_item(other: Other) -> None:
    """Of two loops over equal items in two threads, each thread settles its own."""
    ready, settled = threading.Event(), threading.Event()

    def work() -> None:
        for item in DistributedIterator(["a"], version=2):
            ready.set()
            assert settled.wait(30)
            notify_success(item)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        assert ready.wait(30)
        for item in DistributedIterator(["a"], version=1):
            notify_success(item)
            assert other.states("a_v001", "a_v002") == [DONE, BUSY]
        settled.set()
        future.result()
    assert other.states("a_v002") == [DONE]


def test_notify_after_lost(configured_server: InprocServer, other: Other) -> None:
    """A success under a lost lease raises what became of the key; a failure then does nothing."""
    for item in DistributedIterator(["a", "b", "c"], timeout=10):
        configured_server.advance(20)
        (grant,) = other.claim(item)
        if item == "b":
            other.settle([grant], "complete")
            with pytest.raises(AlreadyDoneError):
                notify_success(item)
        elif item == "a":
            with pytest.raises(LeaseLostError, match="busy now"):
                notify_success(item)
        else:
            with pytest.warns(LeaseLostWarning):
                notify_success(item, assert_unique=False)
        notify_failure(item)
    assert other.states("a", "b", "c") == [BUSY, DONE, BUSY]


def test_handle_settles_from_elsewhere(other: Other) -> None:
    """A lease's handle pickles, and settles the item where the lease is not known."""
    for item in DistributedIterator(["a", "b"], settle="explicit"):
        handle = pickle.loads(pickle.dumps(lease_of(item).handle))
        registry().remove(lease_of(item))
        if item == "a":
            notify_success(handle)
            notify_success(handle, assert_unique=False)
        else:
            notify_failure(handle, "no luck")
    assert other.states("a", "b") == [DONE, FAILED]


def test_parent_forgets_what_a_handle_settled(other: Other) -> None:
    """What was settled elsewhere by a handle is forgotten here with the next renewal: no loss."""
    loop = DistributedIterator(["a"], settle="explicit")
    (item,) = loop
    handle = lease_of(item).handle
    session = Session.get(load_config())
    assert not session.complete(handle).is_lost
    session.keeper.step(session.client.clock.now_ns() + 100_000_000_000)
    with pytest.raises(NotHeldError):
        notify_success(item)
    assert loop.counts.lost == 0
    assert other.states("a") == [DONE]


def test_same_key_on_two_servers(
    other: Other, tmp_path: Path, cleanup: ExitStack, manual_clock: ManualClock
) -> None:
    """Equal keys on two servers are two keys."""
    second = InprocServer(MemoryEngine(), tmp_path / "second", manual_clock)
    cleanup.callback(second.close)
    loops = [DistributedIterator(["a"]), DistributedIterator(["a"], address=second.address)]
    running = [iter(loop) for loop in loops]
    assert [next(loop) for loop in running] == ["a", "a"]
    with pytest.raises(AmbiguousKeyError):
        notify_success("a")
    for loop in running:
        loop.close()


def test_told_loss_is_not_told_again(configured_server: InprocServer, other: Other) -> None:
    """A loop does not warn of a loss that `notify_success` raised before."""
    for item in DistributedIterator(["a", "b"]):
        if item == "a":
            configured_server.advance(200)
            other.claim(item)
            with pytest.raises(LeaseLostError):
                notify_success(item)
