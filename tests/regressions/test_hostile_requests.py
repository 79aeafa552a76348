"""Requests that kept all others waiting for seconds, took gigabytes, or filled the log."""

from __future__ import annotations

import time

import grpc
import pytest

from distlock_proto import legacy_pb2 as pb
from distlock_server.limits import MAX_PARTS_PER_REQUEST, MAX_REPLY_BYTES, MAX_SYNCHRONIZED_READS
from tests.hostile.methods import METHODS, raw_call
from tests.hostile.requests import memory_bytes
from tests.servers import InprocServer, ServerProcess, connect
from tests.service_calls import claim, refused

ITEM = b"\x0a\x00"


@pytest.mark.parametrize("name", ["Renew", "Settle", "Invalidate", "AcquireMany", "ProcessBatch"])
def test_items_are_counted_before_they_are_made(name: str, server: ServerProcess) -> None:
    """8 million items of two bytes are refused, and cost about the memory of their bytes."""
    path = next(method.path for method in METHODS if method.name == name)
    before = memory_bytes(server.pid)
    with connect(server.address) as channel:
        call = raw_call(channel, path)
        refused(
            lambda: call(ITEM * 8_000_000, timeout=60),
            grpc.StatusCode.INVALID_ARGUMENT,
            f"more than {MAX_PARTS_PER_REQUEST} parts",
        )
    assert memory_bytes(server.pid) - before < 150 << 20


def test_items_are_counted_inside_of_items(inproc_server: InprocServer) -> None:
    """Also where a batch holds the request that holds them."""
    many = ITEM * MAX_PARTS_PER_REQUEST
    inner = b"\x12" + _length(len(many)) + many
    call = raw_call(inproc_server.channel, "/distlock.LockManagerService/ProcessBatch")
    refused(
        lambda: call(b"\x0a" + _length(len(inner)) + inner, timeout=60),
        grpc.StatusCode.INVALID_ARGUMENT,
        "parts",
    )


def _length(number: int) -> bytes:
    made = b""
    while number >= 0x80:
        made += bytes([number & 0x7F | 0x80])
        number >>= 7
    return made + bytes([number])


@pytest.mark.parametrize(
    "path",
    [
        "/distlock.v1.LockTable/Claim",
        "/distlock.LockManagerService/AcquireLock",
        "/grpc.health.v1.Health/Check",
    ],
)
def test_no_message_is_refused_without_a_traceback(path: str, server: ServerProcess) -> None:
    """Whoever sends what is no message made a mistake, and cannot fill the server's log with it."""
    with connect(server.address) as channel:
        call = raw_call(channel, path)
        refused(
            lambda: call(b"\xff\xff\xff"), grpc.StatusCode.INVALID_ARGUMENT, "the request is no"
        )
    assert "Traceback" not in server.log


def test_a_method_that_is_only_declared(server: ServerProcess) -> None:
    """A method of gRPC's own services that nothing implements is said to be so."""
    with connect(server.address) as channel:
        call = raw_call(channel, "/grpc.health.v1.Health/List")
        refused(lambda: call(b""), grpc.StatusCode.UNIMPLEMENTED)
    assert "Traceback" not in server.log


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["a" * 70_000], "at most 65536"),
        ([rf"(\pL{{1,100}}){{1,10}}{number}" for number in range(300)], "too complex"),
    ],
)
def test_patterns_have_bounds(patterns: list[str], words: str, inproc_server: InprocServer) -> None:
    """Patterns together cannot take gigabytes, or seconds of the event loop."""
    expressions = [pb.LockMatchExpression(global_id_regex=pattern) for pattern in patterns]
    request = pb.ListLocksRequest(includes=expressions)
    started_s = time.monotonic()
    refused(
        lambda: inproc_server.legacy.ListLocks(request), grpc.StatusCode.INVALID_ARGUMENT, words
    )
    assert time.monotonic() - started_s < 5


def _acquire(key: str, data: bytes = b"") -> pb.AcquireLockRequest:
    request = pb.AcquireLockRequest(lock=pb.Lock(global_id=key, data=data))
    request.lock.expires_in.seconds = 60
    return request


def test_a_large_lock_that_is_named_often(inproc_server: InprocServer) -> None:
    """The reply has the data of a lock while there is room for it, not thousands of times."""
    data = b"d" * (1 << 20)
    inproc_server.legacy.AcquireLock(_acquire("large", data=data))
    request = pb.AcquireManyRequest(requests=[_acquire("large")] * 5_000)
    answers = inproc_server.legacy.AcquireMany(request, timeout=60)
    assert answers.responses[0].existing_lock.data == data
    assert answers.responses[-1].existing_lock.data == b""
    assert answers.responses[-1].existing_lock.global_id == "large"
    assert answers.ByteSize() < 2 * MAX_REPLY_BYTES


def _batch(n_lists: int, *, is_synchronized: bool) -> pb.ProcessBatchRequest:
    lists = [pb.AnyRequest(list_locks_request=pb.ListLocksRequest())] * n_lists
    return pb.ProcessBatchRequest(requests=lists, is_synchronized=is_synchronized)


@pytest.mark.parametrize("is_synchronized", [False, True])
def test_a_batch_of_lists(is_synchronized: bool, inproc_server: InprocServer) -> None:
    """Lists of one batch share the room of one reply."""
    for number in range(4):
        inproc_server.legacy.AcquireLock(_acquire(f"k{number}", data=b"d" * (1 << 20)))
    few = inproc_server.legacy.ProcessBatch(_batch(1, is_synchronized=is_synchronized))
    assert len(few.responses[0].list_locks_response.locks) == 2
    many = _batch(9_000, is_synchronized=is_synchronized)
    refused(
        lambda: inproc_server.legacy.ProcessBatch(many, timeout=60),
        grpc.StatusCode.INVALID_ARGUMENT,
        "ask by ListLocks",
    )


def test_a_synchronized_batch_reads_little(inproc_server: InprocServer) -> None:
    """Nothing else runs during a synchronized batch, so its lists may not read all there is."""
    keys = [b"k%d" % number for number in range(9_000)]
    claim(inproc_server, keys)
    assert 5 * len(keys) > MAX_SYNCHRONIZED_READS
    refused(
        lambda: inproc_server.legacy.ProcessBatch(_batch(5, is_synchronized=True), timeout=60),
        grpc.StatusCode.INVALID_ARGUMENT,
        str(MAX_SYNCHRONIZED_READS),
    )
    inproc_server.legacy.ProcessBatch(_batch(3, is_synchronized=False), timeout=60)
