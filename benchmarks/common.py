"""What the benchmarks share: servers of their own, turns, rates, processor time.

What their children share too is in `child.py`, which imports less.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.servers import ServerProcess

HERE = Path(__file__).parent


class Sample(NamedTuple):
    """One run: what was measured, and the server's processor time for each key in microseconds."""

    value: float
    server_us: float = math.nan


@contextmanager
def lock_server(folder: Path | None = None) -> Iterator[ServerProcess]:
    """Run a lock server on the database in a folder, and point the environment at it.

    Args:
        folder: Its database is in `db` of this; None: a temporary one.
    """
    with tempfile.TemporaryDirectory(prefix="run-once-bench-") as made:
        server = ServerProcess(folder or Path(made), "--log_level=warning")
        try:
            server.start()
            point_at(server.address, Path(made))
            yield server
        finally:
            server.close()


def point_at(address: str, config: Path) -> None:
    """Have this process and its children use a server."""
    os.environ |= {"RUN_ONCE_ADDRESS": address, "RUN_ONCE_CONFIG_DIR": str(config / "config")}


@contextmanager
def delayed(address: str, round_trip_ms: float) -> Iterator[str]:
    """Give a server's address behind a longer network."""
    proxy = subprocess.Popen(
        [sys.executable, str(HERE / "delay_proxy.py"), address, str(round_trip_ms)],
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


def seconds(run: Callable[[], object]) -> float:
    """Time one call, in seconds."""
    started_s = time.perf_counter()
    run()
    return time.perf_counter() - started_s


def take_turns(runs: int, sides: Mapping[str, Callable[[], Sample]]) -> dict[str, list[Sample]]:
    """Run A B A B ..., so that a noisy minute meets all of them; give each one's samples."""
    taken: dict[str, list[Sample]] = {name: [] for name in sides}
    for _ in range(runs):
        for name, side in sides.items():
            taken[name].append(side())
    return taken


def cpu_s(pid: int | None) -> float:
    """Give the processor time that a process has used, in seconds; nan for no process."""
    if pid is None:
        return math.nan
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def rate(count: int, run: Callable[[], object], pid: int | None = None) -> Sample:
    """Time one run over so many keys: keys a second, and what each cost the server."""
    before_s = cpu_s(pid)
    took_s = seconds(run)
    return Sample(count / took_s, (cpu_s(pid) - before_s) / count * 1e6)


def sized(first: int, most: int, goal_s: float, run: Callable[[int], object]) -> int:
    """Find how many keys make a run of about `goal_s`, by runs that grow; at most `most`."""
    count = first
    run(first)  # connects, imports
    while True:
        took_s = seconds(lambda count=count: run(count))  # type: ignore[misc]
        if count >= most or took_s >= goal_s / 3:
            return max(1, min(most, round(count * goal_s / took_s)))
        count = min(most, count * 4)
