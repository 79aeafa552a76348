"""Nothing that was acknowledged is lost when the server is killed under load."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import grpc

from distlock_proto import lock_table_pb2 as pb
from distlock_proto.lock_table_pb2_grpc import LockTableStub
from tests.servers import ServerProcess, connect

N_WRITERS: Final = 8
N_ROUNDS: Final = 3
MIN_ACKNOWLEDGED: Final = 300
MIN_PER_ROUND: Final = 120
ROUND_LIMIT_S: Final = 30.0
TTL_NS: Final = 600 * 10**9


class Writer:
    """Claims and settles keys of its own, and remembers what it was told.

    Attributes:
        expected: For each key, the states that are right: the acknowledged one, and, for the one
            request without an answer, also the one that it may have led to.
        values: The value of each key acknowledged as done.
        n_acknowledged: Changes that were acknowledged.
        tokens: Every token that was granted.
    """

    def __init__(self, address: str, number: int) -> None:
        self.expected: dict[bytes, set[int]] = {}
        self.values: dict[bytes, bytes] = {}
        self.n_acknowledged = 0
        self.tokens: list[int] = []
        self.revision = 0
        self._address = address
        self._number = number
        self._random = random.Random(number)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._stop = threading.Event()
        self._count = 0

    def start(self) -> None:
        """Start writing; it ends by itself when the server is gone."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for the end."""
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        with connect(self._address) as channel:
            stub = LockTableStub(channel)
            try:
                while True:
                    self._one(stub)
            except grpc.RpcError:
                return

    def _one(self, stub: Any) -> None:
        key = b"w%d-%d" % (self._number, self._count)
        self._count += 1
        claim_id = os.urandom(16)
        self.expected[key] = {pb.KEY_STATE_ABSENT, pb.KEY_STATE_BUSY}
        request = pb.ClaimRequest(keys=[key], claim_id=claim_id, ttl_ns=TTL_NS)
        reply = stub.Claim(request, timeout=20)
        self._acknowledged(key, pb.KEY_STATE_BUSY, reply)
        self.tokens.append(reply.tokens[0])
        holder = pb.Holder(key=key, claim_id=claim_id, token=reply.tokens[0])
        how = self._random.choice(["complete", "fail", "release", "keep"])
        if how == "keep":
            return
        settlement, after = self._settlement(holder, how)
        self.expected[key] = {pb.KEY_STATE_BUSY, after}
        reply = stub.Settle(pb.SettleRequest(settlements=[settlement]), timeout=20)
        self._acknowledged(key, after, reply)

    def _settlement(self, holder: pb.Holder, how: str) -> tuple[pb.Settlement, int]:
        if how == "fail":
            fail = pb.Fail(error="planned")
            return pb.Settlement(holder=holder, fail=fail), pb.KEY_STATE_FAILED
        if how == "release":
            return pb.Settlement(holder=holder, release=pb.Release()), pb.KEY_STATE_ABSENT
        self.values[holder.key] = os.urandom(20)
        result = pb.Result(storage=pb.Result.STORAGE_INLINE, payload=self.values[holder.key])
        complete = pb.Complete(result=result)
        return pb.Settlement(holder=holder, complete=complete), pb.KEY_STATE_DONE

    def _acknowledged(self, key: bytes, state: int, reply: Any) -> None:
        self.expected[key] = {state}
        self.n_acknowledged += 1
        self.revision = max(self.revision, reply.revision)


def test_kill_under_load_loses_nothing(
    server: ServerProcess, report: Callable[[str], None]
) -> None:
    """After kill -9 under load from several writers, every acknowledged change is present."""
    writers = [Writer(server.address, number) for number in range(N_WRITERS)]
    for _ in range(N_ROUNDS):
        before = sum(writer.n_acknowledged for writer in writers)
        for writer in writers:
            writer.start()
        _await_load(writers, before + MIN_PER_ROUND)
        server.kill()
        for writer in writers:
            writer.join()
        server.start()
        _check(server, writers)
    n_acknowledged = sum(writer.n_acknowledged for writer in writers)
    report(f"kill -9 x {N_ROUNDS}: {n_acknowledged} acknowledged changes checked, none lost")
    assert n_acknowledged >= MIN_ACKNOWLEDGED
    tokens = [token for writer in writers for token in writer.tokens]
    assert len(set(tokens)) == len(tokens), "a token was given out twice"


def _await_load(writers: list[Writer], n_wanted: int) -> None:
    """Let the writers work for a while, and until they have done enough to be worth a crash."""
    started_s = time.monotonic()
    while (
        time.monotonic() < started_s + 1
        or sum(writer.n_acknowledged for writer in writers) < n_wanted
    ):
        assert time.monotonic() < started_s + ROUND_LIMIT_S, "there was no load"
        time.sleep(0.01)


