"""A renewal answered LOST while a completion was being noted: the lease was reported as lost."""

from __future__ import annotations

import pytest

from distlock_proto import lock_table_pb2 as pb
from run_once.lease import Lease
from tests.fake_server import FakeServer, FakeTransport, make_session


def test_completed_lease_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The LOST behind an accepted completion says nothing, whenever it arrives."""
    session = make_session(FakeTransport(FakeServer()))
    (lease,) = session.claim([b"a"], ttl_s=10).leases
    lost: list[Lease] = []
    lease.on_lost = lost.append
    drop = session.keeper.drop

    def drop_while_renewing(lease: Lease) -> None:
        drop(lease)
        if not lease.is_lost:
            session.keeper.renew_now([lease])

    monkeypatch.setattr(session.keeper, "drop", drop_while_renewing)
    assert session.complete(lease).state == pb.KEY_STATE_COMPLETED
    assert (lease.is_settled, lease.is_lost, lost) == (True, False, [])
