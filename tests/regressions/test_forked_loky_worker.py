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

forks = []
os.register_at_fork(before=lambda: forks.append(1))
with joblib.parallel_config("run_once", n_jobs=2):
    print(joblib.Parallel()(joblib.delayed(abs)(-number) for number in range(4)), len(forks))
"""


@pytest.mark.skipif(not hasattr(os, "posix_spawn"), reason="needs posix_spawn")
def test_no_python_is_forked(server: ServerProcess) -> None:
    """Processes are started without a fork of Python's, in which gRPC's handlers would run."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "RUN_ONCE_ADDRESS": server.address},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "[0, 1, 2, 3] 0\n", done.stderr
