"""Values that a function's code before a change made, or a namesake of another project."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import ServerProcess

SCRIPT = """
import sys, joblib, run_once

def label(x):
    # {comment}
    return ("{answer}", x)

if __name__ == "__main__":
    with joblib.parallel_config("run_once", n_jobs={n_jobs}{options}):
        print(joblib.Parallel()(joblib.delayed(label)(x) for x in range(3)))
    print(run_once.last_report().other_source)
"""


def run_script(folder: Path, server: ServerProcess, **parts: object) -> tuple[list[str], str]:
    """Run a project's `train.py`; give what it printed, and what it wrote to standard error."""
    folder.mkdir(exist_ok=True)
    script = folder / "train.py"
    script.write_text(SCRIPT.format(**{"comment": "", "options": "", **parts}))
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "RUN_ONCE_ADDRESS": server.address},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_values_of_other_source_are_told(
    n_jobs: int, server: ServerProcess, tmp_path: Path
) -> None:
    """They are taken as done, with one warning that says how many, and what to do."""
    one, other = tmp_path / "one", tmp_path / "other"
    values, errors = run_script(one, server, answer="one", n_jobs=n_jobs)
    assert values == ["[('one', 0), ('one', 1), ('one', 2)]", "0"]
    assert "other source" not in errors
    values, errors = run_script(other, server, answer="other", n_jobs=n_jobs)
    assert values == ["[('one', 0), ('one', 1), ('one', 2)]", "3"]
    assert errors.count("3 values were computed by other source than train.py.label has") == 1
    assert "version=1 computes anew" in errors
    values, errors = run_script(one, server, answer="one", comment="why", n_jobs=n_jobs)
    assert values[1] == "0", "comments and layout are no other source"
    assert "other source" not in errors


@pytest.mark.parametrize("options", [', code="source"', ", version=1", ', namespace="other"'])
def test_what_the_warning_says_helps(options: str, server: ServerProcess, tmp_path: Path) -> None:
    """Each of the three ways computes the function's own values."""
    run_script(tmp_path / "one", server, answer="one", n_jobs=1)
    values, errors = run_script(
        tmp_path / "other", server, answer="other", n_jobs=1, options=options
    )
    assert values == ["[('other', 0), ('other', 1), ('other', 2)]", "0"]
    assert "other source" not in errors
