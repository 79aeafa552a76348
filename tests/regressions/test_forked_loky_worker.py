"""With joblib 1.4 and a newer gRPC, workers of loky now and then died when they were started."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.servers import ServerProcess

SCRIPT = """
import os
import joblib, run_once

def count_forks(nested):
    forks = []
    os.register_at_fork(before=lambda: forks.append(1))
    if nested:
        calls = [joblib.delayed(count_forks)(False)]
        with joblib.parallel_config("run_once", n_jobs=2):
            forks += joblib.Parallel()(calls)[0]
    else:
        joblib.Parallel(n_jobs=2, backend="loky")(joblib.delayed(abs)(-x) for x in range(4))
    return forks

print(count_forks(nested=True))
"""


@pytest.mark.skipif(not hasattr(os, "posix_spawn"), reason="needs posix_spawn")
def test_no_python_is_forked(server: ServerProcess) -> None:
    """Neither here nor in a worker, for a nested call: gRPC's handlers would run in the child."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "RUN_ONCE_ADDRESS": server.address},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "[]\n", done.stderr
