"""Claims of single keys by 1, 16 and 200 clients, synced, beside 2021's, which are not synced.

python benchmarks/single_claims.py

The clients are threads of two processes, each with a connection of its own, and claim in a closed
loop with our client or with the calls of 2021. Load and server share the machine's cores.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import limits
from child import Child
from common import Sample, cpu_s, lock_server, take_turns
from peers import running_2021
from report import Report, median, ratio, run

TITLE = "Single-key claims by several clients"
CLIENTS = (1, 16, 200)
PROCESSES = 2
TARGETS = {16: 0.9, 200: 0.8}
SERVER_US = 300


def load(kind: str, address: str, pid: int, clients: int, for_s: float) -> Sample:
    """Claim for so long; give claims a second and the server's time for each."""
    processes = min(PROCESSES, clients)
    job = {"kind": kind, "address": address, "clients": clients // processes, "seconds": for_s}
    with ExitStack() as stack:
        children = [Child("claim_load.py", job) for _ in range(processes)]
        for child in children:
            stack.callback(child.close)
        before_s = cpu_s(pid)
        for child in children:
            child.go()
        reports: list[dict[str, Any]] = [child.result() for child in children]
        used_s = cpu_s(pid) - before_s
    claims = sum(report["claims"] for report in reports)
    return Sample(claims / for_s, used_s / claims * 1e6)


def measure(report: Report) -> None:
    """Measure each number of clients, ours and the peer taking turns."""
    for_s = 0.2 if report.quick else 1.2
    with lock_server() as server, running_2021(report) as old:
        for clients in CLIENTS[1:2] if report.quick else CLIENTS:
            ours = functools.partial(load, "ours", server.address, server.pid, clients, for_s)
            sides: dict[str, Callable[[], Sample]] = {"ours": ours}
            if old is not None:
                sides["2021"] = functools.partial(
                    load, "2021", old.address, old.pid, clients, for_s
                )
            with limits.empty_calls(clients) as calls:
                sides["limit"] = calls.sized_run(report.goal_s(0.5))
                add(report, clients, take_turns(report.runs, sides))
    limits.disk(report)


def add(report: Report, clients: int, taken: dict[str, list[Sample]]) -> None:
    """Add what was measured with so many clients."""
    ours, old = taken["ours"], taken.get("2021")
    what = f"{clients} clients"
    report.add(f"run-once, {what}", ours, "claims/s", "LockClient.claim([key]), synced")
    report.point("clients", "single claims: run-once", clients, ours)
    if old is not None:
        report.add(f"run-once 0.4.2, {what}", old, "claims/s", "AcquireLock, not synced")
        report.point("clients", "single claims: run-once 0.4.2", clients, old)
    report.add(
        f"limit: empty calls, {what}", taken["limit"], "calls/s", "grpc.aio server in Python"
    )
    report.point("clients", "limit: empty calls", clients, taken["limit"])
    if clients in TARGETS:
        if old is not None:
            report.at_least(f"{what} beside 2021", ratio(ours, old), TARGETS[clients])
        server_us = median([Sample(sample.server_us) for sample in ours])
        if not math.isnan(server_us):
            report.at_most(f"server's time, {what}", server_us, SERVER_US, "us")


if __name__ == "__main__":
    run("single_claims", TITLE, measure)
