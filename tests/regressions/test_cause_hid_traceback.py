"""An error with a cause of its own, such as a nested `Parallel` raises, lost its traceback."""

from __future__ import annotations

import traceback

import joblib
import pytest

from run_once.joblib_outcomes import Failure
from tests.servers import ServerProcess


def fail(number: int) -> None:
    """Fail, in the nested call."""
    raise LookupError(f"no number {number}")


def fail_below(number: int) -> None:
    """Call Parallel inside of a call."""
    joblib.Parallel(n_jobs=2)(joblib.delayed(fail)(number) for _ in range(2))


@pytest.mark.parametrize("inner", ["loky", "threading"])
def test_functions_are_named(
    inner: str, server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is shown of the error names the functions of all levels."""
    monkeypatch.setenv("RUN_ONCE_ADDRESS", server.address)
    with (
        joblib.parallel_config("run_once", inner=inner, n_jobs=2),
        pytest.raises(LookupError, match="no number") as caught,
    ):
        joblib.Parallel()(joblib.delayed(fail_below)(number) for number in range(3))
    shown = "".join(traceback.format_exception(caught.value))
    assert "in fail_below" in shown
    assert "in fail\n" in shown


def test_the_worker_tells_the_cause() -> None:
    """Its text stands in the place of a cause that the error brought along."""
    error = LookupError("no such number")
    error.__cause__ = KeyError(3)
    assert Failure(error, "KeyError: 3\n... in fail").with_cause() is error
    assert "in fail" in str(error.__cause__)
