"""A failing call ended `with Parallel(..., inner="multiprocessing", ...)` by a TypeError."""

from __future__ import annotations

import multiprocessing

import joblib
import pytest

from tests.parallel_calls import needs_parallel_options
from tests.servers import ServerProcess

pytestmark = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(),
    reason="joblib's multiprocessing backend forks",
)


def fail_on_three(number: int) -> int:
    """Fail in one call."""
    if number == 3:
        raise LookupError("three is no number")
    return number


@needs_parallel_options
def test_the_pool_is_made_again(server: ServerProcess) -> None:
    """The pool gets the options of `Parallel` once more, without those that are ours."""
    ours = {"inner": "multiprocessing", "address": server.address, "namespace": "abort"}
    with joblib.Parallel(n_jobs=2, backend="run_once", **ours) as parallel:
        with pytest.raises(LookupError, match="three is no number"):
            parallel(joblib.delayed(fail_on_three)(number) for number in range(6))
        values = parallel(joblib.delayed(abs)(-number) for number in range(6))
    assert values == list(range(6))
