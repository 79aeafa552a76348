"""Fixtures of fault tests."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.faults.power import build_shim


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the compiled shim."""
    return build_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def seed() -> int:
    """Give the seed of the run."""
    return int(os.environ.get("FAULT_SEED") or time.time_ns() % 2**32)
