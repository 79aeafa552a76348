"""What becomes of the server as its database grows? 1 M and 10 M keys, or as many as are named.

python benchmarks/growth.py                       # make bench
python benchmarks/growth.py 1000000 50000000      # make bench-growth: some minutes, 3 GB of disk
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import psutil

import bulk
from child import our_client
from common import Sample, lock_server, seconds
from report import Report, median, ratio, run
from run_once.keys import stored_key
from tests.servers import ServerProcess

TITLE = "The server as its database grows"
SIZES = (1_000_000, 10_000_000)
QUICK_SIZE = 2_000
CACHE_MB = 64
"""The server's default `--cache_size`."""
TTL_S = 60.0
CLAIMS, COUNTS = 300, 20
MB = 2**20


class Grown:
    """A server over a database of one size, and what was measured of it."""

    def __init__(self, server: ServerProcess, count: int) -> None:
        """Take a running server over so many keys."""
        self.server = server
        self.count = count
        self.bytes_a_key = 0.0
        if count:
            key_bytes = len(stored_key(bulk.name(0), namespace=bulk.NAMESPACE))
            self.bytes_a_key = disk_bytes(server.db) / count - key_bytes
        self.claims: list[Sample] = []
        self.starts: list[Sample] = []
        self.counts: list[Sample] = []

    def measure(self, claims: int) -> None:
        """Kill it, start it, claim and count."""
        self.server.kill()
        self.starts.append(Sample(seconds(self.server.start)))
        self.claims.append(claim_ms(self.server, self.count, claims))
        self.counts.append(count_ms(self.server))

    @property
    def memory_mb(self) -> float:
        """What the server has in memory."""
        return float(psutil.Process(self.server.pid).memory_info().rss / MB)


def disk_bytes(folder: Path) -> int:
    """Give how much the files of a database take."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def claim_ms(server: ServerProcess, size: int, count: int) -> Sample:
    """Claim single keys, spread over the whole range; give the median time."""
    took: list[Sample] = []
    with our_client(server.address) as client:
        client.server_info()
        for at in range(count):
            name = f"{bulk.name(at * size // count)}-new-{time.time_ns()}"
            key = stored_key(name, namespace=bulk.NAMESPACE)
            took.append(Sample(1000 * seconds(partial(client.claim, [key], ttl_s=TTL_S))))
    return Sample(median(took))


def count_ms(server: ServerProcess) -> Sample:
    """Count the keys of the namespace again and again; give the median time."""
    with our_client(server.address) as client:
        client.server_info()

        def count() -> object:
            return client.count(namespace=bulk.NAMESPACE)

        return Sample(median([Sample(1000 * seconds(count)) for _ in range(COUNTS)]))


def measure(report: Report) -> None:
    """Measure all sizes, and an empty database, taking turns."""
    sizes = [int(part) for part in report.parts] or ([QUICK_SIZE] if report.quick else SIZES)
    with ExitStack() as stack:
        grown = []
        for count in sizes:
            folder = stack.enter_context(bulk.database(count))
            grown.append(Grown(stack.enter_context(lock_server(folder)), count))
        empty = Grown(stack.enter_context(lock_server()), 0)
        for _ in range(report.runs):
            for one in (*grown, empty):
                one.measure(report.pick(CLAIMS, 20))
        for one in grown:
            add(report, one, min(grown, key=lambda one: one.count))
        report.add("claim of one key, empty database", empty.claims, "ms")
        report.add("kill to serving, empty database", empty.starts, "s", "Python's start")
        report.value("server memory, empty database", empty.memory_mb, "MB")


def add(report: Report, grown: Grown, smallest: Grown) -> None:
    """Add what was measured at one size."""
    what = f"{grown.count:,} keys"
    report.add(f"claim of one key, {what}", grown.claims, "ms", f"the median of {CLAIMS} claims")
    report.add(f"kill to serving, {what}", grown.starts, "s", "SIGKILL, start, until healthy")
    report.add(
        f"count of a namespace, {what}", grown.counts, "ms", f"the median of {COUNTS} counts"
    )
    report.value(f"server memory, {what}", grown.memory_mb, "MB")
    report.value(f"disk beyond the key, {what}", grown.bytes_a_key, "bytes a key")
    rates = [Sample(1000 / sample.value) for sample in grown.claims]
    report.point("keys", "single claim, one client", grown.count, rates)
    beside = ratio(grown.claims, smallest.claims)
    report.at_most(f"claim, {what} beside {smallest.count:,}", beside, 2)
    report.at_most(f"kill to serving, {what}", median(grown.starts), 1, "s")
    report.at_most(f"count of a namespace, {what}", median(grown.counts), 5, "ms")
    report.at_most(f"server memory, {what}", grown.memory_mb, 400 + CACHE_MB, "MB")
    report.at_most(f"disk beyond the key, {what}", grown.bytes_a_key, 60, "bytes a key")


if __name__ == "__main__":
    run("growth", TITLE, measure)
