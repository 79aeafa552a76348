"""Does anybody hoard? Bodies of very different lengths on eight workers, beside an ideal schedule.

python benchmarks/makespan.py

Ideal is list scheduling: whoever is free takes the next key of the list, at once. A key is hoarded
while one worker holds it unstarted and another has nothing to do.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from typing import Any

from common import Sample, lock_server
from report import Report, median, run
from spread import together

TITLE = "Bodies that sleep, lognormal lengths, eight workers"
WORKERS, MEAN_S, SIGMA = 8, 0.3, 1.0
END_S = 1e18

Span = tuple[float, float]


def lengths(count: int, seed: int) -> list[float]:
    """Draw lengths whose mean is `MEAN_S`."""
    drawn = random.Random(seed)
    values = [drawn.lognormvariate(0, SIGMA) for _ in range(count)]
    return [value * MEAN_S * count / sum(values) for value in values]


def ideal_s(sleeps: Sequence[float], workers: int) -> float:
    """Give the makespan of list scheduling in the order of the list."""
    free = [0.0] * workers
    for sleep in sleeps:
        heapq.heappush(free, heapq.heappop(free) + sleep)
    return max(free)


def unstarted(report: dict[str, Any]) -> list[Span]:
    """Give when this worker held which keys without having started them."""
    events = {item[0]: [item[1]] for item in report["items"]}
    for answered, keys in report["freed"]:
        for key in keys:
            events.setdefault(_plain(key), []).append(answered)
    spans = []
    for _, answered, granted in report["claims"]:
        for key in granted:
            later = [at for at in events.get(_plain(key), []) if at >= answered]
            spans.append((answered, min(later, default=END_S)))
    return spans


def idle(report: dict[str, Any], end_s: float) -> list[Span]:
    """Give when this worker ran no body."""
    edges = [report["began"]]
    for _, handed, ended in report["items"]:
        edges += [handed, ended]
    edges.append(end_s)
    return list(zip(edges[::2], edges[1::2], strict=True))


def hoarded_s(reports: Sequence[dict[str, Any]]) -> float:
    """Give the longest time that a worker held an unstarted key while one other was idle."""
    end_s = max(item[2] for report in reports for item in report["items"])
    idles = [idle(report, end_s) for report in reports]
    longest = 0.0
    for holder, report in enumerate(reports):
        for start, end in unstarted(report):
            for other, spans in enumerate(idles):
                if other != holder:
                    overlaps = (min(end, b) - max(start, a) for a, b in spans)
                    longest = max(longest, *overlaps)
    return longest


def measure(report: Report) -> None:
    """Run the same keys again and again, with other lengths each time."""
    count, workers = report.pick(200, 16), report.pick(WORKERS, 3)
    beside, hoarded, took, ideals = [], [], [], []
    with lock_server():
        for seed in range(report.runs):
            sleeps = [s * (0.1 if report.quick else 1) for s in lengths(count, seed)]
            reports = together(workers, {"count": count, "sleeps": sleeps})
            first_s = min(r["began"] for r in reports)
            took_s = max(item[2] for r in reports for item in r["items"]) - first_s
            ideals.append(Sample(ideal_s(sleeps, workers)))
            took.append(Sample(took_s))
            beside.append(Sample(took_s / ideals[-1].value))
            hoarded.append(Sample(hoarded_s(reports)))
    how = f"{count} x time.sleep, mean {MEAN_S} s, sigma {SIGMA}, {workers} processes"
    report.add("run-once", took, "s", how)
    report.add("ideal list scheduling", ideals, "s", "computed for the same lengths")
    report.add("longest hold of an unstarted key", hoarded, "s", "while another worker idles")
    report.at_most("beside ideal", median(beside), 1.1)
    report.at_most("longest hold, all runs", max(s.value for s in hoarded), 0.2, "s")


def _plain(stored: str) -> str:
    return stored.rpartition("\x1f")[2]


if __name__ == "__main__":
    run("makespan", TITLE, measure)
