"""A lease that another, shorter one took the place of: waits slept to the end of the first."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from distlock_server import state
from distlock_server.group import Group
from tests.stepped_table import ID, OTHER, TTL, Setup


def _seize(txn: Group) -> None:
    txn.apply(b"a", state.Seize(OTHER, TTL // 10))


def _reset_and_claim(txn: Group) -> None:
    txn.apply(b"a", state.Reset(99))
    txn.apply(b"a", state.Claim(OTHER, TTL // 10))


@pytest.mark.parametrize("take", [_seize, _reset_and_claim])
def test_waits_are_told(take: Callable[[Group], None]) -> None:
    """Whoever waits for the key is told when its lease ends sooner than before."""
    setup = Setup()
    setup.hold(b"a")
    watch = setup.table.watch([b"a"], None)
    setup.table.submit([b"a"], take)
    setup.table.step_once()
    assert setup.told.changes == [[watch]]


def test_renewals_tell_nobody() -> None:
    """A lease that only goes on wakes no wait: it will look by itself."""
    setup = Setup()
    token = setup.hold(b"a")
    setup.table.watch([b"a"], None)
    setup.clock.advance(1)
    assert setup.apply(b"a", state.Renew(ID, token, 2 * TTL)) is state.Answer.RENEWED
    assert setup.told.changes == []
