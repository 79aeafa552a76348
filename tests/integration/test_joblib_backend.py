"""The joblib backend against plain joblib, on real servers and real workers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest

import run_once
from run_once.config import load_config
from run_once.errors import ConfigError, ResultError
from run_once.joblib_backend import RunOnceBackend
from run_once.joblib_outcomes import Skipped
from run_once.keys import stored_key
from run_once.task import Session
from tests.parallel_calls import make_parallel, needs_parallel_options

INNERS = ["loky", "threading"]


@pytest.fixture(autouse=True)
def _configured(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN_ONCE_ADDRESS", server.address)


def note(folder: Path, name: object) -> None:
    """Note a run of a body: a file of its own for each."""
    (folder / f"{name}-{os.getpid()}-{threading.get_ident()}-{time.monotonic_ns()}").touch()


def count(folder: Path) -> int:
    """Count the runs."""
    return len(list(folder.iterdir()))


def square(x: int, folder: Path) -> int:
    """Square a number and note it."""
    note(folder, x)
    return x * x


def fail_on_three(x: int, folder: Path) -> int:
    """Raise for 3."""
    note(folder, x)
    if x == 3:
        raise ValueError(f"no {x}")
    return x


def total(array: np.ndarray[Any, Any], x: int) -> float:
    """Sum an array that is large enough to be memory-mapped."""
    return float(array.sum()) + x


def unpicklable(x: int) -> Any:
    """Return what no pickle can hold."""
    return threading.Lock() if x == 1 else x


def nested(x: int) -> list[int]:
    """Call Parallel inside a task."""
    values: list[int] = joblib.Parallel(n_jobs=2)(joblib.delayed(abs)(-x - i) for i in range(3))
    return values


def draw(_x: int) -> bytes:
    """Give a value that no two runs share."""
    return os.urandom(8)


def calls(folder: Path, numbers: range = range(20)) -> Iterator[Any]:
    """Give delayed squares."""
    return (joblib.delayed(square)(x, folder) for x in numbers)


def done_keys() -> int:
    """Count the keys that are done on the server."""
    session = Session.get(load_config())
    return session.client.count(namespace="").done


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_values_come_back_in_order_and_each_call_runs_once(
    inner: str, n_jobs: int, runs: Path
) -> None:
    """Values equal plain joblib's; a second Parallel over the same calls runs nothing."""
    expected = [x * x for x in range(20)]
    for _ in range(2):
        with joblib.parallel_config("run_once", inner=inner, n_jobs=n_jobs):
            assert joblib.Parallel()(calls(runs)) == expected
    assert count(runs) == 20
    assert done_keys() == 20


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_wider_list_runs_only_what_is_new(inner: str, n_jobs: int, runs: Path) -> None:
    """Half warm: known calls are loaded, new ones run, the order is the caller's."""
    parallel = make_parallel(inner=inner, n_jobs=n_jobs)
    parallel(calls(runs, range(10)))
    assert parallel(calls(runs, range(5, 15))) == [x * x for x in range(5, 15)]
    assert count(runs) == 15


