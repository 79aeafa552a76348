"""What does the backend cost beside plain joblib and dask, and a hit beside joblib.Memory?

    python benchmarks/joblib_calls.py [cold] [warm] [delay] [shared]

Ratios are of runs of one turn, the sides taking turns.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import resource
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import joblib
import numpy as np

import run_once
from common import Sample, delayed, lock_server, rate, seconds, take_turns
from report import Report, ratio, run
from run_once.call_keys import CallKeyer

TITLE = "joblib: plain, dask, joblib.Memory and run_once"
COLD, COLD_S = 4_000, 0.001
WARM, WARM_MEMORY = 100_000, 5_000
DELAYED, DELAYED_S, DELAY_MS = 400, 0.010, 5
SHARING, SHARED_BYTES = 20, 200_000_000
WORKERS, WARM_UP = 2, 20
_namespaces = itertools.count()

Body = Callable[[int], object]


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


def run_calls(func: Body, count: int, backend: str = "run_once", **options: Any) -> float:
    """Time a Parallel, in seconds; ours in a new namespace unless one is given."""
    if backend == "run_once":
        options.setdefault("namespace", f"run-{next(_namespaces)}")
    parallel = joblib.Parallel(backend=backend, **{"n_jobs": WORKERS, **options})
    return seconds(lambda: parallel(joblib.delayed(func)(x) for x in range(count)))


def cold(report: Report) -> None:
    """Short calls that nobody has done yet, beside plain loky and clusters."""
    count = report.pick(COLD, 50)
    bodies: dict[str, Body] = {"sleeps": nap, "computes": compute}
    runners: dict[str, Callable[[Body, int], Sample]] = {
        "run_once, cold": parallel_rate,
        "plain loky": partial(parallel_rate, backend="loky"),
    }
    with ExitStack() as stack:
        clusters = start_clusters(report, stack)  # beside the first body alone: they take long
        for what, body in list(bodies.items())[: report.pick(len(bodies), 1)]:
            beside = runners | (clusters if body is nap else {})
            for runner in beside.values():
                runner(body, WARM_UP)  # starts workers
            sides = {name: partial(runner, body, count) for name, runner in beside.items()}
            taken = take_turns(report.runs, sides)
            for name, samples in taken.items():
                title = f"{name}, body {what}"
                report.add(title, samples, "calls/s", f"{count:,} x 1 ms, {WORKERS} workers")
                if name != "run_once, cold":
                    add_ratio(report, f"run_once beside {title}", taken["run_once, cold"], samples)


def start_clusters(report: Report, stack: ExitStack) -> dict[str, Callable[[Body, int], Sample]]:
    """Start the local clusters that are installed; give what runs calls on each."""
    runners: dict[str, Callable[[Body, int], Sample]] = {}
    if report.quick:
        return runners  # they take longer to start than all the rest
    if importlib.util.find_spec("distributed") is None:
        report.skip("dask is not installed")
    else:
        client = dask_client(stack)

        def dask_map(body: Body, count: int) -> Sample:
            # Not pure: else equal calls of an earlier run are not run again.
            return rate(count, lambda: client.gather(client.map(body, range(count), pure=False)))

        runners["dask, client.map"] = dask_map
        runners["dask through joblib"] = dask_through_joblib
    if importlib.util.find_spec("ray") is None:
        report.skip("ray is not installed")
    else:
        runners["ray"] = ray_runner(stack)
    return runners


def dask_client(stack: ExitStack) -> Any:
    """Start a local cluster of dask."""
    from distributed import Client, LocalCluster  # noqa: PLC0415 - optional

    start_cluster: Any = LocalCluster  # untyped
    connect: Any = Client
    cluster = stack.enter_context(
        start_cluster(
            n_workers=WORKERS,
            threads_per_worker=1,
            dashboard_address=":0",
            silence_logs=logging.ERROR,
        )
    )
    return stack.enter_context(connect(cluster))


def dask_through_joblib(body: Body, count: int) -> Sample:
    """Run a Parallel on the cluster."""
    with joblib.parallel_config("dask", n_jobs=WORKERS):
        parallel = joblib.Parallel()
        return rate(count, lambda: parallel(joblib.delayed(body)(x) for x in range(count)))


def ray_runner(stack: ExitStack) -> Callable[[Body, int], Sample]:
    """Start a local ray; give what runs calls on it."""
    import ray  # noqa: PLC0415 - optional

    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
    stack.callback(ray.shutdown)

    def run_on_ray(body: Body, count: int) -> Sample:
        remote = ray.remote(body)
        return rate(count, lambda: ray.get([remote.remote(x) for x in range(count)]))

    return run_on_ray


def warm(report: Report) -> None:
    """Calls that are all done, beside joblib.Memory's hits; and the memory that takes."""
    count, count_memory = report.pick(WARM, 500), report.pick(WARM_MEMORY, 50)
    with tempfile.TemporaryDirectory() as folder:
        cached = joblib.Memory(folder, verbose=0).cache(nothing)
        run_calls(nothing, count, namespace="warm")
        for x in range(count_memory):
            cached(x)
        before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        taken = take_turns(
            report.runs,
            {
                "memory": lambda: rate(
                    count_memory, lambda: [cached(x) for x in range(count_memory)]
                ),
                "ours": lambda: Sample(count / run_calls(nothing, count, namespace="warm")),
            },
        )
        grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) / 1024
    last = run_once.last_report()
    assert last is not None
    assert last.hits == count
    report.add(f"joblib.Memory, {count_memory:,} hits", taken["memory"], "calls/s")
    report.add(f"run_once, {count:,} hits", taken["ours"], "calls/s")
    add_ratio(report, "run_once beside joblib.Memory, hits", taken["ours"], taken["memory"])
    report.value(f"run_once, memory grown in {report.runs} more runs", grown_mb, "MB")


