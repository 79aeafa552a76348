"""What does a long round trip cost? Bodies of 10 ms over 50 ms, then over others.

python benchmarks/slow_network.py

A proxy (`delay_proxy.py`) delays each way by half. A run lasts some seconds and then breaks off.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable

from client_2021 import Client2021
from common import Sample, delayed, lock_server, take_turns
from peers import running_2021
from report import Report, median, run
from run_once import DistributedIterator

TITLE = "Bodies of 10 ms over a long round trip, one worker"
BODY_S = 0.010
ROUND_TRIP_MS = 50
OTHERS_MS = (0, 10, 20, 100)
KEYS = 100_000
_runs = itertools.count()


def in_bodies(items: Iterable[object], for_s: float) -> float:
    """Work through items until the time is over; give the share of it that bodies took."""
    began_s = time.perf_counter()
    body_s = 0.0
    for _ in items:
        start_s = time.perf_counter()
        time.sleep(BODY_S)
        body_s += time.perf_counter() - start_s
        if time.perf_counter() - began_s > for_s:
            break
    return body_s / (time.perf_counter() - began_s)


def ours(address: str, for_s: float) -> Sample:
    """Run our loop; give the share in percent."""
    keys = (f"key-{number}" for number in range(KEYS))
    loop = DistributedIterator(keys, namespace=f"far-{next(_runs)}", address=address)
    return Sample(100 * in_bodies(loop, for_s))


def old(address: str, for_s: float) -> Sample:
    """Run the loop of 2021; give the share in percent."""
    client = Client2021(address)
    keys = [f"far-{next(_runs)}-{number}" for number in range(KEYS)]

    def settled() -> Iterable[str]:
        for key in client.loop(keys):
            yield key
            client.notify_success(key)

    share = in_bodies(settled(), for_s)
    client.close()
    return Sample(100 * share)


def measure(report: Report) -> None:
    """Measure one round trip with the peer, then ours over others."""
    for_s = 0.3 if report.quick else 5.0
    with lock_server() as server, running_2021(report) as peer:
        with delayed(server.address, ROUND_TRIP_MS) as far:
            sides = {"ours": lambda: ours(far, for_s)}
            if peer is None:
                taken = take_turns(report.runs, sides)
            else:
                with delayed(peer.address, ROUND_TRIP_MS) as far_2021:
                    sides["2021"] = lambda: old(far_2021, for_s / 2)
                    taken = take_turns(report.runs, sides)
        _point(report, "run-once", ROUND_TRIP_MS, taken["ours"])
        for round_trip_ms in OTHERS_MS[: report.pick(len(OTHERS_MS), 1)]:
            with delayed(server.address, round_trip_ms) as far:
                _point(report, "run-once", round_trip_ms, [ours(far, for_s / 2)])
    what = f"in bodies, {ROUND_TRIP_MS} ms"
    report.add(f"run-once, {what}", taken["ours"], "%", "for key in DistributedIterator(generator)")
    report.at_least("of the worker's time in bodies", median(taken["ours"]), 90, "%")
    if "2021" in taken:
        how = "AcquireMany of 10, notify_success after each body"
        report.add(f"run-once 0.4.2, {what}", taken["2021"], "%", how)
        _point(report, "run-once 0.4.2", ROUND_TRIP_MS, taken["2021"])


def _point(report: Report, curve: str, round_trip_ms: float, shares: list[Sample]) -> None:
    rates = [Sample(share.value / 100 / BODY_S) for share in shares]
    report.point("round trip ms", f"10 ms bodies: {curve}", round_trip_ms, rates)


if __name__ == "__main__":
    run("slow_network", TITLE, measure)
