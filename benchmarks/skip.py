"""How fast are done keys skipped? A million with the defaults, then ten million of a generator.

python benchmarks/skip.py

The second loop runs in a process of its own, which reports its memory, twice: the server knows
blocks of done keys from the first pass. Its rate is the median over pieces of a million keys. Its
generator ends after a minute, which a slow machine takes for fewer.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

import bulk
from child import Child, child_job, child_ready
from client_2021 import Client2021
from common import Sample, lock_server, rate, take_turns
from peers import Running2021, python_2021, running_2021
from report import Report, median, ratio, run
from run_once import DistributedIterator

TITLE = "Keys that are done, one process"
BEST_CHUNK = 1_000
MB = 2**20
STREAM_LIMIT_S = 60.0


def skip(count: int) -> None:
    """Run our loop over a list of keys that are all done."""
    for key in DistributedIterator([bulk.name(n) for n in range(count)], namespace=bulk.NAMESPACE):
        raise SystemExit(f"{key} was not done")


def skip_2021(client: Client2021, count: int, chunksize: int) -> None:
    """Run the loop of 2021 over keys that are all done."""
    for key in client.loop([bulk.name(n) for n in range(count)], chunksize):
        raise SystemExit(f"{key} was not done")


def stream() -> None:
    """Be the process that skips the keys of a generator, and tell rates and memory."""
    job = child_job()
    count, piece = job["count"], job["piece"]
    child_ready()
    first = stream_once(count, piece)
    rates = stream_once(len(first) * piece, piece)
    began_s = time.perf_counter()
    deque(map(bulk.name, range(piece)), maxlen=0)
    alone = piece / (time.perf_counter() - began_s)
    print(f'{{"first": {first}, "rates": {rates}, "alone": {alone}, "mb": {peak_mb()}}}')


def stream_once(count: int, piece: int) -> list[float]:
    """Pass over the keys of a generator; give the rate in each piece."""
    marks: list[float] = []

    def names() -> Iterator[str]:
        for number in range(count):
            if number % piece == 0:
                marks.append(time.perf_counter())
                if marks[-1] - marks[0] > STREAM_LIMIT_S:
                    return
            yield bulk.name(number)
        marks.append(time.perf_counter())

    for key in DistributedIterator(names(), namespace=bulk.NAMESPACE):
        raise SystemExit(f"{key} was not done")
    return [piece / (end - start) for start, end in itertools.pairwise(marks)]


def peak_mb() -> float:
    """Give this process's highest memory; psutil's `peak` is Windows' alone."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return float(psutil.Process().memory_info().rss / MB)


def a_list(report: Report) -> list[Sample]:
    """Measure a million keys in a list."""
    count = report.pick(1_000_000, 20_000)
    part, best = report.pick(40_000, 1_000), report.pick(200_000, 5_000)
    with (
        tempfile.TemporaryDirectory() as made,
        bulk.database(count) as folder,
        lock_server(folder) as server,
    ):
        bulk.fill_2021(Path(made) / "db", max(part, best))
        first = rate(count, lambda: skip(count), server.pid)
        with running_2021(report, Path(made)) as old:
            sides = {"ours": lambda: rate(count, lambda: skip(count), server.pid)}
            if old is not None:
                client, pid = old.client, old.pid
                sides["10"] = lambda: rate(part, lambda: skip_2021(client, part, 10), pid)
                sides["best"] = lambda: rate(best, lambda: skip_2021(client, best, BEST_CHUNK), pid)
                sides |= own_sides(report, old, part, best)
            taken = take_turns(report.runs, sides)
    how = "the same when the server has not seen these keys since it started"
    report.add("run-once, first pass", [first], how=how)
    add_list(report, taken, (count, part, best))
    return taken["ours"]


def add_list(report: Report, taken: dict[str, list[Sample]], sizes: tuple[int, int, int]) -> None:
    """Add what was measured with lists: of all keys, for 2021's default, for its best chunk."""
    count, part, best = sizes
    ours = taken["ours"]
    report.add("run-once", ours, how=f"for key in DistributedIterator({count:,} done keys)")
    report.point("keys", "skip: run-once", count, ours)
    report.at_least("keys/s", median(ours), 400_000, "keys/s")
    if "10" in taken:
        report.add("run-once 0.4.2, chunksize=10", taken["10"], how=f"{part:,} keys, its default")
        report.add(
            f"run-once 0.4.2, chunksize={BEST_CHUNK:,}",
            taken["best"],
            how=f"{best:,} keys, its best",
        )
        report.at_least("beside 2021 with its default", ratio(ours, taken["10"]), 25)
        report.at_least("beside 2021 with its best chunk", ratio(ours, taken["best"]), 5)
    if "own 10" in taken:
        how = "DistributedIterator of 0.4.2, with grpcio 1.49"
        report.add("run-once 0.4.2, its own client, 10", taken["own 10"], how=how)
        report.add(f"run-once 0.4.2, its own client, {BEST_CHUNK:,}", taken["own best"], how=how)


def own_sides(
    report: Report, old: Running2021, part: int, best: int
) -> dict[str, Callable[[], Sample]]:
    """Give runs of the loop of 2021 by its own client."""
    python = python_2021(report)
    if python is None:
        return {}
    return {
        "own 10": lambda: old.own_loop(python, bulk.FORM, part, is_done=True),
        "own best": lambda: old.own_loop(python, bulk.FORM, best, BEST_CHUNK, is_done=True),
    }


def a_generator(report: Report, of_list: list[Sample]) -> None:
    """Measure ten million keys of a generator."""
    count, piece = report.pick(10_000_000, 40_000), report.pick(1_000_000, 20_000)
    with bulk.database(count) as folder, lock_server(folder):
        child = Child("skip.py", {"count": count, "piece": piece})
        child.go()
        found = child.result()
    samples = [Sample(value) for value in found["rates"]]
    covered = piece * len(samples)
    how = f"{covered:,} of them in pieces of {piece:,} of one pass"
    first = [Sample(value) for value in found["first"]]
    report.add(f"run-once, generator of {count:,}, first pass", first, how=how)
    report.add(f"run-once, generator of {count:,}", samples, how=how)
    alone = [Sample(found["alone"])]
    report.add("limit: making these names, and nothing else", alone, how="in that client")
    report.value("run-once, memory of that client", found["mb"], "MB")
    report.point("keys", "skip: run-once", count, samples)
    report.at_least("generator beside list", median(samples) / median(of_list), 0.8)
    report.at_most("memory of the client", found["mb"], 200, "MB")


def measure(report: Report) -> None:
    """Measure both."""
    a_generator(report, a_list(report))


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("{"):
        stream()
    else:
        run("skip", TITLE, measure)
