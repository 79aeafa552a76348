"""How much does the loop cost? An empty body, `timeout=None`, one process, beside that of 2021.

python benchmarks/loop.py
"""

from __future__ import annotations

import itertools

import limits
from client_2021 import Client2021
from common import lock_server, rate, sized, take_turns
from peers import python_2021, running_2021
from report import Report, median, ratio, run
from run_once import DistributedIterator

TITLE = "The loop with an empty body, one process"
_runs = itertools.count()


def keys(count: int, prefix: str = "key") -> list[str]:
    """Give short keys."""
    return [f"{prefix}-{number:07d}" for number in range(count)]


def loop(count: int) -> None:
    """Run our loop over new keys."""
    for _ in DistributedIterator(keys(count), namespace=f"cold-{next(_runs)}"):
        pass


def loop_2021(client: Client2021, count: int) -> None:
    """Run the loop of 2021 over new keys, each one settled as it asks for."""
    for key in client.loop(keys(count, f"cold-{next(_runs)}")):
        client.notify_success(key)


def measure(report: Report) -> None:
    """Measure both, taking turns."""
    with lock_server() as server, running_2021(report) as old:
        sides = {}
        most = report.pick(100_000, 200)
        count = sized(50, most, report.goal_s(2), loop)
        sides["ours"] = lambda: rate(count, lambda: loop(count), server.pid)
        if old is not None:
            client = old.client
            count_2021 = sized(50, most, report.goal_s(2), lambda n: loop_2021(client, n))
            sides["2021"] = lambda: rate(count_2021, lambda: loop_2021(client, count_2021), old.pid)
            python = python_2021(report)
            if python is not None:
                sides["own"] = lambda: old.own_loop(python, f"own-{next(_runs)}-%07d", count_2021)
        taken = take_turns(report.runs, sides)
    report.add("run-once", taken["ours"], how=f"for key in DistributedIterator({count:,} keys)")
    limits.disk(report)
    report.at_least("keys/s", median(taken["ours"]), 30_000, "keys/s")
    if "2021" in taken:
        how = "chunksize=10: AcquireMany(10, max_acquired_locks=1), notify_success: AcquireLock"
        report.add("run-once 0.4.2, not synced", taken["2021"], how=how)
        report.at_least("beside the loop of 2021", ratio(taken["ours"], taken["2021"]), 40)
    if "own" in taken:
        how = "DistributedIterator and notify_success of 0.4.2, with grpcio 1.49"
        report.add("run-once 0.4.2, its own client", taken["own"], how=how)


if __name__ == "__main__":
    run("loop", TITLE, measure)