@needs_parallel_options
def test_options_reach_the_backend_by_every_way(runs: Path) -> None:
    """parallel_config, parallel_backend, Parallel's arguments and an instance share one table."""
    with joblib.parallel_config("run_once", inner="threading", namespace="n", n_jobs=2):
        joblib.Parallel()(calls(runs))
    with joblib.parallel_backend("run_once", inner="threading", namespace="n", n_jobs=2):
        joblib.Parallel()(calls(runs))
    joblib.Parallel(backend="run_once", inner="threading", namespace="n", n_jobs=2)(calls(runs))
    backend = RunOnceBackend(inner="threading", namespace="n")
    joblib.Parallel(backend=backend, n_jobs=2)(calls(runs))
    assert count(runs) == 20
    joblib.Parallel(backend=backend, n_jobs=2, version=1)(calls(runs))
    assert count(runs) == 40


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_an_exception_keeps_its_type_and_the_others_of_its_batch(
    inner: str, n_jobs: int, runs: Path
) -> None:
    """The original type arrives with the worker's traceback; the rest of the batch is done."""
    parallel = make_parallel(inner=inner, n_jobs=n_jobs, batch_size=6, pre_dispatch="all")
    with pytest.raises(ValueError, match="no 3") as caught:
        parallel(joblib.delayed(fail_on_three)(x, runs) for x in range(6))
    if n_jobs > 1:
        assert "fail_on_three" in str(caught.value.__cause__)
    with pytest.raises(ValueError, match="no 3"):  # claimable at once: it runs, and fails, again
        parallel(joblib.delayed(fail_on_three)(x, runs) for x in range(6))
    ran = Counter(path.name[0] for path in runs.iterdir())
    assert ran["3"] == 2
    if n_jobs > 1:  # joblib makes batches of 0, 1, 2 and 3, 4, 5
        assert (ran["4"], ran["5"]) == (1, 1)
    else:
        assert ran == {"0": 1, "1": 1, "2": 1, "3": 2}


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_value_that_cannot_be_stored_leaves_its_key_not_done(n_jobs: int) -> None:
    """The error says that the key is not done; the other calls of the batch are."""
    parallel = make_parallel(inner="threading", n_jobs=n_jobs, batch_size=4, pre_dispatch="all")
    with pytest.raises(ResultError, match="not done"):
        parallel(joblib.delayed(unpicklable)(x) for x in (0, 1, 2, 3))
    done = {0} if n_jobs == 1 else {0, 2, 3}  # joblib makes batches of 0, 1 and 2, 3
    assert done_keys() in range(1, len(done) + 1)
    assert parallel(joblib.delayed(unpicklable)(x) for x in (0, 2)) == [0, 2]


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_equal_calls_are_different_draws_and_the_same_ones_again(n_jobs: int) -> None:
    """The n-th equal call of one Parallel has a key of its own, the same on every run."""
    parallel = make_parallel(inner="threading", n_jobs=n_jobs)
    first = parallel(joblib.delayed(draw)(0) for _ in range(30))
    assert len(set(first)) == 30
    assert parallel(joblib.delayed(draw)(0) for _ in range(30)) == first


