"""What does the backend cost beside plain loky, and what does a hit cost beside joblib.Memory?

python benchmarks/joblib_calls.py
"""

from __future__ import annotations

import itertools
import tempfile
import time

import joblib

import run_once  # noqa: F401 - registers the backend
from common import lock_server, medians, seconds, show

TASKS = 400
HITS = 5_000
SLEEP_S = 0.01
_runs = itertools.count()


def nap(_x: int) -> None:
    """Do nothing for a while."""
    time.sleep(SLEEP_S)


def nothing(x: int) -> int:
    """Do nothing."""
    return x


def cold(backend: str) -> float:
    """Time tasks that nobody has done yet."""
    options = {"namespace": f"cold-{next(_runs)}"} if backend == "run_once" else {}
    parallel = joblib.Parallel(n_jobs=2, backend=backend, **options)
    return seconds(lambda: parallel(joblib.delayed(nap)(x) for x in range(TASKS)))


def warm() -> float:
    """Time calls that are all done."""
    parallel = joblib.Parallel(n_jobs=2, backend="run_once", namespace="warm")
    return seconds(lambda: parallel(joblib.delayed(nothing)(x) for x in range(HITS)))


def main() -> None:
    """Measure and print."""
    with lock_server(), tempfile.TemporaryDirectory() as folder:
        memory = joblib.Memory(folder, verbose=0)
        cached = memory.cache(nothing)
        warm()
        for x in range(HITS):
            cached(x)
        plain_s, ours_s, memory_s, warm_s = medians(
            5,
            lambda: cold("loky"),
            lambda: cold("run_once"),
            lambda: seconds(lambda: [cached(x) for x in range(HITS)]),
            warm,
        )
    rows = [
        (f"plain loky, {TASKS} x 10 ms", f"{TASKS / plain_s:,.0f}", "1"),
        (f"run_once, {TASKS} x 10 ms, cold", f"{TASKS / ours_s:,.0f}", f"{plain_s / ours_s:.2f}"),
        (f"joblib.Memory, {HITS} hits", f"{HITS / memory_s:,.0f}", "1"),
        (f"run_once, {HITS} hits", f"{HITS / warm_s:,.0f}", f"{memory_s / warm_s:.2f}"),
    ]
    show("joblib, 2 workers, medians of 5", ("what", "calls/s", "ratio"), rows, "joblib_calls")


if __name__ == "__main__":
    main()
