"""The server of 2021 and ours, driven alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import grpc
import pytest
from google.protobuf.json_format import MessageToDict

from distlock_proto import legacy_pb2 as pb
from distlock_proto.legacy_pb2_grpc import LockManagerServiceStub
from tests.legacy_2021 import Running, acquire
from tests.servers import connect

SHORT_NS: Final = 30_000_000


def expression(pattern: str, is_expired: bool = False) -> pb.LockMatchExpression:
    """Make an include or exclude."""
    return pb.LockMatchExpression(global_id_regex=pattern, is_expired=is_expired)


class Driver:
    """Makes calls and writes down what a client can see of the answers, without times."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.seen: list[Any] = []
        self._stub = LockManagerServiceStub(channel)

    def call(self, method: str, request: Any) -> Any:
        """Make a call and write down its answer."""
        try:
            answer = getattr(self._stub, method)(request, timeout=20)
        except grpc.RpcError as error:
            self.seen.append((method, error.code()))
            return None
        self.seen.append((method, _without_times(MessageToDict(answer))))
        return answer

    def acquire(self, *arguments: Any, **more: Any) -> Any:
        """Acquire one lock."""
        return self.call("AcquireLock", acquire(*arguments, **more))

    def many(self, *requests: Any, limit: int = 0) -> None:
        """Acquire several locks."""
        self.call("AcquireMany", pb.AcquireManyRequest(requests=requests, max_acquired_locks=limit))

    def release(self, key: str, wants_lock: bool = True) -> None:
        """Release one lock."""
        lock = pb.Lock(global_id=key)
        self.call("ReleaseLock", pb.ReleaseLockRequest(lock=lock, return_released_lock=wants_lock))

    def list(self, **more: Any) -> None:
        """List locks."""
        self.call("ListLocks", pb.ListLocksRequest(**more))

    def count(self, **more: Any) -> None:
        """Count locks."""
        self.call("CountLocks", pb.CountLocksRequest(**more))

    def await_expiry(self, n_keys: int) -> None:
        """Return once so many locks have expired."""
        deadline_s = time.monotonic() + 20
        while self._stub.CountLocks(pb.CountLocksRequest(), timeout=20).expired < n_keys:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


def _without_times(value: Any) -> Any:
    """Say of times only that they are there."""
    if isinstance(value, dict):
        times = ("elapsed", "acquiredSince", "serverTime")
        return {
            name: "a time" if name in times else _without_times(inner)
            for name, inner in value.items()
        }
    if isinstance(value, list):
        return [_without_times(inner) for inner in value]
    return value


def _acquire(driver: Driver) -> None:
    driver.acquire("a", last_owner_name="me", data=b"\x00\xff")
    driver.acquire("a", 5, last_owner_name="you")
    driver.acquire("ключ🎉", 5)
    driver.acquire("a\x00b", 5)
    driver.acquire("acquired", 5, acquired_since={"seconds": 5})
    driver.list()


def _permanent(driver: Driver) -> None:
    driver.acquire("a", 0, last_owner_name="me", data=b"d")
    driver.acquire("a", 0)
    driver.acquire("a", 10**10, last_owner_name="you")
    driver.acquire("b", 0, overwrite=True)
    driver.list()


def _overwrite(driver: Driver) -> None:
    driver.acquire("a", last_owner_name="me", data=b"d")
    driver.acquire("a", 5 * 10**9, overwrite=True, last_owner_name="you")
    driver.acquire("a", 0, overwrite=True, last_owner_name="you", data=b"e")
    driver.acquire("a", 7 * 10**9, overwrite=True)
    driver.acquire("a")
    driver.list()


def _complete_twice(driver: Driver) -> None:
    """With equal owner and data: ours keeps the first completion, 2021 wrote the second."""
    driver.acquire("a")
    driver.acquire("a", 0, overwrite=True)
    driver.acquire("a", 0, overwrite=True)


def _expired(driver: Driver) -> None:
    for key in ("timed", "permanent", "overwritten", "released", "left"):
        driver.acquire(key, SHORT_NS, last_owner_name="first", data=b"D")
    driver.await_expiry(5)
    driver.count()
    driver.list(includes=[expression(".*", is_expired=True)])
    driver.list(excludes=[expression(".*", is_expired=True)])
    driver.acquire("timed", last_owner_name="second")
    driver.acquire("permanent", 0, last_owner_name="second")
    driver.acquire("overwritten", overwrite=True)
    driver.release("released")
    driver.count()
    driver.list()


