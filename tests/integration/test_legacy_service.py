"""The contract of 2021 on our server, where a clock must move or it differs on purpose."""

from __future__ import annotations

import os
import time
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from distlock_proto import legacy_pb2 as pb
from distlock_proto import lock_table_pb2
from tests.servers import InprocServer

WALL_S = 1_700_000_000


def acquire(key: str, seconds: float | None, overwrite: bool = False, **more: Any) -> Any:
    """Make a request for one lock."""
    lock = pb.Lock(global_id=key, **more)
    if seconds is not None:
        lock.expires_in.CopyFrom(Duration(seconds=int(seconds), nanos=round(seconds % 1 * 1e9)))
    return pb.AcquireLockRequest(lock=lock, overwrite=overwrite)


def code_of(call: Any) -> tuple[grpc.StatusCode, str]:
    """Make a call that must fail; give its status and sentence."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return error.code(), error.details()


def ids(locks: Any) -> list[str]:
    """Give the keys of locks."""
    return [lock.global_id for lock in locks]


def test_lock_until_it_expires(inproc_server: InprocServer) -> None:
    """A lock stands for its time, is then taken over, and the old one comes back as existing."""
    stub = inproc_server.legacy
    first = stub.AcquireLock(acquire("a", 60, last_owner_name="one", data=b"\x00d"))
    assert first.acquired_lock.acquired_since.seconds == WALL_S
    assert not first.HasField("existing_lock")
    inproc_server.advance(59)
    refused = stub.AcquireLock(acquire("a", 60))
    assert not refused.HasField("acquired_lock")
    assert refused.existing_lock == first.acquired_lock
    inproc_server.advance(1)
    taken = stub.AcquireLock(acquire("a", 30, last_owner_name="two"))
    assert taken.existing_lock == first.acquired_lock
    assert taken.acquired_lock.last_owner_name == "two"
    assert taken.acquired_lock.data == b""
    assert taken.acquired_lock.acquired_since.seconds == WALL_S + 60


def test_acquired_since_follows_the_lease(inproc_server: InprocServer) -> None:
    """acquired_since plus expires_in is where the server ends the lease, whatever wall time did."""
    stub = inproc_server.legacy
    stub.AcquireLock(acquire("a", 100))
    clock: Any = inproc_server.clock
    clock.advance(10)
    clock.jump_wall(5000)
    (lock,) = stub.ListLocks(pb.ListLocksRequest()).locks
    now_s = stub.GetCurrentServerTime(pb.GetCurrentServerTimeRequest()).server_time.seconds
    assert now_s == WALL_S + 5010
    assert lock.acquired_since.seconds + lock.expires_in.seconds - now_s == 90


def test_missing_expires_in_changes_nothing(inproc_server: InprocServer) -> None:
    """A batch with a request without expires_in is refused whole, by name, with nothing done."""
    stub = inproc_server.legacy
    many = pb.AcquireManyRequest(requests=[acquire("good", 5), acquire("bad", None)])
    any_good = pb.AnyRequest(acquire_lock_request=acquire("good", 5))
    any_bad = pb.AnyRequest(acquire_many_request=many)
    for call in (
        lambda: stub.AcquireLock(acquire("bad", None, overwrite=True)),
        lambda: stub.AcquireMany(many),
        lambda: stub.AcquireMany(
            pb.AcquireManyRequest(requests=many.requests, max_acquired_locks=1)
        ),
        lambda: stub.ProcessBatch(pb.ProcessBatchRequest(requests=[any_good, any_bad])),
        lambda: stub.ProcessBatch(
            pb.ProcessBatchRequest(requests=[any_good, any_bad], is_synchronized=True)
        ),
    ):
        code, text = code_of(call)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "expires_in" in text
        assert "'bad'" in text
    assert ids(stub.ListLocks(pb.ListLocksRequest()).locks) == []


def test_release_without_a_lock_is_refused(inproc_server: InprocServer) -> None:
    """A release without a key is INVALID_ARGUMENT; in 2021 it ended the server."""
    code, _ = code_of(lambda: inproc_server.legacy.ReleaseLock(pb.ReleaseLockRequest()))
    assert code is grpc.StatusCode.INVALID_ARGUMENT


def test_done_key_stays_as_it_is(inproc_server: InprocServer) -> None:
    """Overwriting a done key with a permanent lock changes nothing and returns it as both locks."""
    stub = inproc_server.legacy
    first = stub.AcquireLock(acquire("a", 0, last_owner_name="one", data=b"d")).acquired_lock
    revision = inproc_server.table.Lookup(lock_table_pb2.LookupRequest(keys=[b"a"])).revision
    inproc_server.advance(10)
    again = stub.AcquireLock(acquire("a", 0, overwrite=True, last_owner_name="two"))
    assert again.existing_lock == first
    assert again.acquired_lock == first
    after = inproc_server.table.Lookup(lock_table_pb2.LookupRequest(keys=[b"a"]))
    assert after.revision == revision
    assert first.HasField("expires_in")


def test_overwrite_ends_a_lease_of_a_newer_client(inproc_server: InprocServer) -> None:
    """A 2021 overwrite takes the key from a holder of 1.x, whose completion is then LOST."""
    claim_id = os.urandom(16)
    table = inproc_server.table
    request = lock_table_pb2.ClaimRequest(keys=[b"a"], claim_id=claim_id, ttl_ns=10**10)
    token = table.Claim(request).tokens[0]
    answer = inproc_server.legacy.AcquireLock(acquire("a", 0, overwrite=True))
    assert answer.existing_lock.expires_in.seconds == 10
    holder = lock_table_pb2.Holder(key=b"a", claim_id=claim_id, token=token)
    settlement = lock_table_pb2.Settlement(holder=holder, complete=lock_table_pb2.Complete())
    reply = table.Settle(lock_table_pb2.SettleRequest(settlements=[settlement]))
    assert list(reply.states) == [lock_table_pb2.KEY_STATE_LOST]


def test_failed_keys_are_invisible(inproc_server: InprocServer) -> None:
    """A failed key is not listed, not counted, not returned and not in the way."""
    table, stub = inproc_server.table, inproc_server.legacy
    for key in ("a", "b", "c"):
        claim_id = os.urandom(16)
        request = lock_table_pb2.ClaimRequest(keys=[key.encode()], claim_id=claim_id, ttl_ns=10**10)
        holder = lock_table_pb2.Holder(
            key=key.encode(), claim_id=claim_id, token=table.Claim(request).tokens[0]
        )
        settlement = lock_table_pb2.Settlement(holder=holder, fail=lock_table_pb2.Fail(error="no"))
        table.Settle(lock_table_pb2.SettleRequest(settlements=[settlement]))
    assert ids(stub.ListLocks(pb.ListLocksRequest()).locks) == []
    counts = stub.CountLocks(pb.CountLocksRequest())
    assert (counts.expired, counts.unexpired, counts.no_expiration) == (0, 0, 0)
    for key, seconds, overwrite in (("a", 5, False), ("b", 5, True), ("c", 0, False)):
        answer = stub.AcquireLock(acquire(key, seconds, overwrite))
        assert answer.HasField("acquired_lock")
        assert not answer.HasField("existing_lock")


def test_a_permanent_lock_is_a_completion(inproc_server: InprocServer) -> None:
    """What 2021 locks for ever is done for clients of 1.x, with a token of its own."""
    inproc_server.legacy.AcquireLock(acquire("a", 0, last_owner_name="old", data=b"d"))
    request = lock_table_pb2.LookupRequest(keys=[b"a"], want_infos=True)
    (info,) = inproc_server.table.Lookup(request).infos
    assert info.state == lock_table_pb2.KEY_STATE_DONE
    assert info.owner == "old"
    assert info.token > 0


@pytest.mark.parametrize("seconds", [10**12, 2**62])
def test_very_long_times_are_cut(inproc_server: InprocServer, seconds: int) -> None:
    """A lock for longer than the server can count is held for about a century, and not refused."""
    lock = pb.Lock(global_id="a", expires_in=Duration(seconds=seconds))
    answer = inproc_server.legacy.AcquireLock(pb.AcquireLockRequest(lock=lock))
    assert answer.acquired_lock.expires_in.seconds > 100 * 365 * 24 * 3600
    inproc_server.advance(50 * 365 * 24 * 3600)
    assert not inproc_server.legacy.AcquireLock(acquire("a", 5)).HasField("acquired_lock")


def test_negative_times_are_expired_at_once(inproc_server: InprocServer) -> None:
    """A negative expires_in, which 2021 accepted, gives a lock that is never in the way."""
    lock = pb.Lock(global_id="a", expires_in=Duration(seconds=-5))
    assert inproc_server.legacy.AcquireLock(pb.AcquireLockRequest(lock=lock)).HasField(
        "acquired_lock"
    )
    inproc_server.advance(0.001)
    assert inproc_server.legacy.AcquireLock(acquire("a", 5)).HasField("acquired_lock")


def test_acquire_many_is_bounded_by_size_only(inproc_server: InprocServer) -> None:
    """A request with far more keys than 1.x allows is answered, limit on locks included."""
    n_keys = 25_000
    requests = [acquire(f"{number}", 60) for number in range(n_keys)]
    request = pb.AcquireManyRequest(requests=requests, max_acquired_locks=20_000)
    assert len(inproc_server.legacy.AcquireMany(request, timeout=60).responses) == 20_000
    answer = inproc_server.legacy.AcquireMany(request, timeout=60)
    assert len(answer.responses) == n_keys
    n_acquired = sum(one.HasField("acquired_lock") for one in answer.responses)
    assert n_acquired == 5_000


def test_data_that_fits_no_record(inproc_server: InprocServer) -> None:
    """A lock whose data would not fit into a record is refused, and the server goes on."""
    data = b"x" * (16 * 2**20 - 100)
    code, text = code_of(lambda: inproc_server.legacy.AcquireLock(acquire("a", 5, data=data)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "'a'" in text
    data = b"x" * (16 * 2**20 - 2**16)
    answer = inproc_server.legacy.AcquireLock(acquire("a", 5, data=data))
    assert answer.acquired_lock.data == data


def test_page_of_large_locks_has_two(inproc_server: InprocServer) -> None:
    """A page has two locks at least while there are more: 2021 takes one for the last page."""
    stub = inproc_server.legacy
    for key in "abcd":
        stub.AcquireLock(acquire(key, 5, data=key.encode() * 3_000_000))
    assert ids(stub.ListLocks(pb.ListLocksRequest()).locks) == ["a", "b"]
    assert ids(stub.ListLocks(pb.ListLocksRequest(start_key="b")).locks) == ["b", "c"]


def test_stalling_pattern_stalls_nobody(inproc_server: InprocServer) -> None:
    """A pattern that takes a backtracking engine minutes is answered in time, by RE2."""
    stub = inproc_server.legacy
    stub.AcquireLock(acquire("a" * 40 + "b", 5))
    started_s = time.monotonic()
    request = pb.ListLocksRequest(includes=[pb.LockMatchExpression(global_id_regex="(a+)+$")])
    assert ids(stub.ListLocks(request, timeout=20).locks) == []
    assert time.monotonic() - started_s < 10


def test_synchronized_batch_is_one_transaction(inproc_server: InprocServer) -> None:
    """Steps of a synchronized batch see each other's changes, done keys and releases included."""
    stub = inproc_server.legacy
    listing = pb.AnyRequest(list_locks_request=pb.ListLocksRequest())
    release = pb.ReleaseLockRequest(lock=pb.Lock(global_id="a"), return_released_lock=True)
    request = pb.ProcessBatchRequest(
        is_synchronized=True,
        requests=[
            pb.AnyRequest(acquire_lock_request=acquire("a", 5)),
            listing,
            pb.AnyRequest(release_lock_request=release),
            pb.AnyRequest(acquire_lock_request=acquire("b", 0)),
            listing,
        ],
    )
    responses = stub.ProcessBatch(request).responses
    assert ids(responses[1].list_locks_response.locks) == ["a"]
    assert responses[2].release_lock_response.released_lock.global_id == "a"
    assert ids(responses[4].list_locks_response.locks) == ["b"]
    assert ids(stub.ListLocks(pb.ListLocksRequest()).locks) == ["b"]
