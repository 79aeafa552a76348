"""When the inner backend broke, joblib was not told before the rest of the batch came in."""

from __future__ import annotations

from typing import Any

import joblib
import pytest

from run_once import joblib_jobs
from run_once.joblib_call import BoundCall
from tests.other_client import Other
from tests.servers import ServerProcess


class BrokenPoolError(Exception):
    """What an inner backend raises that has lost a worker."""


def break_down(_self: BoundCall, _job: Any, _calls: Any, _done: Any, failed: Any) -> None:
    """Stand for `BoundCall.run` of an inner backend that is broken."""
    failed(BrokenPoolError())


@pytest.mark.timeout(60)
@pytest.mark.parametrize("bound", [0, 1e9], ids=["long calls", "short calls"])
def test_the_error_comes_at_once(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch, bound: float
) -> None:
    """Though a call of each batch is in flight elsewhere for as long as anybody wants."""
    monkeypatch.setenv("RUN_ONCE_ADDRESS", server.address)
    monkeypatch.setattr(joblib_jobs, "SHORT_ROUND_TRIPS", bound)
    calls = [joblib.delayed(abs)(-number) for number in range(4)]
    options: dict[str, Any] = {"inner": "threading", "n_jobs": 2}
    with joblib.parallel_config("run_once", **options, dry_run=True):
        planned = joblib.Parallel()(calls)
    other = Other(server.address)
    other.claim(planned[0].key, planned[2].key, ttl_s=3600)
    with joblib.parallel_config("run_once", **options), joblib.Parallel() as parallel:
        parallel([joblib.delayed(abs)(-9)])  # tells how long calls take
        monkeypatch.setattr(BoundCall, "run", break_down)
        parallel.batch_size = 2
        with pytest.raises(BrokenPoolError):
            parallel(calls)
    assert other.client.count().held == 2, "only what the other one holds"
    other.client.close()