def _check(server: ServerProcess, writers: list[Writer]) -> None:
    with connect(server.address) as channel:
        stub = LockTableStub(channel)
        for writer in writers:
            keys = list(writer.expected)
            for first in range(0, len(keys), 5_000):
                piece = keys[first : first + 5_000]
                request = pb.LookupRequest(keys=piece, want_infos=True, want_results=True)
                reply = stub.Lookup(request, timeout=30)
                assert reply.revision >= writer.revision
                for key, state, info in zip(piece, reply.states, reply.infos, strict=True):
                    assert state in writer.expected[key], key
                    if state == pb.KEY_STATE_DONE:
                        assert info.result.payload == writer.values[key]


def test_counters_hold_over_crashes(server: ServerProcess) -> None:
    """After a kill the kept counters agree with a scan, and tokens go on growing."""
    writers = [Writer(server.address, number) for number in range(4)]
    for writer in writers:
        writer.start()
    _await_load(writers, MIN_PER_ROUND)
    server.kill()
    for writer in writers:
        writer.join()
    server.start()
    with connect(server.address) as channel:
        stub = LockTableStub(channel)
        kept = stub.Count(pb.CountRequest(), timeout=20)
        scanned = stub.Count(pb.CountRequest(prefix=b"w"), timeout=20)
        assert kept == scanned
        n_listed = sum(
            len(stub.List(pb.ListRequest(filter=which), timeout=20).infos)
            for which in (pb.LIST_FILTER_HELD, pb.LIST_FILTER_FAILED)
        )
        assert n_listed == kept.held + kept.failed
        request = pb.ClaimRequest(keys=[b"new"], claim_id=os.urandom(16), ttl_ns=TTL_NS)
        assert stub.Claim(request, timeout=20).tokens[0] > max(
            token for writer in writers for token in writer.tokens
        )


def test_leases_run_anew_after_a_crash(server: ServerProcess) -> None:
    """After a kill a lease runs for its whole, renewed ttl again, and its holder completes."""
    claim_id = os.urandom(16)
    with connect(server.address) as channel:
        stub = LockTableStub(channel)
        request = pb.ClaimRequest(keys=[b"a"], claim_id=claim_id, ttl_ns=TTL_NS)
        holder = pb.Holder(key=b"a", claim_id=claim_id, token=stub.Claim(request).tokens[0])
        stub.Renew(pb.RenewRequest(renewals=[pb.Renewal(holder=holder, ttl_ns=2 * TTL_NS)]))
    server.restart()
    with connect(server.address) as channel:
        stub = LockTableStub(channel)
        info = stub.Lookup(pb.LookupRequest(keys=[b"a"], want_infos=True), timeout=20).infos[0]
        assert TTL_NS < info.remaining_ns <= 2 * TTL_NS
        other = pb.ClaimRequest(keys=[b"a"], claim_id=os.urandom(16), ttl_ns=TTL_NS)
        assert list(stub.Claim(other).states) == [pb.KEY_STATE_BUSY]
        settlement = pb.Settlement(holder=holder, complete=pb.Complete())
        reply = stub.Settle(pb.SettleRequest(settlements=[settlement]))
        assert list(reply.states) == [pb.KEY_STATE_COMPLETED]


def test_stale_holder_over_a_crash(server: ServerProcess) -> None:
    """A holder that another replaced stays refused after a crash, and completes nothing."""
    stale_id, new_id = os.urandom(16), os.urandom(16)
    with connect(server.address) as channel:
        stub = LockTableStub(channel)
        first = pb.ClaimRequest(keys=[b"a"], claim_id=stale_id, ttl_ns=10**6)
        stale = pb.Holder(key=b"a", claim_id=stale_id, token=stub.Claim(first).tokens[0])
        stub.Wait(pb.WaitRequest(keys=[b"a"], timeout_ns=10 * 10**9), timeout=20)
        second = pb.ClaimRequest(keys=[b"a"], claim_id=new_id, ttl_ns=TTL_NS)
        new = pb.Holder(key=b"a", claim_id=new_id, token=stub.Claim(second).tokens[0])
    assert new.token > stale.token
    server.restart()
    with connect(server.address) as channel:
        stub = LockTableStub(channel)
        renewal = pb.Renewal(holder=stale, ttl_ns=TTL_NS)
        assert list(stub.Renew(pb.RenewRequest(renewals=[renewal])).states) == [pb.KEY_STATE_LOST]
        for settlement in (
            pb.Settlement(holder=stale, complete=pb.Complete()),
            pb.Settlement(holder=stale, fail=pb.Fail()),
            pb.Settlement(holder=stale, release=pb.Release()),
        ):
            reply = stub.Settle(pb.SettleRequest(settlements=[settlement]))
            assert list(reply.states) == [pb.KEY_STATE_LOST]
            assert list(reply.lost_states) == [pb.KEY_STATE_BUSY]
        settlement = pb.Settlement(holder=new, complete=pb.Complete())
        reply = stub.Settle(pb.SettleRequest(settlements=[settlement]))
        assert list(reply.states) == [pb.KEY_STATE_COMPLETED]
