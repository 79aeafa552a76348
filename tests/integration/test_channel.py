"""The client over a real channel to a real server."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from distlock_proto import lock_table_pb2 as pb
from run_once.channel import GrpcTransport, TransportError
from run_once.client import LockClient, RetryPolicy, Settlement
from run_once.errors import LimitError, ServerUnavailableError
from run_once.lease import LeaseKeeper
from tests.other_client import until
from tests.servers import InprocServer, ServerProcess

WAITING = """
import sys, threading, time
from run_once.channel import GrpcTransport
from run_once.client import LockClient
client = LockClient(GrpcTransport(sys.argv[1]))
client.claim([b"a"], ttl_s=600)

def is_inside():
    frame = sys._current_frames()[threading.main_thread().ident]
    files = set()
    while frame:
        files.add(frame.f_code.co_filename)
        frame = frame.f_back
    return any(file.endswith("retrying.py") for file in files)

def tell():
    while not is_inside():
        time.sleep(0.001)
    print("waiting", flush=True)

threading.Thread(target=tell).start()
try:
    if sys.argv[2] == "wait":
        client.wait([b"a"], 500)
    else:
        LockClient(GrpcTransport("127.0.0.1:9")).lookup([b"a"])
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.fixture
def client(server: ServerProcess, cleanup: ExitStack) -> LockClient:
    """Give a client of a server process."""
    made = LockClient(GrpcTransport(server.address), source="a test", owner="tester")
    cleanup.callback(made.close)
    return made


def test_whole_life_of_keys(client: LockClient) -> None:
    """Claim, renew, settle, read, count, reset and invalidate work over the wire."""
    answer = client.claim([b"a", b"b", b"c"], ttl_s=60, max_grants=2)
    assert list(answer.states) == [pb.KEY_STATE_GRANTED] * 2 + [pb.KEY_STATE_NOT_ASKED]
    renewed = client.renew([(grant, 60, True) for grant in answer.grants])
    assert [item.state for item in renewed] == [pb.KEY_STATE_RENEWED] * 2
    assert all(
        later.expires_ns > grant.expires_ns
        for later, grant in zip(renewed, answer.grants, strict=True)
    )
    value = pb.Result(storage=pb.Result.STORAGE_INLINE, payload=b"v", size_bytes=1)
    settled = client.settle(
        [
            Settlement(answer.grants[0], "complete", value),
            Settlement(answer.grants[1], "fail", error="x" * 100_000 + "the end"),
        ]
    )
    assert [item.state for item in settled] == [pb.KEY_STATE_COMPLETED, pb.KEY_STATE_FAILED]
    assert client.lookup([b"b", b"a"], want_results=True).results[b"a"].payload == b"v"
    found = client.lookup([b"a", b"b"], want_infos=True, want_results=True)
    assert found.infos[0].result.payload == b"v"
    assert found.infos[0].owner == "tester"
    assert found.infos[1].error.endswith("the end")
    assert [info.key for info in client.list()] == [b"a", b"b"]
    assert [info.key for info in client.list(only="failed")] == [b"b"]
    counted = client.count()
    assert (counted.done, counted.failed) == (1, 1)
    assert client.invalidate([(b"a", answer.grants[0].token)])[0] == pb.KEY_STATE_RESET
    assert client.reset([b"b"], found.revision)[0] == pb.KEY_STATE_RESET
    assert client.lookup([b"a", b"b"]).states == bytes([pb.KEY_STATE_ABSENT] * 2)


def test_many_keys(client: LockClient) -> None:
    """25,000 long keys are claimed, renewed and completed by one call each."""
    keys = [b"%d/" % number + b"x" * 500 for number in range(25_000)]
    grants = client.claim(keys, ttl_s=600).grants
    assert [grant.key for grant in grants] == keys
    assert len(client.renew([(grant, 600, True) for grant in grants])) == len(keys)
    answers = client.settle([Settlement(grant, "complete") for grant in grants])
    assert {answer.state for answer in answers} == {pb.KEY_STATE_COMPLETED}


