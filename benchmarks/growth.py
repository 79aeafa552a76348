"""What becomes of the server as its database grows? 1 M and 10 M keys, or as many as are named.

python benchmarks/growth.py                       # make bench
python benchmarks/growth.py 1000000 50000000      # make bench-growth: some minutes, 3 GB of disk
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import psutil

import bulk
from child import our_client
from common import Sample, lock_server, seconds
from report import Report, median, run
from run_once.keys import stored_key
from tests.servers import ServerProcess

TITLE = "The server as its database grows"
SIZES = (1_000_000, 10_000_000)
CACHE_MB = 64
"""The server's default `--cache_size`."""
TTL_S = 60.0
CLAIMS, COUNTS = 300, 20
MB = 2**20


class Found(NamedTuple):
    """What was measured at one size."""

    claims: list[Sample]
    starts: list[Sample]
    counts: list[Sample]
    memory_mb: float
    bytes_a_key: float


def disk_bytes(folder: Path) -> int:
    """Give how much the files of a database take."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def claim_ms(server: ServerProcess, number: int, count: int) -> Sample:
    """Claim single keys, spread over the whole range; give the median time."""
    took: list[Sample] = []
    with our_client(server.address) as client:
        client.server_info()
        for at in range(count):
            name = f"{bulk.name(at * 9_973 % 10**9)}-new-{number}-{time.time_ns()}"
            key = stored_key(name, namespace=bulk.NAMESPACE)
            took.append(Sample(1000 * seconds(lambda key=key: client.claim([key], ttl_s=TTL_S))))  # type: ignore[misc]
    return Sample(median(took))


def count_ms(server: ServerProcess) -> Sample:
    """Count the keys of the namespace again and again; give the median time."""
    with our_client(server.address) as client:
        client.server_info()

        def count() -> object:
            return client.count(namespace=bulk.NAMESPACE)

        return Sample(median([Sample(1000 * seconds(count)) for _ in range(COUNTS)]))


def at_size(report: Report, count: int) -> Found:
    """Measure one size."""
    starts, claims, counts = [], [], []
    with bulk.database(count) as folder:
        key_bytes = len(stored_key(bulk.name(0), namespace=bulk.NAMESPACE))
        bytes_a_key = disk_bytes(folder / "db") / count - key_bytes
        with lock_server(folder) as server:
            for number in range(report.runs):
                server.kill()
                starts.append(Sample(seconds(server.start)))
                claims.append(claim_ms(server, number, report.pick(CLAIMS, 20)))
                counts.append(count_ms(server))
            memory_mb = psutil.Process(server.pid).memory_info().rss / MB
    return Found(claims, starts, counts, memory_mb, bytes_a_key)


def measure(report: Report) -> None:
    """Measure each size."""
    sizes = [int(part) for part in report.parts] or [report.pick(s, s // 500) for s in SIZES]
    found = {count: at_size(report, count) for count in sizes}
    smallest = found[min(sizes)]
    empty_s = start_empty(report)
    for count, at in found.items():
        what = f"{count:,} keys"
        report.add(
            f"claim of one key, {what}", at.claims, "ms", f"LockClient.claim, median of {CLAIMS}"
        )
        report.add(f"kill to serving, {what}", at.starts, "s", "SIGKILL, start, until healthy")
        report.add(
            f"count of a namespace, {what}",
            at.counts,
            "ms",
            f"LockClient.count, median of {COUNTS}",
        )
        report.value(f"server memory, {what}", at.memory_mb, "MB")
        report.value(f"disk beyond the key, {what}", at.bytes_a_key, "bytes a key")
        rates = [Sample(1000 / sample.value) for sample in at.claims]
        report.point("keys", "single claim, one client", count, rates)
        report.at_most(f"claim, {what}", median(at.claims) / median(smallest.claims), 2)
        report.at_most(f"kill to serving, {what}", median(at.starts), 1, "s")
        report.at_most(f"count of a namespace, {what}", median(at.counts), 5, "ms")
        report.at_most(f"server memory, {what}", at.memory_mb, 400 + CACHE_MB, "MB")
        report.at_most(f"disk beyond the key, {what}", at.bytes_a_key, 60, "bytes a key")
    report.add("kill to serving, empty database", empty_s, "s", "most of it is Python's start")


def start_empty(report: Report) -> list[Sample]:
    """Measure the start of a server without a key."""
    with lock_server() as server:
        samples = []
        for _ in range(report.runs):
            server.kill()
            samples.append(Sample(seconds(server.start)))
    return samples


if __name__ == "__main__":
    run("growth", TITLE, measure)