def test_options_come_from_the_environment_too(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not given is configured: here threads, and calls in flight elsewhere are skipped."""
    monkeypatch.setenv("RUN_ONCE_INNER", "threading")
    monkeypatch.setenv("RUN_ONCE_IN_FLIGHT", "skip")
    session, lease = held_elsewhere(1, runs)
    values = joblib.Parallel(n_jobs=2, backend="run_once")(calls(runs, range(2)))
    session.release([lease])
    assert isinstance(values[1], Skipped)
    assert {path.name.split("-")[1] for path in runs.iterdir()} == {str(os.getpid())}


def test_one_job_stays_lazy() -> None:
    """With n_jobs=1 and a generator, nothing runs before it is asked for, as in plain joblib."""
    started: list[int] = []

    def body(x: int) -> int:
        started.append(x)
        return x

    parallel = make_parallel(n_jobs=1, return_as="generator")
    values = parallel(joblib.delayed(body)(x) for x in range(5))
    assert next(values) == 0
    assert started == [0]
    assert list(values) == [1, 2, 3, 4]


@pytest.mark.parametrize("return_as", ["generator", "generator_unordered"])
def test_generators_stream_half_warm(return_as: str, runs: Path) -> None:
    """Known and new calls come through one generator."""
    options = {"inner": "threading", "n_jobs": 2}
    make_parallel(**options)(calls(runs, range(0, 20, 2)))
    values = make_parallel(**options, return_as=return_as)(calls(runs))
    assert sorted(values) == [x * x for x in range(20)]
    assert count(runs) == 20


def test_calls_that_need_shared_memory_are_run_plainly() -> None:
    """require="sharedmem" is neither claimed nor stored."""
    seen: list[int] = []
    with joblib.parallel_config("run_once", inner="loky", n_jobs=2):
        joblib.Parallel(require="sharedmem")(joblib.delayed(seen.append)(x) for x in range(5))
    assert sorted(seen) == list(range(5))
    assert done_keys() == 0


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_nested_calls_are_run_plainly(inner: str, n_jobs: int) -> None:
    """Only the outer calls are claimed."""
    with joblib.parallel_config("run_once", inner=inner, n_jobs=n_jobs):
        values = joblib.Parallel()(joblib.delayed(nested)(x) for x in range(4))
    assert values == [[x, x + 1, x + 2] for x in range(4)]
    assert done_keys() == 4


def test_large_arrays_are_memory_mapped_and_cleaned_up() -> None:
    """Arrays past max_nbytes go to workers as memmaps, as with plain loky; nothing is left."""
    array = np.ones(300_000)
    with joblib.parallel_config("run_once", n_jobs=2, max_nbytes=1000):
        values = joblib.Parallel()(joblib.delayed(total)(array, x) for x in range(4))
    assert values == [300_000.0 + x for x in range(4)]


def held_elsewhere(x: int, folder: Path) -> Any:
    """Claim the key that `square(x, folder)` has, as another machine would."""
    from run_once.call_keys import CallKeyer

    key = stored_key(CallKeyer().key(square, (x, folder), {}))
    session = Session.get(load_config())
    (lease,) = session.claim([key], ttl_s=30).leases
    return session, lease


def test_a_call_in_flight_elsewhere_can_be_skipped(runs: Path) -> None:
    """in_flight="skip" gives a marker in its place at once."""
    session, lease = held_elsewhere(2, runs)
    parallel = make_parallel(inner="threading", n_jobs=2, in_flight="skip")
    values = parallel(calls(runs, range(4)))
    assert [values[0], values[1], values[3]] == [0, 1, 9]
    assert isinstance(values[2], Skipped)
    session.release([lease])


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_call_in_flight_elsewhere_is_waited_for_and_taken_over(n_jobs: int, runs: Path) -> None:
    """Others run meanwhile; when the holder gives the key up, it is run here."""
    session, lease = held_elsewhere(0 if n_jobs > 1 else 3, runs)

    def give_up() -> None:
        deadline_s = time.monotonic() + 30
        while count(runs) < 3 and time.monotonic() < deadline_s:
            time.sleep(0.01)
        session.release([lease])

    thread = threading.Thread(target=give_up)
    thread.start()
    parallel = make_parallel(inner="threading", n_jobs=n_jobs)
    assert parallel(calls(runs, range(4))) == [0, 1, 4, 9]
    thread.join()
    assert count(runs) == 4


SHARED_SCRIPT = """
import sys, time, os, joblib, run_once
from pathlib import Path
def body(x, folder):
    (folder / f"{x}-{os.getpid()}").touch()
    time.sleep(0.02)
    return x * x
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with joblib.parallel_config("run_once", n_jobs=2, lease_s=2):
        values = joblib.Parallel()(joblib.delayed(body)(x, folder) for x in range(60))
    assert values == [x * x for x in range(60)], values
"""


def test_two_processes_share_the_calls(runs: Path, tmp_path: Path) -> None:
    """Each of two scripts gets every value; each call runs in one of them only."""
    script = tmp_path / "shared.py"
    script.write_text(SHARED_SCRIPT)
    command = [sys.executable, str(script), str(runs)]
    processes = [subprocess.Popen(command) for _ in range(2)]
    try:
        assert [process.wait(60) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert count(runs) == 60


def test_a_value_signed_with_another_secret_is_an_error(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is neither loaded nor computed again, and the error says how to get that secret."""
    monkeypatch.setenv("RUN_ONCE_SECRET", "the first secret of them all")
    parallel = make_parallel(inner="threading", n_jobs=2)
    parallel(calls(runs, range(3)))
    monkeypatch.setenv("RUN_ONCE_SECRET", "quite another secret than that")
    with pytest.raises(run_once.SignatureError, match=r"secret --show` there.*run-once reset"):
        parallel(calls(runs, range(3)))
    assert count(runs) == 3


def test_a_server_that_is_gone_is_an_error_in_bounded_time(
    server: Any, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is ours and names the server; nothing hangs."""
    server.kill()
    monkeypatch.setenv("RUN_ONCE_RETRY_S", "0.5")
    parallel = make_parallel(inner="threading", n_jobs=2)
    with pytest.raises(run_once.ServerUnavailableError, match=server.address):
        parallel(calls(runs, range(3)))
    assert count(runs) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"in_flight": "maybe"}, "in_flight='maybe'"),
        ({"inner": "lokey"}, "inner='lokey'"),
        ({"inner": "run_once"}, "another one"),
        ({"inner": "threading", "in_flght": "skip"}, "did you mean in_flight"),
        ({"inner": "loky", "max_attempt": 3}, "did you mean max_attempts"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    """The error names the option and the value."""
    with pytest.raises(ConfigError, match=words):
        RunOnceBackend(**options)
