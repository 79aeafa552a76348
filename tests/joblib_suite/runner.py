"""Runs a test suite of joblib or scikit-learn with our backend, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Final, NamedTuple

JOBLIB_TESTS: Final = ("joblib.test.test_parallel",)
SKLEARN_TESTS: Final = (
    "sklearn.model_selection.tests.test_validation",
    "sklearn.model_selection.tests.test_search",
    "sklearn.tests.test_multioutput",
)
FOLDER: Final = Path(__file__).parent
TEST_LIMIT_S: Final = 90


class Counts(NamedTuple):
    """What became of the tests of a suite.

    Attributes:
        passed: Number of tests.
        failed: Names of those that failed or could not be run.
        skipped: Number of tests.
        marked: Names of those that failed as they may: known to be bound to a name, here or by
            joblib itself.
        output: What pytest printed.
    """

    passed: int
    failed: list[str]
    skipped: int
    marked: list[str]
    output: str

    def __str__(self) -> str:
        return (
            f"{self.passed} passed, {len(self.failed)} failed, {self.skipped} skipped, "
            f"{len(self.marked)} marked"
        )


def run_suite(
    like: str,
    mode: str,
    address: str,
    folder: Path,
    *,
    tests: tuple[str, ...] = JOBLIB_TESTS,
    python: str = sys.executable,
    limit_s: float = 1500.0,
) -> Counts:
    """Run a suite.

    Args:
        like: The built-in backend that ours stands in for.
        mode: "only", "all" or "baseline"; see the plugin.
        address: The lock server.
        folder: Where to run it.
        tests: Modules of tests.
        python: The interpreter.
        limit_s: The suite is killed after so long.

    Raises:
        AssertionError: It did not come to an end.
    """
    report = folder / f"{like}-{mode}.xml"
    paths = [str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "RUN_ONCE_ADDRESS": address,
        "JOBLIB_SUITE_LIKE": like,
        "JOBLIB_SUITE_MODE": mode,
    }
    command = [python, "-B", "-m", "pytest", "-p", "joblib_suite_plugin", "-p", "no:cacheprovider"]
    command += [
        "-p",
        "no:doctest",
        "-q",
        "-rf",
        f"--timeout={TEST_LIMIT_S}",
        f"--junitxml={report}",
    ]
    done = subprocess.run(
        [*command, "--pyargs", *tests],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit_s,
        check=False,
    )
    assert report.exists(), done.stdout[-5000:]
    return _counts(report, done.stdout)


def _counts(report: Path, output: str) -> Counts:
    passed, skipped = 0, 0
    failed, marked = [], []
    for case in ET.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        elif skip is None:
            passed += 1
        elif skip.get("type") == "pytest.xfail":
            marked.append(name)
        else:
            skipped += 1
    return Counts(passed, failed, skipped, marked, output)
