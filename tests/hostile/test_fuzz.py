"""A short run of each target, so that none rots; the soak run does them at length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest

from tests.hostile.fuzz import TARGETS, run_target

SEED: Final = 20_264
N_RUNS: Final = {"log_ends": 300, "snapshots": 300, "tokens": 700, "address_files": 700}
"""Those that write files in each run are slower."""


@pytest.mark.parametrize("name", TARGETS)
def test_target(name: str, report: Callable[[str], None]) -> None:
    """Only the documented errors come out, whatever the input."""
    pytest.importorskip("atheris", reason="atheris has no wheel for this Python and machine")
    n_runs = N_RUNS.get(name, 2_000)
    figures = run_target(name, SEED, n_runs)
    assert figures["tried"] >= n_runs
    report(f"{figures['tried']} executions")
