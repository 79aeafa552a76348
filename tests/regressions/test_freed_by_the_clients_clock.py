"""An interrupted claim was given back by the system's clock and sleep, not by the client's own.

The seams of a client went no further than its first claim, so that no simulation could step this.
"""

from __future__ import annotations

import random

import pytest

from run_once.client import LockClient
from run_once.lease import LeaseKeeper
from run_once.retrying import RetryPolicy
from run_once.session import Session
from tests.fake_server import FakeServer, FakeTransport, Fault


def test_free_claims_uses_the_clients_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Giving back what was claimed waits by the client's sleep, with little patience."""
    server = FakeServer()
    transport = FakeTransport(server)
    slept: list[float] = []
    client = LockClient(
        transport, clock=server.clock, rng=random.Random(1), sleep=slept.append, owner="me"
    )
    session = Session(client, LeaseKeeper(client, use_thread=False))
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("slept by the system's clock"))
    transport.faults += [Fault(), Fault()]
    session.free_claims([(b"i" * 16, [b"k"])], lease_s=60)
    assert len(slept) == 2
    assert server.records[b"k"] is None
    assert max(transport.timeouts_s) == 2.0


def test_with_retry_keeps_the_rest() -> None:
    """Other bounds on retries change nothing else."""
    client = LockClient(FakeTransport(FakeServer()), rng=random.Random(1), owner="me", max_keys=3)
    other = client.with_retry(RetryPolicy(total_s=1.0))
    assert (other.transport, other.clock, other.owner) == (client.transport, client.clock, "me")
    assert other._max_keys == 3
    assert other.new_claim_id() != client.new_claim_id()