def _invalid(driver: Driver) -> None:
    driver.acquire("a", None)
    driver.acquire("a", None, overwrite=True)
    driver.acquire("", 5)
    driver.acquire("k" * 1024, 10**10)
    driver.acquire("k" * 1025, 10**10)
    driver.call("AcquireLock", pb.AcquireLockRequest())
    driver.release("")
    driver.release("k" * 1025)
    driver.many(acquire("b", None))
    driver.many(acquire("", 5))
    driver.call("ProcessBatch", pb.ProcessBatchRequest(requests=[pb.AnyRequest()]))
    driver.list()


def _many(driver: Driver) -> None:
    requests = [acquire("m1"), acquire("m2", 0), acquire("m3"), acquire("m4")]
    driver.many()
    driver.many(*requests, limit=1)
    driver.many(*requests, limit=2)
    driver.many(*requests, limit=5)
    driver.many(*requests)
    driver.many(acquire("s"), acquire("s", 0), acquire("s", 0, overwrite=True))
    driver.list()


def _release(driver: Driver) -> None:
    driver.release("nothing")
    driver.release("nothing", wants_lock=False)
    driver.acquire("a", last_owner_name="me", data=b"d")
    driver.release("a")
    driver.acquire("a", 0)
    driver.release("a", wants_lock=False)
    driver.acquire("a")


def _list(driver: Driver) -> None:
    for key in ("b", "a", "ab", "é", "z", "a b", "A"):
        driver.acquire(key)
    driver.acquire("done", 0)
    driver.list()
    driver.list(start_key="ab", end_key="é")
    driver.list(start_key="z", end_key="a")
    driver.list(start_key="é")
    driver.count(start_key="ab", end_key="é")
    driver.count(start_key="z", end_key="a")
    for pattern in ("a", "a.*", "", "(?i)A", ".", "é", "(", "(?=a)a", "a|b", "^a$", "done"):
        driver.list(includes=[expression(pattern)])
        driver.list(excludes=[expression(pattern)])
        driver.list(includes=[expression(pattern, is_expired=True)])
    driver.list(includes=[expression("a.*"), expression("z")], excludes=[expression("ab")])
    driver.list(includes=[pb.LockMatchExpression()])


def _batch(driver: Driver) -> None:
    for is_synchronized in (False, True):
        prefix = f"{is_synchronized}-"
        many = pb.AcquireManyRequest(
            requests=[acquire(f"{prefix}c", 0), acquire(f"{prefix}d", 0)], max_acquired_locks=1
        )
        listing = pb.ListLocksRequest(start_key=prefix, end_key=f"{is_synchronized}.")
        release = pb.ReleaseLockRequest(
            lock=pb.Lock(global_id=f"{prefix}a"), return_released_lock=True
        )
        steps = [
            pb.AnyRequest(acquire_lock_request=acquire(f"{prefix}a")),
            pb.AnyRequest(acquire_lock_request=acquire(f"{prefix}a", 5)),
            pb.AnyRequest(acquire_many_request=many),
            pb.AnyRequest(list_locks_request=listing),
            pb.AnyRequest(release_lock_request=release),
            pb.AnyRequest(get_current_server_time_request={}),
            pb.AnyRequest(list_locks_request=listing),
        ]
        request = pb.ProcessBatchRequest(requests=steps, is_synchronized=is_synchronized)
        driver.call("ProcessBatch", request)
    driver.call("ProcessBatch", pb.ProcessBatchRequest())
    driver.call("GetCurrentServerTime", pb.GetCurrentServerTimeRequest())


SCENARIOS: Final[dict[str, Callable[[Driver], None]]] = {
    scenario.__name__.lstrip("_"): scenario
    for scenario in (
        _acquire,
        _permanent,
        _overwrite,
        _complete_twice,
        _expired,
        _invalid,
        _many,
        _release,
        _list,
        _batch,
    )
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_both_servers_answer_alike(server_2021: Running, server: Running, scenario: str) -> None:
    """The same calls are answered alike by the server of 2021 and by ours, times apart."""
    seen = []
    for running in (server_2021, server):
        with connect(running.address) as channel:
            driver = Driver(channel)
            SCENARIOS[scenario](driver)
            seen.append(driver.seen)
    assert len(seen[0]) > 2
    assert seen[1] == seen[0]
