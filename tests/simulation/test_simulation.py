"""Seeded worlds of real workers and a real server: every promise is kept whatever fails.

A failure names its seed; `python -m tests.simulation.seeds SEED` shows what happened in it. Put
the seed into failing_seeds.txt. docs/simulation.md says what is simulated.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from unittest import mock

import pytest

from run_once import live
from tests.simulation.schedule import S
from tests.simulation.seeds import Tally, failing_seeds, run_seeds, simulated
from tests.simulation.world import PATIENCE, World

SEEDS = 2_000
CHUNK = 250


def require_kept(tally: Tally) -> None:
    """Fail with the first seeds that broke something, or could not have."""
    for seed, error in tally.violations.items():
        raise AssertionError(f"seed {seed} of {list(tally.violations)}: {error}") from error
    assert not tally.void, f"{len(tally.void)} seeds are void, {tally.void[0]} the first of them"


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_promises_are_kept(first: int, report: Callable[[str], None]) -> None:
    """No seed breaks a promise, and each of them could have."""
    tally = run_seeds(range(first, first + CHUNK))
    report(str(tally))
    require_kept(tally)


@pytest.mark.parametrize("seed", range(8, 16))
def test_what_is_missing_is_brought_about(seed: int) -> None:
    """When patience is over the chaos brings about what is missing, within seconds."""
    with simulated():
        world = World(seed)
        world.is_enough = lambda: False  # type: ignore[method-assign]
        world.schedule.wait(lambda: world.n_commands >= PATIENCE, 1_000 * S)
        world.n_crashes = world.n_lost_replies = world.promises.n_regranted = 0
        world.schedule.wait(lambda: world.n_crashes > 0, 20 * S)
        assert world.n_crashes, "no crash"
        world.schedule.wait(lambda: world.n_lost_replies > 0, 60 * S)
        assert world.n_lost_replies, "no lost reply"
        world.schedule.wait(lambda: world.n_expired > 0, 60 * S)
        assert world.n_expired, "no expiry"


def test_seeds_that_failed_once() -> None:
    """Seeds that found a bug find none any more."""
    require_kept(run_seeds(failing_seeds()))


def digest(seed: int, *, wall_jumps: bool = True) -> str:
    """Give all that was answered in a seed."""
    world = World(seed, wall_jumps=wall_jumps)
    with mock.patch.object(live, "_registry", live.LiveItems()):
        world.run()
    return repr(world.history)


def test_same_seed_same_world() -> None:
    """A seed shows the same in another process, whose strings hash differently."""
    code = "from tests.simulation.test_simulation import *\nwith simulated(): print(digest(7))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    with simulated():
        assert digest(7) + "\n" == other.stdout


def test_wall_clock_changes_no_answer() -> None:
    """I11: with a wall clock that jumps by days every answer is what it is without."""
    with simulated():
        for seed in range(SEEDS, SEEDS + 30):
            assert digest(seed) == digest(seed, wall_jumps=False), f"seed {seed}"