def test_large_value(client: LockClient) -> None:
    """A value of several chunks comes back as it was."""
    data = random.Random(5).randbytes(3_500_000)
    (grant,) = client.claim([b"a"], ttl_s=60).grants
    result = client.upload_result(grant, data)
    assert client.settle([Settlement(grant, "complete", result)])[0].state == (
        pb.KEY_STATE_COMPLETED
    )
    assert client.download_result(b"a", grant.token, len(data)) == data


def test_server_says_what_is_wrong(client: LockClient) -> None:
    """A request over a limit is a LimitError with the server's sentence, and nothing is changed."""
    with pytest.raises(LimitError, match="comes twice"):
        client.claim([b"a", b"a"], ttl_s=60)
    with pytest.raises(LimitError, match="1025 bytes"):
        client.claim([b"x" * 1025, b"a"], ttl_s=60)
    assert client.lookup([b"a"]).states[0] == pb.KEY_STATE_ABSENT


def test_restart_in_between(client: LockClient, server: ServerProcess) -> None:
    """Calls go through a restart of the server, and the lease is still this holder's."""
    (grant,) = client.claim([b"a"], ttl_s=60).grants
    server.kill()
    starter = threading.Timer(1.0, server.start)
    starter.start()
    (answer,) = client.renew([(grant, 60, True)])
    starter.join()
    assert answer.state == pb.KEY_STATE_RENEWED
    assert client.settle([Settlement(grant, "complete")])[0].state == pb.KEY_STATE_COMPLETED


def test_keeper_over_a_restart(client: LockClient, server: ServerProcess) -> None:
    """The keeper's thread goes on renewing after the server was away."""
    keeper = LeaseKeeper(client)
    (grant,) = client.claim([b"a"], ttl_s=3).grants
    lease = keeper.adopt(grant, ttl_s=3)
    server.restart()
    before_ns = lease.grant.expires_ns
    end_s = time.monotonic() + 60
    while lease.grant.expires_ns <= before_ns and time.monotonic() < end_s:
        time.sleep(0.02)
    assert lease.held
    keeper.close()


def test_nobody_answers(cleanup: ExitStack) -> None:
    """A server that is not there is an error of ours that names address and source."""
    client = LockClient(
        GrpcTransport("127.0.0.1:9"), retry=RetryPolicy(total_s=0.5), source="RUN_ONCE_ADDRESS"
    )
    cleanup.callback(client.close)
    with pytest.raises(
        ServerUnavailableError, match=r"127\.0\.0\.1:9 \(from RUN_ONCE_ADDRESS\)"
    ) as raised:
        client.lookup([b"a"])
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__ or raised.value.__context__ is None


def test_unix_socket(tmp_path: Path, cleanup: ExitStack, start_server: object) -> None:
    """A unix socket is an address like any other."""
    assert callable(start_server)
    path = f"{os.environ['RUN_ONCE_RUNTIME_DIR']}/s"
    start_server(f"--unix_socket={path}", folder=tmp_path / "one")
    client = LockClient(GrpcTransport(f"unix:{path}"))
    cleanup.callback(client.close)
    assert client.server_info().engine


@pytest.mark.parametrize("what", ["wait", "retry"])
def test_interrupt(what: str, server: ServerProcess) -> None:
    """Ctrl-C ends a long poll and the retries of an unreachable server within a moment."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, server.address, what], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "waiting\n"
        before_s = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert out == "interrupted\n"
    assert process.returncode == 0
    assert time.monotonic() - before_s < 10


def test_close_ends_calls(inproc_server: InprocServer) -> None:
    """Closing ends a call that another thread waits for, and later calls are refused."""
    transport = GrpcTransport(inproc_server.address)
    LockClient(transport).claim([b"a"], ttl_s=600)
    errors: list[str] = []

    def park() -> None:
        request = pb.WaitRequest(keys=[b"a"], timeout_ns=50 * 10**9)
        try:
            transport.call("Wait", request, pb.WaitReply, 60)
        except TransportError as error:
            errors.append(error.code)

    thread = threading.Thread(target=park)
    thread.start()
    waits: Any = inproc_server.server._waits
    until(lambda: bool(waits._parked))
    transport.close()
    thread.join(30)
    assert errors == ["CANCELLED"]
    with pytest.raises(TransportError, match="closed"):
        transport.call("Count", pb.CountRequest(), pb.CountReply, 1)
    transport.close()
