"""The event loop waited for the table's mutex while a large group ran: health took 0.8 s."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from distlock_server import state
from distlock_server.pending import TableRunningError
from tests.stepped_table import ID, TTL, Setup


def test_a_group_that_runs_keeps_nobody_waiting() -> None:
    """While a group runs, a request is queued, a watch made and a renewal put off, all at once."""
    setup = Setup()
    token = setup.hold(b"a")

    def run(_txn: Any) -> None:
        with pytest.raises(TableRunningError):
            setup.table.try_renew(b"a", state.Renew(ID, token, TTL))
        setup.claim(b"b")
        setup.table.unwatch(setup.table.watch([b"a"], None))

    thread = threading.Thread(target=setup.table.step_once, daemon=True)
    ran = setup.table.submit([], run)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert ran.error is None
    assert setup.table.try_renew(b"a", state.Renew(ID, token, TTL)) is not None
