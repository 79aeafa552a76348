"""What stands in a call's place, what is told of calls, and questions about single ones."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import joblib
import pytest

import run_once
from run_once import CallEvent, ExhaustedError, Failed, Planned, RunOnceWarning, joblib_lookup
from tests.other_client import Other, until
from tests.servers import ServerProcess

KINDS = pytest.mark.parametrize(
    ("inner", "n_jobs"), [("loky", 2), ("threading", 2), ("loky", 1)], ids=["loky", "threads", "1"]
)


@pytest.fixture(autouse=True)
def _configured(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN_ONCE_ADDRESS", server.address)


def note(number: int, folder: Path) -> int:
    """Note a run."""
    (folder / f"{number}-{os.getpid()}-{os.urandom(4).hex()}").touch()
    return number


def fail_below(number: int, runs_needed: int, folder: Path) -> int:
    """Fail on an odd number until it was run so often."""
    note(number, folder)
    if number % 2 and len(list(folder.glob(f"{number}-*"))) < runs_needed:
        raise LookupError(f"{number} is odd")
    return number


def count(folder: Path, number: int) -> int:
    """Count the runs of a call."""
    return len(list(folder.glob(f"{number}-*")))


def run(n_jobs: int, func: Any, *arguments: tuple[Any, ...], **options: Any) -> list[Any]:
    """Make one call of `Parallel`."""
    with joblib.parallel_config("run_once", n_jobs=n_jobs, **options):
        values: list[Any] = joblib.Parallel()(joblib.delayed(func)(*each) for each in arguments)
        return values


@KINDS
def test_failures_are_handed_back(inner: str, n_jobs: int, runs: Path) -> None:
    """on_error="return": each failed call's place says why, and all others are computed."""
    calls = [(number, 9, runs) for number in range(4)]
    values = run(n_jobs, fail_below, *calls, inner=inner, on_error="return")
    assert [values[0], values[2]] == [0, 2]
    for number in (1, 3):
        failed = values[number]
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, LookupError)
        assert f"{number} is odd" in failed.traceback
        assert "fail_below" in failed.key
    report = run_once.last_report()
    assert report is not None
    assert (report.calls, report.computed, report.failed) == (4, 2, 2)


@KINDS
def test_failures_are_tried_again(inner: str, n_jobs: int, runs: Path) -> None:
    """on_error="retry": until it goes well, 3 times unless max_attempts says otherwise."""
    calls = [(number, 3, runs) for number in range(4)]
    assert run(n_jobs, fail_below, *calls, inner=inner, on_error="retry") == [0, 1, 2, 3]
    assert [count(runs, number) for number in range(4)] == [1, 3, 1, 3]


@KINDS
def test_retries_end_with_the_last_error(inner: str, n_jobs: int, runs: Path) -> None:
    """max_attempts=2: it ran twice, and the call's own error comes; later only what is stored."""
    options = {"inner": inner, "on_error": "retry", "max_attempts": 2, "namespace": "my work"}
    with pytest.raises(LookupError, match="1 is odd"):
        run(n_jobs, fail_below, (1, 9, runs), **options)
    assert count(runs, 1) == 2
    with pytest.raises(ExhaustedError, match="run-once reset --namespace 'my work' ") as raised:
        run(n_jobs, fail_below, (1, 9, runs), **options)
    assert "1 is odd" in str(raised.value.__cause__)
    assert count(runs, 1) == 2, "an exhausted call is not run"


@KINDS
def test_equal_calls_computed_once(inner: str, n_jobs: int, runs: Path) -> None:
    """duplicates="once": one run, its value for all, and no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RunOnceWarning)
        calls = [(number % 3, runs) for number in range(12)]
        values = run(n_jobs, note, *calls, inner=inner, duplicates="once")
    assert values == [number % 3 for number in range(12)]
    assert [count(runs, number) for number in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_the_error_of_equal_calls_goes_to_all(n_jobs: int, runs: Path) -> None:
    """With duplicates="once" and on_error="return" each of them has it."""
    options = {"inner": "threading", "duplicates": "once", "on_error": "return"}
    values = run(n_jobs, fail_below, *[(1, 99, runs)] * 3, **options)
    assert [type(value) for value in values] == [Failed] * 3


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_equal_calls_are_warned_of_once(n_jobs: int, runs: Path) -> None:
    """One warning for a `Parallel`, at the user's line; each call is computed."""
    with pytest.warns(RunOnceWarning, match="two calls of this Parallel are equal") as caught:
        run(n_jobs, note, *[(5, runs)] * 4, inner="threading")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert count(runs, 5) == 4


@KINDS
def test_a_dry_run_runs_nothing(inner: str, n_jobs: int, runs: Path, server: ServerProcess) -> None:
    """dry_run=True says of each call what would become of it, and changes nothing."""
    run(1, fail_below, (0, 9, runs), on_error="return")
    run(1, fail_below, (1, 9, runs), on_error="return")
    other = Other(server.address)
    before = other.client.count()
    calls = [(number, 9, runs) for number in range(3)]
    planned = run(n_jobs, fail_below, *calls, inner=inner, dry_run=True)
    assert [type(each) for each in planned] == [Planned] * 3
    assert [each.state for each in planned] == ["done", "failed", "to run"]
    assert other.client.count() == before
    (grant,) = other.claim(planned[2].key)
    assert run(n_jobs, fail_below, calls[2], dry_run=True)[0].state == "in flight"
    other.settle([grant], "release")
    other.client.close()
    assert len(list(runs.iterdir())) == 2


