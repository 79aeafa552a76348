"""Claims of single keys by 1, 16 and 200 clients, synced, beside 2021's, which are not synced.

python benchmarks/single_claims.py

The clients are threads of two processes and claim in a closed loop, with our client or with the
calls of 2021: either all threads of a process through its one client, as both releases have it, or
each with a connection of its own, which stands for as many processes. Of 2021's two ways the faster
one is the peer. Load and server share the machine's cores.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeAlias

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

Sides: TypeAlias = dict[str, Callable[[], Sample]]

_OURS = "LockClient.claim([key]), synced"
_2021 = "AcquireLock, not synced"
LINES = {
    "ours": ("run-once", f"{_OURS}; one client for each of two processes", "claims/s"),
    "ours apart": ("run-once, apart", f"{_OURS}; a connection for each client", "claims/s"),
    "2021": ("run-once 0.4.2", f"{_2021}; one channel for each of two processes", "claims/s"),
    "2021 apart": ("run-once 0.4.2, apart", f"{_2021}; a channel for each client", "claims/s"),
    "limit": ("limit: empty calls", "grpc.aio server in Python, at most 20 connections", "calls/s"),
}
"""Name, calls and unit of each side."""


def load(
    kind: str, address: str, pid: int, clients: int, for_s: float, *, is_shared: bool
) -> Sample:
    """Claim for so long; give claims a second and the server's time for each."""
    processes = min(PROCESSES, clients)
    job = {
        "kind": kind,
        "address": address,
        "clients": clients // processes,
        "seconds": for_s,
        "is_shared": is_shared,
    }
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


def sides_of(kind: str, address: str, pid: int, clients: int, for_s: float) -> Sides:
    """Give the ways in which so many clients may claim from a server."""
    ways = {kind: True, f"{kind} apart": False} if clients > 1 else {kind: True}
    return {
        name: functools.partial(load, kind, address, pid, clients, for_s, is_shared=is_shared)
        for name, is_shared in ways.items()
    }


def measure(report: Report) -> None:
    """Measure each number of clients, ours and the peer taking turns."""
    for_s = 0.2 if report.quick else 1.2
    with lock_server() as server, running_2021(report) as old:
        for clients in CLIENTS[1:2] if report.quick else CLIENTS:
            sides = sides_of("ours", server.address, server.pid, clients, for_s)
            if old is not None:
                sides |= sides_of("2021", old.address, old.pid, clients, for_s)
            with limits.empty_calls(clients) as calls:
                sides["limit"] = calls.sized_run(report.goal_s(0.5))
                add(report, clients, take_turns(report.runs, sides))
    limits.disk(report)


def add(report: Report, clients: int, taken: dict[str, list[Sample]]) -> None:
    """Add what was measured with so many clients."""
    for side, samples in taken.items():
        name, how, unit = LINES[side]
        report.add(f"{name}, {clients} clients", samples, unit, how)
        report.point("clients", f"single claims: {name}", clients, samples)
    olds = [samples for side, samples in taken.items() if side.startswith("2021")]
    for side in ("ours", "ours apart"):
        if side not in taken or clients not in TARGETS:
            continue
        name = f"{LINES[side][0]}, {clients} clients"
        if olds:
            beside = ratio(taken[side], max(olds, key=median))
            report.at_least(f"{name}, beside 2021", beside, TARGETS[clients])
        server_us = median([Sample(sample.server_us) for sample in taken[side]])
        if not math.isnan(server_us):
            report.at_most(f"{name}, server's time", server_us, SERVER_US, "us")


if __name__ == "__main__":
    run("single_claims", TITLE, measure)
