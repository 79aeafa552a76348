"""Short calls of the joblib backend: claimed and settled in the parent, many in one request."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import joblib
import pytest
from joblib.externals.loky.process_executor import TerminatedWorkerError

from run_once import ExhaustedError, Failed, UnkeyableError, joblib_jobs
from run_once.joblib_call import BoundCall
from run_once.joblib_dispatch import Dispatcher
from run_once.joblib_settle import Settler
from tests.other_client import Other, until
from tests.servers import ServerProcess

COUNT: Final = 40

INNER = pytest.mark.parametrize("inner", ["loky", "threading"])


@pytest.fixture
def other(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[Other]:
    """Give another client of a server that is configured."""
    monkeypatch.setenv("RUN_ONCE_ADDRESS", server.address)
    made = Other(server.address)
    yield made
    made.client.close()


@contextmanager
def short_calls(
    monkeypatch: pytest.MonkeyPatch, inner: str = "threading", **options: Any
) -> Iterator[joblib.Parallel]:
    """Give a Parallel that has seen calls of its own, and takes all for short."""
    monkeypatch.setattr(joblib_jobs, "SHORT_ROUND_TRIPS", 1e9)
    with (
        joblib.parallel_config("run_once", inner=inner, n_jobs=2, **options),
        joblib.Parallel() as parallel,
    ):
        parallel([joblib.delayed(abs)(-1), joblib.delayed(abs)(-2)])
        yield parallel


def note(number: int, folder: Path) -> int:
    """Note a run."""
    (folder / f"{number}-{os.getpid()}-{os.urandom(4).hex()}").touch()
    return number


def count(folder: Path) -> int:
    """Count the runs."""
    return len(list(folder.iterdir()))


def owners(other: Other, name: str) -> set[int]:
    """Give the processes that hold or completed keys of a function."""
    infos = [info for info in other.client.list() if name in info.key.decode()]
    return {int(info.owner.rpartition(":")[2]) for info in infos}


@INNER
def test_the_parent_claims_short_calls(
    inner: str, other: Other, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are completed by this process, once, and a second run computes nothing."""
    calls = [joblib.delayed(note)(number, runs) for number in range(COUNT)]
    with short_calls(monkeypatch, inner) as parallel:
        assert parallel(calls) == list(range(COUNT))
        assert owners(other, "note") == {os.getpid()}
        assert parallel(calls) == list(range(COUNT))
    assert count(runs) == COUNT


