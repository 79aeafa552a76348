"""Hostile requests to a real server: none ends it, none wedges it, none is somebody else's loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hostile.requests import run_hostile

SEEDS = (20_261, 20_262)
N_REQUESTS = 2_500


@pytest.mark.timeout(300)  # half a minute, on a machine that has nothing else to do
@pytest.mark.parametrize("seed", SEEDS)
def test_hostile_requests(tmp_path: Path, seed: int, report: Callable[[str], None]) -> None:
    """After each batch of them health is answered at once, and at the end all data is as it was."""
    figures = run_hostile(tmp_path / "server", seed, N_REQUESTS)
    assert figures["tried"] == N_REQUESTS
    # A run in which nothing was answered, or nothing refused, would show little.
    assert figures["answered"] > N_REQUESTS // 10
    assert figures["refused"] > N_REQUESTS // 10
    assert figures["below"] > N_REQUESTS // 200
    assert figures["unchanged"] > N_REQUESTS // 50
    report(", ".join(f"{number} {name}" for name, number in figures.items()))
