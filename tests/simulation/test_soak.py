"""Very many seeds: SIMULATION_SEEDS says how many, SIMULATION_FIRST_SEED from which on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.simulation.seeds import Tally, run_seeds
from tests.simulation.test_simulation import MAX_VOID_SHARE, require_kept

SEEDS = int(os.environ.get("SIMULATION_SEEDS", "30000"))
FIRST_SEED = int(os.environ.get("SIMULATION_FIRST_SEED", "1000000"))


def commit() -> str:
    """Name the commit that is tested."""
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() or "unknown"


def table(tally: Tally, tested: str) -> tuple[str, str]:
    """Put a tally into two lines."""
    cells = {
        "seeds": tally.seeds,
        "events": tally.events,
        "requests": tally.operations,
        "crashes": tally.crashes,
        "lost replies": tally.lost_replies,
        "expiries": tally.expiries,
        "void": tally.void,
        "violations": len(tally.violations),
        "seconds": round(tally.cpu_s),
        "commit": tested,
    }
    return " | ".join(cells), " | ".join(map(str, cells.values()))


@pytest.mark.soak
def test_promises_are_kept_in_very_many_seeds(report: Callable[[str], None]) -> None:
    """No seed of very many breaks a promise."""
    tested = commit()
    tally = run_seeds(range(FIRST_SEED, FIRST_SEED + SEEDS))
    for line in table(tally, tested):
        report(line)
    require_kept(tally)
    assert tally.void <= MAX_VOID_SHARE * tally.seeds
