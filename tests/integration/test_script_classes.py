"""Values of classes that a script defines, over two runs of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.servers import ServerProcess

SCRIPT = Path(__file__).parents[1] / "class_script.py"


def run_script(server: ServerProcess, n_jobs: int, run: str) -> dict[str, Any]:
    """Run the script; give what it prints."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--n-jobs", str(n_jobs), "--run", run],
        env={**os.environ, "RUN_ONCE_ADDRESS": server.address},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_values_are_of_the_scripts_own_classes(server: ServerProcess, n_jobs: int) -> None:
    """In the run that computes and in the one that loads: isinstance and == hold as for fresh ones.

    What a class has here and now is left alone by what was stored with its values.
    """
    for run in ("first", "second"):
        found = run_script(server, n_jobs, run)
        n_computed = found.pop("computed")
        assert found.pop("run") == run
        assert len(found) >= 8
        assert n_computed == (len(found) if run == "first" else 0)
        assert {kind: each for kind, each in found.items() if each != [True, True]} == {}, run
