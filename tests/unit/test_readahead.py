"""Consumers that ask for the next item before they are through with the last one."""

# ruff: noqa: PT031 (loops are left and leases lost in the middle of a block)

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from distlock_proto import lock_table_pb2 as pb
from run_once import (
    DistributedIterator,
    NotHeldError,
    RunOnceWarning,
    lease_of,
    notify_failure,
    notify_success,
)
from tests.other_client import Other

ABSENT, DONE, FAILED = pb.KEY_STATE_ABSENT, pb.KEY_STATE_DONE, pb.KEY_STATE_FAILED
BUSY = pb.KEY_STATE_BUSY
pytestmark = pytest.mark.usefixtures("configured_server")


def test_executor_map_warns_once() -> None:
    """`executor.map`, which takes all items before the first is worked on, is warned of, once."""
    with ThreadPoolExecutor(2) as pool, pytest.warns(RunOnceWarning, match="reads ahead") as caught:
        list(pool.map(str, DistributedIterator(["a", "b", "c"])))
    assert len(caught) == 1
    assert 'settle="explicit"' in str(caught[0].message)


def test_another_thread_warns_once() -> None:
    """Asking from another thread than the first item was asked from is warned of, once."""
    loop = iter(DistributedIterator(["a", "b", "c"]))
    next(loop)
    with pytest.warns(RunOnceWarning, match="another thread") as caught:
        for _ in range(2):
            thread = threading.Thread(target=lambda: next(loop))
            thread.start()
            thread.join()
    assert len(caught) == 1


def test_asking_twice_at_once_warns() -> None:
    """Asking while another request for an item is under way is warned of, and harmless."""
    entered, go_on = threading.Event(), threading.Event()

    def keys() -> Iterator[str]:
        yield "a"
        entered.set()
        assert go_on.wait(30)
        yield "b"

    loop = iter(DistributedIterator(keys(), chunksize=1))
    assert next(loop) == "a"
    got: list[str | None] = []
    threads = [threading.Thread(target=lambda: got.append(next(loop, None))) for _ in range(2)]
    with pytest.warns(RunOnceWarning):
        threads[0].start()
        assert entered.wait(30)
        threads[1].start()
        go_on.set()
        for thread in threads:
            thread.join(30)
    assert sorted(got, key=str) == [None, "b"]


def test_plain_loops_do_not_warn() -> None:
    """Plain loops, tqdm, enumerate and loops within a pool's worker are safe, and not warned of."""
    from tqdm import tqdm

    def work(version: int) -> list[str]:
        return [item for item in DistributedIterator(["a", "b"], version=version)]  # noqa: C416

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(work(0)) == 2
        assert len(list(enumerate(DistributedIterator(["a", "b"], version=1)))) == 2
        assert len(list(tqdm(DistributedIterator(["a", "b"], version=2), disable=True))) == 2
        with ThreadPoolExecutor(1) as pool:
            assert len(pool.submit(work, 3).result()) == 2


def test_explicit_items_stay_ours(other: Other) -> None:
    """With settle="explicit", asking on, and even leaving the loop, settles nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        taken = list(itertools.islice(DistributedIterator(["a", "b", "c"], settle="explicit"), 2))
    assert taken == ["a", "b"]
    assert other.states("a", "b", "c") == [BUSY, BUSY, ABSENT]
    notify_success("a")
    notify_failure("b")
    assert other.states("a", "b") == [DONE, FAILED]
    with pytest.raises(NotHeldError):
        notify_success("a")


def test_explicit_items_are_forgotten_once_settled() -> None:
    """What is settled leaves no trace in this process, in whatever order it is settled."""
    items = list(DistributedIterator(range(20), settle="explicit"))
    for item in reversed(items):
        notify_success(item)
    assert not any(lease_is_known(item) for item in items)


def lease_is_known(item: object) -> bool:
    """Tell whether an item is still registered."""
    try:
        lease_of(item)
    except NotHeldError:
        return False
    return True
