"""What does the backend cost beside plain joblib, and what does a hit cost beside joblib.Memory?

    python benchmarks/joblib_calls.py [cold] [warm] [delay] [shared]

Ratios are of medians within one run, the two sides taking turns.
"""

from __future__ import annotations

import itertools
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import numpy as np

import run_once
from common import lock_server, medians, seconds, show
from run_once.call_keys import CallKeyer

RUNS = 5
COLD, COLD_S = 4_000, 0.001
WARM, WARM_MEMORY = 100_000, 5_000
DELAYED, DELAYED_S, DELAY_MS = 400, 0.010, 5
SHARING, SHARED_BYTES = 20, 200_000_000
_namespaces = itertools.count()

Row = tuple[str, str, str]


def nap(_x: int) -> None:
    """Do nothing for a while."""
    time.sleep(COLD_S)


def compute(_x: int) -> int:
    """Compute for a while, by the clock of this thread's processor time."""
    end_s = time.thread_time() + COLD_S
    steps = 0
    while time.thread_time() < end_s:
        steps += 1
    return steps


def nap_longer(_x: int) -> None:
    """Do nothing for a while."""
    time.sleep(DELAYED_S)


def nothing(x: int) -> int:
    """Do nothing."""
    return x


def first_of(_x: int, array: np.ndarray) -> float:
    """Look at an array."""
    return float(array[0])


def run_calls(
    func: Callable[[int], object], count: int, backend: str = "run_once", **options: Any
) -> float:
    """Time a Parallel, in seconds; ours in a new namespace unless one is given."""
    if backend == "run_once":
        options.setdefault("namespace", f"run-{next(_namespaces)}")
    parallel = joblib.Parallel(backend=backend, **{"n_jobs": 2, **options})
    return seconds(lambda: parallel(joblib.delayed(func)(x) for x in range(count)))


def cold() -> list[Row]:
    """Short calls that nobody has done yet, beside plain loky."""
    rows = []
    bodies: dict[str, Callable[[int], object]] = {"sleeps": nap, "computes": compute}
    for what, func in bodies.items():
        plain_s, ours_s = medians(
            RUNS, partial(run_calls, func, COLD, "loky"), partial(run_calls, func, COLD)
        )
        title = f"{COLD:,} x 1 ms, 2 workers, body {what}"
        rows += [
            (f"{title}: plain loky", f"{COLD / plain_s:,.0f}", "1"),
            (f"{title}: run_once, cold", f"{COLD / ours_s:,.0f}", f"{plain_s / ours_s:.2f}"),
        ]
    return rows


def warm() -> list[Row]:
    """Calls that are all done, beside joblib.Memory's hits; and the memory that takes."""
    with tempfile.TemporaryDirectory() as folder:
        cached = joblib.Memory(folder, verbose=0).cache(nothing)
        run_calls(nothing, WARM, namespace="warm")
        for x in range(WARM_MEMORY):
            cached(x)
        before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        memory_s, ours_s = medians(
            RUNS,
            lambda: seconds(lambda: [cached(x) for x in range(WARM_MEMORY)]),
            lambda: run_calls(nothing, WARM, namespace="warm"),
        )
        grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) / 1024
        report = run_once.last_report()
        assert report is not None
        assert report.hits == WARM
    memory_rate, our_rate = WARM_MEMORY / memory_s, WARM / ours_s
    return [
        (f"joblib.Memory, {WARM_MEMORY:,} hits", f"{memory_rate:,.0f}", "1"),
        (f"run_once, {WARM:,} hits", f"{our_rate:,.0f}", f"{our_rate / memory_rate:.1f}"),
        (f"run_once, memory grown in {RUNS} more runs", f"{grown_mb:.0f} MB", ""),
    ]


@contextmanager
def delayed(address: str) -> Iterator[str]:
    """Give the server's address behind a longer network."""
    proxy = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("delay_proxy.py")), address, str(DELAY_MS)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert proxy.stdout is not None
    try:
        yield f"127.0.0.1:{proxy.stdout.readline().strip()}"
    finally:
        proxy.terminate()
        proxy.wait()
        proxy.stdout.close()


def delay(address: str) -> list[Row]:
    """Calls over a longer network, beside the same without."""
    options: dict[str, Any] = {"n_jobs": 8, "inner": "threading"}
    with delayed(address) as far:
        plain_s, near_s, far_s = medians(
            RUNS,
            lambda: run_calls(nap_longer, DELAYED, "threading", n_jobs=8),
            lambda: run_calls(nap_longer, DELAYED, address=address, **options),
            lambda: run_calls(nap_longer, DELAYED, address=far, **options),
        )
    title = f"{DELAYED} x 10 ms, 8 threads"
    return [
        (f"{title}: plain threading", f"{DELAYED / plain_s:,.0f}", ""),
        (f"{title}: run_once", f"{DELAYED / near_s:,.0f}", "1"),
        (
            f"{title}: run_once, {DELAY_MS} ms more",
            f"{DELAYED / far_s:,.0f}",
            times(far_s / near_s),
        ),
    ]


def shared() -> list[Row]:
    """Calls that share one large array, beside the hash of it alone."""
    array = np.random.default_rng(0).random(SHARED_BYTES // 8)

    def once() -> float:
        keyer = CallKeyer()
        return seconds(lambda: keyer.key(first_of, (0, array)))

    def all_keys() -> float:
        keyer = CallKeyer()
        return seconds(lambda: [keyer.key(first_of, (x, array)) for x in range(SHARING)])

    def parallel() -> float:
        namespace = f"shared-{next(_namespaces)}"
        made = joblib.Parallel(n_jobs=2, backend="run_once", inner="threading", namespace=namespace)
        return seconds(lambda: made(joblib.delayed(first_of)(x, array) for x in range(SHARING)))

    one_s, all_s, parallel_s = medians(RUNS, once, all_keys, parallel)
    title = f"{SHARED_BYTES // 10**6} MB array"
    return [
        (f"{title}: one key", milliseconds(one_s), "1"),
        (f"{title}: keys of {SHARING} calls", milliseconds(all_s), times(all_s / one_s)),
        (f"{title}: {SHARING} calls, threads", milliseconds(parallel_s), times(parallel_s / one_s)),
    ]


def milliseconds(duration_s: float) -> str:
    """Write a duration."""
    return f"{duration_s * 1000:.0f} ms"


def times(ratio: float) -> str:
    """Write a ratio of durations, where less is better."""
    return f"{ratio:.2f} x the time"


def main(only: Sequence[str]) -> None:
    """Measure and print."""
    with lock_server() as address:
        questions: dict[str, Callable[[], list[Row]]] = {
            "cold": cold,
            "warm": warm,
            "delay": lambda: delay(address),
            "shared": shared,
        }
        rows = [row for name in only or questions for row in questions[name]()]
    show(f"joblib, medians of {RUNS}", ("what", "calls/s", "ratio"), rows, "joblib_calls")


if __name__ == "__main__":
    main(sys.argv[1:])