def delay(report: Report, address: str) -> None:
    """Calls over a longer network, beside the same without."""
    options: dict[str, Any] = {"n_jobs": 8, "inner": "threading"}
    count = report.pick(DELAYED, 20)
    with delayed(address, DELAY_MS) as far:
        taken = take_turns(
            report.runs,
            {
                "plain threading": lambda: parallel_rate(nap_longer, count, "threading", n_jobs=8),
                "run_once": lambda: parallel_rate(nap_longer, count, address=address, **options),
                "far": lambda: parallel_rate(nap_longer, count, address=far, **options),
            },
        )
    for name, samples in taken.items():
        what = f"run_once, {DELAY_MS} ms more" if name == "far" else name
        report.add(f"{what}, 8 threads", samples, "calls/s", f"{count} x 10 ms")
    what = f"run_once with {DELAY_MS} ms more beside without"
    add_ratio(report, what, taken["far"], taken["run_once"])


def shared(report: Report) -> None:
    """Calls that share one large array, beside the hash of it alone."""
    n_bytes = report.pick(SHARED_BYTES, 2_000_000)
    array = np.random.default_rng(0).random(n_bytes // 8)

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

    sides = {"one key": once, f"keys of {SHARING} calls": all_keys, f"{SHARING} calls": parallel}
    taken = take_turns(
        report.runs,
        {name: lambda side=side: Sample(1000 * side()) for name, side in sides.items()},  # type: ignore[misc]
    )
    for name, samples in taken.items():
        report.add(f"array of {n_bytes // 10**6} MB: {name}", samples, "ms")
        if name != "one key":
            add_ratio(report, f"{name} beside one key, time", samples, taken["one key"])


def parallel_rate(func: Body, count: int, *args: Any, **options: Any) -> Sample:
    """Run a Parallel; give its calls a second."""
    return Sample(count / run_calls(func, count, *args, **options))


def add_ratio(report: Report, what: str, ours: list[Sample], peer: list[Sample]) -> None:
    """Add a line with a ratio."""
    report.value(what, ratio(ours, peer), "x")


def measure(report: Report) -> None:
    """Measure the parts that are asked for."""
    with lock_server() as server:
        questions: dict[str, Callable[[], None]] = {
            "cold": lambda: cold(report),
            "warm": lambda: warm(report),
            "delay": lambda: delay(report, server.address),
            "shared": lambda: shared(report),
        }
        for name in report.parts or questions:
            questions[name]()


if __name__ == "__main__":
    run("joblib_calls", TITLE, measure)
