"""Consumers that read ahead, with settle="explicit": nothing is done before its work is."""

from __future__ import annotations

import multiprocessing
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from distlock_proto import lock_table_pb2 as pb
from run_once import DistributedIterator, RunOnceWarning, lease_of, notify_failure, notify_success
from run_once.live import registry
from tests.other_client import Other
from tests.servers import ServerProcess

KEYS = [f"key-{number}" for number in range(12)]
DONE, BUSY, FAILED = pb.KEY_STATE_DONE, pb.KEY_STATE_BUSY, pb.KEY_STATE_FAILED


@pytest.fixture
def other(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[Other]:
    """Configure the server, and give another process's client."""
    monkeypatch.setenv("RUN_ONCE_RETRY_S", "20")
    monkeypatch.setenv("RUN_ONCE_ADDRESS", server.address)
    made = Other(server.address)
    yield made
    made.client.close()
    for item in registry().held(is_kept_only=False):
        registry().remove(item)  # those whose handles were given away


def test_executor_map(other: Other) -> None:
    """Threads of an executor settle what they worked on; nothing is done while they wait."""
    gate = threading.Event()

    def work(key: str) -> str:
        assert gate.wait(60)
        if key == "key-3":
            notify_failure(key)
        else:
            notify_success(key)
        return key

    with warnings.catch_warnings(), ThreadPoolExecutor(3) as pool:
        warnings.simplefilter("error")
        results = pool.map(work, DistributedIterator(KEYS, settle="explicit"))
        assert other.states(*KEYS) == [BUSY] * len(KEYS)
        gate.set()
        assert list(results) == KEYS
    expected = [FAILED if key == "key-3" else DONE for key in KEYS]
    assert other.states(*KEYS) == expected


def work_in_process(key: str) -> str:
    """Stand for work."""
    return key.upper()


def settle_in_process(task: tuple[str, Any]) -> str:
    """Work, and settle by the handle that was passed."""
    key, handle = task
    notify_success(handle)
    return key


def test_pool_imap_settled_by_the_parent(other: Other) -> None:
    """`Pool.imap` reads everything ahead; the parent settles each item when its result is back."""
    items = DistributedIterator(KEYS, settle="explicit")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for count, result in enumerate(pool.imap(work_in_process, items), start=1):
            notify_success(result.lower())
            assert other.client.count().done == count
    assert other.states(*KEYS) == [DONE] * len(KEYS)


def test_pool_imap_settled_by_the_workers(other: Other) -> None:
    """Handles go with the items to a pool's processes, which settle themselves."""
    items = DistributedIterator(KEYS, settle="explicit")
    tasks = ((key, lease_of(key).handle) for key in items)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert list(pool.imap(settle_in_process, tasks)) == KEYS
    assert other.states(*KEYS) == [DONE] * len(KEYS)


def test_threads_share_one_loop(other: Other) -> None:
    """Several threads may take items of one explicit loop; each comes to one of them."""
    loop = iter(DistributedIterator(KEYS, settle="explicit"))

    def work() -> list[str]:
        mine = []
        for key in loop:
            notify_success(key)
            mine.append(key)
        return mine

    with ThreadPoolExecutor(3) as pool:
        taken = [future.result() for future in [pool.submit(work) for _ in range(3)]]
    assert sorted(key for mine in taken for key in mine) == sorted(KEYS)
    assert other.states(*KEYS) == [DONE] * len(KEYS)


def test_without_explicit_it_warns(other: Other) -> None:
    """The same consumer without settle="explicit" is warned of, since it is wrong."""
    with ThreadPoolExecutor(2) as pool, pytest.warns(RunOnceWarning, match="reads ahead"):
        list(pool.map(str.upper, DistributedIterator(KEYS)))