def test_workers_claim_long_calls(
    other: Other, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long call belongs to nobody until a worker starts it; the first ones start at once."""
    monkeypatch.setattr(joblib_jobs, "SHORT_ROUND_TRIPS", 0)
    with joblib.parallel_config("run_once", inner="loky", n_jobs=2):
        joblib.Parallel()(joblib.delayed(note)(number, runs) for number in range(8))
    workers = {int(path.name.split("-")[1]) for path in runs.iterdir()}
    assert os.getpid() not in workers
    infos = [info for info in other.client.list() if "note" in info.key.decode()]
    mine = [info for info in infos if info.owner.endswith(f":{os.getpid()}")]
    assert len(infos) == 8
    assert len(mine) <= 2, "more than the workers can start at once"
    assert owners(other, "note") - {os.getpid()} <= workers


def failing(number: int, folder: Path) -> int:
    """Fail in one call."""
    note(number, folder)
    if number == COUNT // 2:
        raise LookupError(f"{number} is half of it")
    return number


@INNER
def test_a_short_call_that_fails(
    inner: str, other: Other, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error comes as it was; what finished is done, nothing is held, the key is failed."""
    calls = [joblib.delayed(failing)(number, runs) for number in range(COUNT)]
    with (
        short_calls(monkeypatch, inner) as parallel,
        pytest.raises(LookupError, match="is half of it") as raised,
    ):
        parallel(calls)
    assert "failing" in str(raised.value.__cause__)
    counted = other.client.count()
    assert (counted.failed, counted.held, counted.expired) == (1, 0, 0)
    before = count(runs)
    with short_calls(monkeypatch, inner, on_error="return") as parallel:
        values = parallel(calls)
    assert sum(isinstance(value, int) for value in values) == COUNT - 1
    assert count(runs) == before + COUNT - (counted.done - 2), "done calls run no more"


def test_a_short_call_is_tried_no_more_than_allowed(
    other: Other, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """max_attempts holds where the parent claims, with the stored traceback as the cause."""
    calls = [joblib.delayed(failing)(COUNT // 2, runs)]
    with short_calls(monkeypatch, max_attempts=1) as parallel, pytest.raises(LookupError):
        parallel(calls)
    with (
        short_calls(monkeypatch, max_attempts=1) as parallel,
        pytest.raises(ExhaustedError) as raised,
    ):
        parallel(calls)
    assert "is half of it" in str(raised.value.__cause__)
    with short_calls(monkeypatch, max_attempts=1, on_error="return") as parallel:
        (failed,) = parallel(calls)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, ExhaustedError)
    assert count(runs) == 1


def test_a_short_call_is_tried_again(
    other: Other, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """on_error="retry" ends with the call's own error, after as many runs as are allowed."""
    calls = [joblib.delayed(failing)(COUNT // 2, runs)]
    with (
        short_calls(monkeypatch, max_attempts=2, on_error="retry") as parallel,
        pytest.raises(LookupError, match="is half of it"),
    ):
        parallel(calls)
    assert count(runs) == 2


def large(number: int, folder: Path) -> bytes:
    """Return more than fits into a record, and cannot be compressed."""
    note(number, folder)
    return os.urandom(200_000)


@INNER
def test_a_short_call_with_a_large_value(
    inner: str, other: Other, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stored beside the database before the key is done, and comes back from there."""
    calls = [joblib.delayed(large)(number, runs) for number in range(6)]
    with short_calls(monkeypatch, inner) as parallel:
        first = parallel(calls)
        assert parallel(calls) == first
    assert count(runs) == 6


def unpicklable(number: int) -> Any:
    """Return what cannot be stored."""
    return (item for item in range(number))


@INNER
def test_a_short_call_whose_value_cannot_be_stored(
    inner: str, other: Other, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says so, and the key is not done."""
    with (
        short_calls(monkeypatch, inner) as parallel,
        pytest.raises(Exception, match="the key is not done"),
    ):
        parallel([joblib.delayed(unpicklable)(3)])
    counted = other.client.count()
    assert (counted.done, counted.held) == (2, 0)


def lose(number: int, folder: Path, address: str) -> int:
    """Have the key taken away in the first run, by somebody who drops it later."""
    note(number, folder)
    if number == 0 and len(list(folder.glob("0-*"))) == 1:
        thief = Other(address)
        (key,) = [i.key for i in thief.client.list(only="held") if b"lose" in i.key]
        thief.client.reset([key], thief.client.server_info().revision)
        (grant,) = thief.client.claim([key], ttl_s=60).grants
        until(lambda: len(list(folder.glob("1-*"))) == 1)
        thief.settle([grant], "release")
        thief.client.close()
    return number


def test_a_short_call_that_lost_its_lease(
    other: Other, server: ServerProcess, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its completion is refused, and it is run again once the other holder drops the key."""
    with short_calls(monkeypatch) as parallel:
        calls = [joblib.delayed(lose)(number, runs, server.address) for number in (0,)]
        (runs / "1-").touch()
        assert parallel(calls) == [0]
    assert len(list(runs.glob("0-*"))) == 2
    assert other.client.count().held == 0


def test_few_keys_are_held_ahead(
    other: Other, server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all calls dispatched at once, only those are claimed that workers soon ask for."""
    with short_calls(monkeypatch) as parallel:
        calls = [joblib.delayed(held_keys)(number, server.address) for number in range(320)]
        parallel(calls[:20])  # tells how long they take
        parallel.pre_dispatch = "all"
        held = parallel(calls[20:])
    assert 1 < max(held) < 100, held


def held_keys(_number: int, address: str) -> int:
    """Count the keys that are held while this call runs."""
    asked = Other(address)
    found = asked.client.count().held
    asked.client.close()
    return found


def test_a_generator_thrown_away_holds_nothing(
    other: Other, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claims of short calls are given back at once."""
    monkeypatch.setattr(joblib_jobs, "SHORT_ROUND_TRIPS", 1e9)
    with joblib.parallel_config("run_once", inner="threading", n_jobs=2):
        values = joblib.Parallel(return_as="generator")(
            joblib.delayed(note)(number, runs) for number in range(1000)
        )
        assert [next(values) for _ in range(20)] == list(range(20))
        del values
    until(lambda: other.client.count().held == 0, timeout_s=10.0)


def killed(number: int, folder: Path) -> int:
    """Kill the worker in the first run of one call."""
    note(number, folder)
    if number == 5 and len(list(folder.glob("5-*"))) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_worker_killed_in_a_short_call(
    other: Other, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with plain joblib the call ends; nothing is held, and a rerun waits for no lease."""
    calls = [joblib.delayed(killed)(number, runs) for number in range(COUNT)]
    with short_calls(monkeypatch, "loky") as parallel, pytest.raises(TerminatedWorkerError):
        parallel(calls)
    counted = other.client.count()
    assert (counted.held, counted.expired) == (0, 0)
    with short_calls(monkeypatch, "loky") as parallel:
        assert parallel(calls) == list(range(COUNT))


@pytest.mark.parametrize("broken", ["_look_up", "_make_key", "_take_outcomes", "_settled"])
def test_a_bug_of_ours_ends_the_call(
    broken: str, other: Other, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the dispatcher's steps breaks, its error is raised: nobody waits for ever."""

    def fail(*_: Any) -> None:
        raise ZeroDivisionError(broken)

    with short_calls(monkeypatch) as parallel:
        home = BoundCall if broken == "_make_key" else Dispatcher
        monkeypatch.setattr(home, broken, fail)
        with pytest.raises(ZeroDivisionError, match=broken):
            parallel(joblib.delayed(note)(number, runs) for number in range(8))


def test_an_abort_keeps_what_has_finished(
    other: Other, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short calls that ran, and are not settled yet, are completed before the error is raised."""

    def calls() -> Iterator[Any]:
        monkeypatch.setattr(Settler, "_run", lambda _: None)
        yield from (joblib.delayed(note)(number, runs) for number in range(2))
        until(lambda: len(queued) == 2)
        yield joblib.delayed(note)(threading.Lock(), runs)

    queued: list[int] = []
    put = Settler.put

    def noted_put(self: Settler, ran: Any) -> None:
        put(self, ran)
        queued.extend(range(len(ran)))

    with short_calls(monkeypatch) as parallel:
        monkeypatch.setattr(Settler, "put", noted_put)
        parallel.batch_size = 1
        with pytest.raises(UnkeyableError):
            parallel(calls())
    counted = other.client.count()
    assert (counted.done, counted.held) == (2 + 2, 0)
