"""Seeded simulation of clients, leases and table: the promises hold whatever fails.

A failure names its seed; `World(seed).run(EVENTS)` shows it again, step by step.
"""

from __future__ import annotations

from typing import Any

import pytest

from distlock_server import codec, group, oldbase, state, store
from distlock_server.engines.base import Meta
from distlock_server.group import Counters
from distlock_server.table import Table
from run_once.retrying import Caller
from tests.simulation.sim_server import BrokenPromiseError
from tests.simulation.table_world import World

SEEDS = 200
EVENTS = 100


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count old databases piece by piece, small as they are."""
    monkeypatch.setattr(oldbase, "PIECE", 2)


def test_promises_hold() -> None:
    """One believed lease, tokens that grow, one completion, nothing acknowledged is lost."""
    n_crashes = n_completed = n_tokens = 0
    for seed in range(SEEDS):
        world = World(seed)
        try:
            world.run(EVENTS)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        n_crashes += world.n_crashes
        n_completed += world.n_completed
        n_tokens += world.max_token
    # A run in which little happens proves nothing.
    assert n_crashes > SEEDS
    assert n_completed > SEEDS
    assert n_tokens > 5 * SEEDS


def run_seeds(n_seeds: int) -> None:
    """Run some worlds."""
    for seed in range(n_seeds):
        World(seed).run(EVENTS)


# -- bugs that it must find ----------------------------------------------------------------------


def forget_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not store the counter of tokens."""
    whole = group.counters_meta

    def without(counters: Counters) -> Meta:
        return Meta(tuple(put for put in whole(counters).puts if put[0] != codec.TOKEN_KEY))

    monkeypatch.setattr(group, "counters_meta", without)
    monkeypatch.setattr(store, "counters_meta", without)


def count_from_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count leases from the reply, not from when the request was sent."""
    call = Caller.call

    def late(self: Caller, *args: Any, **more: Any) -> tuple[Any, int]:
        return call(self, *args, **more)[0], self._clock.now_ns()

    monkeypatch.setattr(Caller, "call", late)


def reply_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer a group before it is written."""
    take, write = Table._take_batch, Table._write
    taken: list[Any] = []

    def take_batch(self: Table) -> list[Any]:
        taken[:] = take(self)
        return list(taken)

    def reply_and_write(self: Table, *args: Any) -> set[bytes]:
        self._notify.answered(list(taken))
        return write(self, *args)

    monkeypatch.setattr(Table, "_take_batch", take_batch)
    monkeypatch.setattr(Table, "_write", reply_and_write)


def take_any_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let whoever held the key once complete it."""
    complete = state._complete

    def lax(record: state.Record, command: state.Complete, stamp: state.Stamp) -> Any:
        if isinstance(record, state.Held):
            command = state.Complete(record.claim_id, record.token, command.result)
        return complete(record, command, stamp)

    monkeypatch.setitem(state._STEPS, state.Complete, lax)


@pytest.mark.parametrize(
    "plant", [forget_tokens, count_from_reply, reply_early, take_any_completion]
)
def test_planted_bug_is_found(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these bugs breaks a promise within a few seeds."""
    plant(monkeypatch)
    with pytest.raises(BrokenPromiseError):
        run_seeds(SEEDS // 4)
