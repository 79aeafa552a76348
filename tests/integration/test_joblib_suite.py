"""joblib's own tests of `Parallel`, with our backend in the place of joblib's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from tests.joblib_suite.runner import SKLEARN_TESTS, run_suite
from tests.servers import ServerProcess

AT_LEAST: Final = {"loky": 140, "threading": 120}
"""Tests that pass in joblib 1.4 to 1.6; fewer would mean that they were not found."""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("joblib.test") is None, reason="joblib is installed without its tests"
)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("like", ["loky", "threading"])
def test_standing_in(
    like: str, server: ServerProcess, tmp_path: Path, report: Callable[[str], None]
) -> None:
    """Nothing fails of what is parametrized with the backend that ours stands in for."""
    counts = run_suite(like, "only", server.address, tmp_path)
    assert counts.failed == [], counts.output[-10_000:]
    assert counts.passed >= AT_LEAST[like]
    report(f"joblib's test_parallel, in the place of {like}: {counts}")


@pytest.mark.soak
@pytest.mark.parametrize("like", ["loky", "threading"])
def test_as_the_default(
    like: str, server: ServerProcess, tmp_path: Path, report: Callable[[str], None]
) -> None:
    """The whole file, with ours as the default backend."""
    counts = run_suite(like, "all", server.address, tmp_path)
    assert counts.failed == [], counts.output[-10_000:]
    assert counts.passed >= AT_LEAST[like]
    report(f"joblib's test_parallel, {like} within ours as the default: {counts}")


@pytest.mark.soak
def test_sklearn(server: ServerProcess, tmp_path: Path, report: Callable[[str], None]) -> None:
    """scikit-learn's own tests do no worse with ours as the default backend than with loky."""
    pytest.importorskip("sklearn")
    plain = run_suite("loky", "baseline", server.address, tmp_path, tests=SKLEARN_TESTS)
    ours = run_suite("loky", "all", server.address, tmp_path, tests=SKLEARN_TESTS)
    report(f"scikit-learn's suites: {plain} with loky, {ours} with ours as the default")
    assert set(ours.failed) <= set(plain.failed), ours.output[-10_000:]
    assert ours.passed + len(ours.marked) >= plain.passed + len(plain.marked)
    assert plain.passed > 300
