"""A list read beside a commit showed a grant that was not yet on disk."""

from __future__ import annotations

from distlock_server.state import Held, Release
from tests.stepped_table import ID, OTHER, Setup


def test_lists_show_what_is_on_disk() -> None:
    """Of bytes read before a release, the grant that is being written behind it shows nothing."""
    setup = Setup()
    token = setup.hold(b"a", claim_id=ID)
    store = setup.table.store
    (raw,), _ = setup.engine.read([b"a"])
    assert raw is not None
    setup.table.submit([b"a"], lambda txn: txn.apply(b"a", _release(token)))
    setup.table.step_once()
    setup.claim(b"a", claim_id=OTHER)
    shown = []
    setup.engine.before = lambda: shown.append(store._record(b"a", raw))
    setup.table.step_once()
    (record,) = shown
    assert isinstance(record, Held)
    assert record.token == token


def _release(token: int) -> Release:
    return Release(ID, token)