@KINDS
def test_the_report(inner: str, n_jobs: int, runs: Path) -> None:
    """It tells hits from what was computed, and how long the hits once took."""
    run(n_jobs, time.sleep, *[(0.01 * number,) for number in range(1, 4)], inner=inner)
    run(n_jobs, time.sleep, *[(0.01 * number,) for number in range(1, 6)], inner=inner)
    report = run_once.last_report()
    assert report is not None
    assert (report.hits, report.computed, report.calls) == (3, 2, 5)
    assert report.seconds_saved >= 0.06
    assert report.elapsed_s > 0
    assert "5 calls" in str(report)
    assert "hits 3, computed 2" in str(report)


def test_taking_over_is_told(runs: Path, server: ServerProcess) -> None:
    """A call that another holds and drops is run here, and counted as taken over."""
    other = Other(server.address)
    planned = run(2, note, (0, runs), (1, runs), inner="threading", dry_run=True)
    grants = other.claim(*[each.key for each in planned])
    events: list[CallEvent] = []

    def settle() -> None:
        # Calls are looked up in order: once the last one runs, the others were seen as busy.
        until(lambda: count(runs, 2) > 0)
        other.settle(grants, "release")

    thread = threading.Thread(target=settle)
    thread.start()
    calls = [(number, runs) for number in range(3)]
    values = run(2, note, *calls, inner="threading", callback=events.append)
    thread.join()
    other.client.close()
    assert values == [0, 1, 2]
    assert Counter(event.what for event in events) == {"taken_over": 2, "computed": 1}


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_long_wait_is_told(
    n_jobs: int,
    runs: Path,
    server: ServerProcess,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once, after some patience: how many calls, and who holds the first."""
    monkeypatch.setattr(joblib_lookup, "PATIENCE_S", 0.0)
    other = Other(server.address)
    (planned,) = run(n_jobs, note, (0, runs), inner="threading", dry_run=True)
    grants = other.claim(planned.key)

    def settle() -> None:
        until(lambda: "is held by other" in caplog.text)
        other.settle(grants, "release")

    thread = threading.Thread(target=settle)
    thread.start()
    assert run(n_jobs, note, (0, runs), inner="threading") == [0]
    thread.join()
    other.client.close()
    assert caplog.text.count("waiting for a call") == 1
    assert planned.key in caplog.text


def test_a_callback_that_raises_is_dropped(runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is told of each call; its exception is logged once and ends nothing."""
    events: list[CallEvent] = []
    run(2, note, (0, runs), (1, runs), inner="threading", callback=events.append)
    assert sorted(event.what for event in events) == ["computed", "computed"]
    assert {event.key for event in events} == {
        each.key for each in run(2, note, (0, runs), (1, runs), dry_run=True)
    }

    def broken(_event: CallEvent) -> None:
        raise ZeroDivisionError

    calls = [(number, runs) for number in range(6)]
    assert run(2, note, *calls, inner="threading", callback=broken) == list(range(6))
    assert sum("callback" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_progress_is_shown(n_jobs: int, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """progress=True ends with a line that says how many are done of how many, if joblib tells."""
    with joblib.parallel_config("run_once", n_jobs=n_jobs, inner="threading", progress=True):
        parallel = joblib.Parallel()
        parallel([joblib.delayed(note)(number, runs) for number in range(3)])
    total = " of 3" if hasattr(parallel, "n_tasks") else ""  # joblib 1.4 does not
    assert f"done 3 here, 3{total} by all" in capsys.readouterr().err


def test_questions_about_single_calls(runs: Path) -> None:
    """is_done and forget find the key that `Parallel` uses, by the options in force."""
    with joblib.parallel_config("run_once", namespace="n", version=2, ignore=["folder"]):
        assert not run_once.is_done(note, 7, runs)
        assert not run_once.forget(note, 7, runs)
        joblib.Parallel(n_jobs=1)([joblib.delayed(note)(7, runs)])
        assert run_once.is_done(note, 7, folder="elsewhere")
        assert "left out: folder" in run_once.explain_key(note, 7, runs)
    assert not run_once.is_done(note, 7, runs)
    with joblib.parallel_config("run_once", namespace="n", version=2, ignore=["folder"]):
        assert run_once.forget(note, 7, runs)
        joblib.Parallel(n_jobs=1)([joblib.delayed(note)(7, runs)])
    assert count(runs, 7) == 2


@pytest.mark.parametrize(
    "option",
    [{"on_error": "ignore"}, {"duplicates": "twice"}, {"callback": 3}, {"dry_run": "maybe"}],
    ids=str,
)
def test_an_option_that_cannot_be(option: dict[str, Any]) -> None:
    """The message names it."""
    with pytest.raises(run_once.ConfigError, match=next(iter(option))):
        run(2, abs, (1,), **option)
