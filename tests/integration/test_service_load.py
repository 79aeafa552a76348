"""What the service does with more than it can take, and what goes first."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from distlock_proto import lock_table_pb2 as pb
from distlock_server.pending import Rank, TableRunningError
from tests.servers import InprocServer
from tests.service_calls import hold, refused, renew, settle, states_of


def test_ranks(inproc_server: InprocServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renewals that must be written go before settlements, and these before all else."""
    table: Any = inproc_server.server.table
    ranks: list[Rank] = []
    submit = table.submit

    def note(*arguments: Any, rank: Rank = Rank.OTHER, **more: Any) -> Any:
        ranks.append(rank)
        return submit(*arguments, rank=rank, **more)

    monkeypatch.setattr(table, "submit", note)
    holder = hold(inproc_server, b"a", ttl_ns=10 * 10**9)
    renew(inproc_server, holder, ttl_ns=20 * 10**9)
    settle(inproc_server, holder, complete=pb.Complete())
    inproc_server.table.Lookup(pb.LookupRequest(keys=[b"a"]))
    assert ranks == [Rank.OTHER, Rank.RENEWAL, Rank.ENDING, Rank.OTHER]


def test_claims_that_fill_their_bound_keep_no_renewal_out(inproc_server: InprocServer) -> None:
    """With as many claims waiting as may, claims are refused; leases are renewed and ended."""
    holder = hold(inproc_server, b"a", ttl_ns=10 * 10**9)
    calls: Any = inproc_server.server._calls
    calls._loads[Rank.OTHER].n_requests = calls._max_requests
    request = pb.ClaimRequest(keys=[b"b"], claim_id=bytes(16), ttl_ns=10**9)
    refused(
        lambda: inproc_server.table.Claim(request),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "try again in a second",
    )
    renew(inproc_server, holder, ttl_ns=20 * 10**9)
    settle(inproc_server, holder, complete=pb.Complete())
    calls._loads[Rank.OTHER].n_requests = 0
    assert states_of(inproc_server.table.Lookup(pb.LookupRequest(keys=[b"a"]))) == ["DONE"]


def test_a_renewal_waits_for_the_group_that_runs(
    inproc_server: InprocServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A renewal that comes while a group runs is tried again and needs no write."""
    holder = hold(inproc_server, b"a", ttl_ns=10 * 10**9)
    table: Any = inproc_server.server.table
    real, tries = table.try_renew, []

    def busy_twice(*arguments: Any) -> Any:
        tries.append(arguments)
        if len(tries) <= 2:
            raise TableRunningError
        return real(*arguments)

    monkeypatch.setattr(table, "try_renew", busy_twice)
    monkeypatch.setattr(table, "submit", None)
    renew(inproc_server, holder, ttl_ns=10 * 10**9)
    assert len(tries) == 3


def test_a_request_that_cannot_be_parsed(inproc_server: InprocServer) -> None:
    """Bytes that are no request, and a call without one, are the caller's mistake."""
    call: Any = inproc_server.channel.unary_unary("/distlock.v1.LockTable/Claim")
    refused(
        lambda: call(b"\xff\xff"),
        grpc.StatusCode.INVALID_ARGUMENT,
        "is no distlock.v1.ClaimRequest",
    )
    stream: Any = inproc_server.channel.stream_unary("/distlock.v1.LockTable/Claim")
    refused(lambda: stream(iter(())), grpc.StatusCode.INVALID_ARGUMENT, "no request")
