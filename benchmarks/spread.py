"""Do workers help each other? Four processes on one list of short keys, beside one process.

python benchmarks/spread.py

A claim request is wasted if it was sent while there was work (before the last grant to anybody)
and was granted nothing.
"""

from __future__ import annotations

import itertools
from collections import Counter
from contextlib import ExitStack
from typing import Any, NamedTuple

from child import Child
from common import Sample, lock_server, rate, sized, take_turns
from loop import loop
from report import Report, median, ratio, run

TITLE = "Four processes on one list of short keys"
WORKERS = 4
_runs = itertools.count()


class Found(NamedTuple):
    """What a run of several processes came to."""

    keys_s: float
    twice: int
    requests: int
    wasted: int


def together(workers: int, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Run so many workers on one list, started at the same moment; give what each reports."""
    job = {"namespace": f"together-{next(_runs)}", **job}
    with ExitStack() as stack:
        children = [Child("traced.py", job) for _ in range(workers)]
        for child in children:
            stack.callback(child.close)
        for child in children:
            child.go()
        return [child.result() for child in children]


def judge(reports: list[dict[str, Any]], count: int) -> Found:
    """Work out what the processes did together."""
    handed_out = Counter(item[0] for report in reports for item in report["items"])
    if len(handed_out) != count:
        raise SystemExit(f"{count - len(handed_out)} keys were not handed out at all")
    took_s = max(r["ended"] for r in reports) - min(r["began"] for r in reports)
    claims = [claim for report in reports for claim in report["claims"]]
    last_grant_s = max(answered for _, answered, granted in claims if granted)
    wasted = sum(not granted and sent < last_grant_s for sent, _, granted in claims)
    twice = sum(times - 1 for times in handed_out.values())
    return Found(count / took_s, twice, len(claims), wasted)


def measure(report: Report) -> None:
    """Measure one process and four, taking turns."""
    found: list[Found] = []
    with lock_server() as server:
        count = sized(200, report.pick(100_000, 400), report.goal_s(3), loop)

        def of(workers: int) -> Sample:
            taken: list[Found] = []
            once = rate(
                count,
                lambda: taken.append(judge(together(workers, {"count": count}), count)),
                server.pid,
            )
            if workers > 1:
                found.extend(taken)
            return Sample(taken[0].keys_s, once.server_us)

        workers = report.pick(WORKERS, 2)
        sides = {"one": lambda: of(1), "four": lambda: of(workers)}
        taken = take_turns(report.runs, sides)
    how = f"DistributedIterator over the same {count:,} keys, empty body, claims noted"
    report.add("one process", taken["one"], how=how)
    report.add("four processes", taken["four"], how=how)
    wasted = [Sample(100 * f.wasted / f.requests) for f in found]
    twice = sum(f.twice for f in found)
    report.add("claim requests without a grant", wasted, "%", "sent before the last grant")
    report.add("claim requests", [Sample(f.requests) for f in found], "requests")
    report.value("keys handed out twice, all runs", twice, "keys")
    report.point("clients", "loop: processes on one list", 1, taken["one"])
    report.point("clients", "loop: processes on one list", WORKERS, taken["four"])
    report.at_least("four beside one", ratio(taken["four"], taken["one"]), 1)
    report.at_most("keys twice", twice, 0, "keys")
    report.at_most("claim requests wasted", median(wasted), 1, "%")


if __name__ == "__main__":
    run("spread", TITLE, measure)
