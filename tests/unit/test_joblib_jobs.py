"""How long calls and requests take, and what follows from it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from run_once.joblib_jobs import SHORT_ROUND_TRIPS, HitSizer, Job, Pace
from run_once.joblib_outcomes import Value


def pace(run_s: float, trip_s: float) -> Pace:
    """Give what is known after one call and one request."""
    made = Pace()
    made.ran(run_s)
    made.asked(trip_s)
    return made


def test_calls_are_long_until_one_has_run() -> None:
    """A call of which nothing is known is left to be claimed by its worker."""
    unknown = Pace()
    assert not unknown.is_short
    unknown.asked(1.0)
    assert not unknown.is_short
    assert unknown.calls_per_worker(3) == 6


@pytest.mark.parametrize(("run_s", "is_short"), [(0.019, True), (0.021, False)])
def test_short_is_under_twenty_round_trips(run_s: float, is_short: bool) -> None:
    """The bound is a number of round trips."""
    assert pace(run_s, 0.02 / SHORT_ROUND_TRIPS).is_short is is_short


def test_the_fastest_request_is_the_round_trip() -> None:
    """One that waited for a busy server does not make calls short."""
    measured = pace(1.0, 0.001)
    measured.asked(10.0)
    assert not measured.is_short


def test_newer_calls_count_more() -> None:
    """Calls that become long stop being short, soon but not at once."""
    measured = pace(0.001, 0.001)
    measured.ran(0.05)
    assert measured.is_short
    for _ in range(10):
        measured.ran(0.05)
    assert not measured.is_short


@pytest.mark.parametrize(
    ("run_s", "trip_s", "batch_size", "expected"),
    [(0.01, 0.0065, 1, 4), (0.001, 0.001, 100, 200), (0.01, 1e-3, 1, 2), (0.0, 0.01, 1, 2)],
)
def test_more_calls_are_under_way_where_requests_take_long(
    run_s: float, trip_s: float, batch_size: int, expected: int
) -> None:
    """What a worker runs during four requests, and never less than two batches."""
    assert pace(run_s, trip_s).calls_per_worker(batch_size) == expected


def test_calls_under_way_are_bounded() -> None:
    """However short the calls."""
    assert pace(1e-9, 1.0).calls_per_worker(1) == 1000


def test_batches_grow_on_hits_alone() -> None:
    """Each job of hits doubles the size, up to a bound; a cold one starts over."""
    sizer = HitSizer()

    def complete(count: int, *, had_cold: bool) -> None:
        batch: Any = SimpleNamespace(items=[None] * count)
        job = Job(batch, lambda _: None)
        job.had_cold = had_cold
        sizer.completed(job)

    complete(1, had_cold=False)
    assert sizer.batch_size(1) == 2
    for _ in range(20):
        complete(sizer.batch_size(1), had_cold=False)
    assert sizer.batch_size(1) == HitSizer.MAX_SIZE
    complete(1, had_cold=True)
    assert sizer.batch_size(7) == 7


def test_a_job_is_handed_back_once() -> None:
    """With its last item; what is settled twice counts once."""
    done: list[Job] = []
    batch: Any = SimpleNamespace(items=[None] * 2)
    job = Job(cast("Any", batch), done.append)
    job.settle(0, Value("a"))
    job.settle(0, Value("b"))
    assert done == []
    job.settle(1, Value("c"))
    assert done == [job]
    assert job.values() == ["a", "c"]
