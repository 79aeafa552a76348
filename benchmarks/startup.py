"""What does a start cost? The import beside joblib's, and the commands' help; each a new process.

python benchmarks/startup.py
"""

from __future__ import annotations

import subprocess
import sys

from common import Sample, seconds, take_turns
from report import Report, median, run

TITLE = "Starting: imports and commands, new processes"
SIDES = {
    "python -c pass": ["-c", "pass"],
    "import joblib": ["-c", "import joblib"],
    "import joblib, run_once": ["-c", "import joblib, run_once"],
    "import joblib, grpc": ["-c", "import joblib, grpc"],
    "run-once --help": ["-c", "from run_once.cli import main; main()", "--help"],
    "distlock --help": ["-c", "from distlock_server.cli import main; main()", "--help"],
}
BEYOND = """
import time, joblib
start_s = time.perf_counter()
import run_once
print(1000 * (time.perf_counter() - start_s))
"""
MORE_RUNS = 2


def start_ms(arguments: list[str]) -> Sample:
    """Time one process, in milliseconds."""
    command = [sys.executable, *arguments]
    taken = seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
    return Sample(1000 * taken)


def beyond_ms() -> Sample:
    """Time our import in a process that has joblib, in milliseconds."""
    command = [sys.executable, "-c", BEYOND]
    return Sample(float(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))


def measure(report: Report) -> None:
    """Measure all, taking turns; the first round warms the disk's cache."""
    sides = {name: lambda a=arguments: start_ms(a) for name, arguments in SIDES.items()}
    if not report.quick:
        take_turns(1, sides)
    taken = take_turns(report.runs * (1 if report.quick else MORE_RUNS), sides)
    for name, samples in taken.items():
        arguments = " ".join(arg if " " not in arg else f"'{arg}'" for arg in SIDES[name])
        report.add(name, samples, "ms", f"python {arguments}")
    beyond = [beyond_ms() for _ in taken["import joblib"]]
    how = "timed inside of one process, after import joblib"
    report.add("import run_once beyond import joblib", beyond, "ms", how)
    report.at_most("import run_once beyond import joblib", median(beyond), 60, "ms")
    for name in ("run-once --help", "distlock --help"):
        report.at_most(name, median(taken[name]), 250, "ms")


if __name__ == "__main__":
    run("startup", TITLE, measure)
