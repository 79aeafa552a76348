"""Real processes that are stopped, cut off, deceived about the time, or forked."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.faults.process_faults import PARTITIONS, SCENARIOS


@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param(name, marks=[pytest.mark.needs_root] if name in PARTITIONS else [])
        for name in SCENARIOS
    ],
)
def test_process_faults(
    scenario: str, seed: int, tmp_path: Path, cleanup: ExitStack, report: Callable[[str], None]
) -> None:
    """What the function of the scenario says in its docstring."""
    SCENARIOS[scenario](tmp_path, cleanup, random.Random(seed))
    report(f"{scenario} (seed {seed})")
