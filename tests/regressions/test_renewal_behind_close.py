"""A renewal behind the end of the table: promised, though the lease was stored as expired."""

from __future__ import annotations

from distlock_server import state
from tests.stepped_table import ID, TTL, Setup


def test_closed_table_promises_nothing() -> None:
    """Once the table is closing a renewal is queued, and thus refused."""
    setup = Setup()
    token = setup.hold(b"a")
    setup.clock.advance(100)
    setup.table.close()
    assert setup.table.try_renew(b"a", state.Renew(ID, token, TTL)) is None
