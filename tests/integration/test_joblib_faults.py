"""The joblib backend when workers, parents and servers die, and when its users are careless."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from joblib.externals.loky.process_executor import TerminatedWorkerError

import run_once
from run_once.config import load_config
from run_once.errors import ConfigError, ExhaustedError
from run_once.joblib_backend import RunOnceBackend
from run_once.task import Session
from tests.parallel_calls import make_parallel, needs_parallel_options
from tests.servers import ServerProcess

ENOUGH_S = 60.0
"""A lease that would show: nothing here may wait for it."""

SCRIPT = """
import sys, time
from pathlib import Path
import joblib, run_once

def body(x, folder, pause_s):
    Path(folder, f"{x}-{time.monotonic_ns()}").touch()
    time.sleep(pause_s)
    return x

if __name__ == "__main__":
    n_jobs, inner, folder, pause_s = sys.argv[1:]
    with joblib.parallel_config("run_once", inner=inner, n_jobs=int(n_jobs), lease_s=60):
        calls = (joblib.delayed(body)(x, folder, float(pause_s)) for x in range(6))
        print(joblib.Parallel(batch_size=1)(calls))
"""


@pytest.fixture(autouse=True)
def _configured(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN_ONCE_ADDRESS", server.address)


@pytest.fixture
def start_script(tmp_path: Path, runs: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Give a function that starts the script; what is left of it is killed with its workers."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    started: list[subprocess.Popen[str]] = []

    def start(n_jobs: int, inner: str, pause_s: float) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, path, str(n_jobs), inner, runs, str(pause_s)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(condition: Callable[[], bool], timeout_s: float = 40.0) -> None:
    """Return once a condition holds."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.02)


def count(folder: Path) -> int:
    """Count the runs."""
    return len(list(folder.iterdir()))


def held_keys() -> int:
    """Count the keys that are held on the server."""
    return Session.get(load_config()).client.count(namespace="").held


def stored_keys() -> list[str]:
    """List the keys that the server knows."""
    return [info.key.decode() for info in Session.get(load_config()).client.list()]


def note(x: int, folder: Path, pause_s: float = 0.0) -> int:
    """Note a run, take a while, and give the argument back."""
    (folder / f"{x}-{time.monotonic_ns()}").touch()
    time.sleep(pause_s)
    return x


def die_once(x: int, folder: Path, signal_number: int) -> int:
    """Kill the worker in the first run of call 3."""
    is_first = not list(folder.glob("3-*"))
    note(x, folder)
    if x == 3 and is_first:
        if signal_number:
            os.kill(os.getpid(), signal_number)
        os._exit(3)
    return x


class FinickyError(Exception):
    """An exception that pickle takes, and cannot make again."""

    def __init__(self, first: int, _second: int) -> None:
        """Take more than the message."""
        super().__init__(f"finicky {first}")


class LockedError(Exception):
    """An exception that no pickle can hold, and whose text cannot be had either."""

    def __init__(self) -> None:
        """Keep a lock."""
        super().__init__("locked")
        self.lock = threading.Lock()

    def __str__(self) -> str:
        """Fail."""
        raise TypeError("no text")


def fail(kind: str) -> None:
    """Raise one of them, or a plain error."""
    if kind == "finicky":
        raise FinickyError(1, 2)
    if kind == "locked":
        raise LockedError
    raise ValueError(kind)


def name_thread(_x: int) -> str:
    """Tell which process runs the call."""
    return f"{os.getpid()}"


def nested_with_options(x: int) -> list[int]:
    """Call Parallel with options of run_once inside a task."""
    parallel = joblib.Parallel(n_jobs=2, backend="run_once", inner="threading", namespace="nested")
    values: list[int] = parallel(joblib.delayed(abs)(-x - i) for i in range(3))
    return values


@pytest.mark.parametrize("signal_number", [0, signal.SIGKILL], ids=["os._exit", "SIGKILL"])
def test_keys_of_a_killed_worker_are_free_at_once(signal_number: int, runs: Path) -> None:
    """As with plain joblib the call ends with TerminatedWorkerError; a rerun waits for no lease."""
    calls = [joblib.delayed(die_once)(x, runs, signal_number) for x in range(8)]
    with joblib.parallel_config("run_once", n_jobs=2, lease_s=ENOUGH_S):
        with pytest.raises(TerminatedWorkerError):
            joblib.Parallel()(calls)
        assert held_keys() == 0
        begin_s = time.monotonic()
        assert joblib.Parallel()(calls) == list(range(8))
    assert time.monotonic() - begin_s < ENOUGH_S / 2


@pytest.mark.parametrize(("n_jobs", "inner"), [(2, "loky"), (2, "threading"), (1, "loky")])
def test_ctrl_c_frees_what_was_in_flight(
    n_jobs: int, inner: str, runs: Path, start_script: Callable[..., subprocess.Popen[str]]
) -> None:
    """After SIGINT to the parent alone it ends soon, and no key waits for its lease."""
    script = start_script(n_jobs, inner, 5.0)
    wait_for(lambda: count(runs) == n_jobs)
    script.send_signal(signal.SIGINT)
    _, stderr = script.communicate(timeout=ENOUGH_S / 2)
    assert script.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in stderr
    assert held_keys() == 0


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_ctrl_c_does_not_wait_for_a_server_that_is_gone(
    n_jobs: int,
    runs: Path,
    server: ServerProcess,
    start_script: Callable[..., subprocess.Popen[str]],
) -> None:
    """Freeing keys is tried for a short while only, not for the two minutes of other requests."""
    script = start_script(n_jobs, "loky", 30.0)
    wait_for(lambda: count(runs) == n_jobs)
    server.kill()
    script.send_signal(signal.SIGINT)
    script.communicate(timeout=30)
    assert script.returncode == -signal.SIGINT


def test_a_server_that_is_killed_and_restarted_costs_nothing(
    runs: Path, server: ServerProcess, start_script: Callable[..., subprocess.Popen[str]]
) -> None:
    """Calls in flight are completed once the server is back; each ran once."""
    script = start_script(2, "loky", 0.5)
    wait_for(lambda: count(runs) >= 2)
    server.kill()
    server.start()
    stdout, stderr = script.communicate(timeout=ENOUGH_S)
    assert stdout.strip() == "[0, 1, 2, 3, 4, 5]", stderr
    assert count(runs) == 6
    assert held_keys() == 0


@pytest.mark.parametrize("inner", ["loky", "threading"])
def test_a_generator_thrown_away_leaves_the_next_call_alone(inner: str, runs: Path) -> None:
    """The same Parallel gives the right values after it, and no key is numbered by mistake."""
    parallel = make_parallel(inner=inner, n_jobs=2, return_as="generator", lease_s=ENOUGH_S)
    for _ in range(6):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            generator = parallel(joblib.delayed(note)(x, runs, 0.01) for x in range(20))
            next(generator)
            generator.close()
        assert list(parallel(joblib.delayed(note)(x, runs) for x in range(20))) == list(range(20))
        Session.get(load_config()).client.reset([key.encode() for key in stored_keys()], 1 << 60)
    assert list(parallel(joblib.delayed(note)(x, runs) for x in range(20))) == list(range(20))
    assert not [key for key in stored_keys() if "#" in key]
    assert held_keys() == 0


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_an_exhausted_key_raises_with_the_last_traceback(n_jobs: int) -> None:
    """max_attempts ends in ExhaustedError, not in asking for ever."""
    parallel = make_parallel(inner="threading", n_jobs=n_jobs, max_attempts=1, timeout=ENOUGH_S)
    with pytest.raises(ValueError, match="plain"):
        parallel([joblib.delayed(fail)("plain")])
    with pytest.raises(ExhaustedError, match="max_attempts=1") as caught:
        parallel([joblib.delayed(fail)("plain")])
    assert "ValueError: plain" in str(caught.value.__cause__)


@pytest.mark.parametrize(
    ("kind", "error"), [("finicky", FinickyError), ("locked", LockedError), ("plain", ValueError)]
)
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_an_exception_that_stays_in_its_process_keeps_its_type(
    n_jobs: int, kind: str, error: type[Exception]
) -> None:
    """With n_jobs=1 or threads nothing is pickled, so any exception arrives as it was raised."""
    parallel = make_parallel(inner="threading", n_jobs=n_jobs)
    with pytest.raises(error):
        parallel([joblib.delayed(fail)(kind)])


@pytest.mark.parametrize("kind", ["finicky", "locked"])
def test_an_exception_that_cannot_travel_is_told_as_text(kind: str) -> None:
    """A worker process survives it; the error names the type and shows the traceback."""
    parallel = make_parallel(n_jobs=2)
    with pytest.raises(RuntimeError, match=f"{kind.title()}Error") as caught:
        parallel([joblib.delayed(fail)(kind), joblib.delayed(fail)(kind)])
    assert "in fail" in str(caught.value.__cause__)
    assert parallel(joblib.delayed(abs)(x) for x in range(3)) == [0, 1, 2]


@needs_parallel_options
def test_inner_may_be_given_to_parallel_itself() -> None:
    """Parallel(backend="run_once", inner="threading") runs in threads, not in loky's processes."""
    calls = [joblib.delayed(name_thread)(x) for x in range(4)]
    here = {str(os.getpid())}
    assert set(joblib.Parallel(n_jobs=2, backend="run_once", inner="threading")(calls)) == here
    instance = RunOnceBackend()
    parallel = joblib.Parallel(n_jobs=2, backend=instance, inner="threading", version=1)
    assert set(parallel(calls)) == here
    with pytest.raises(ValueError, match="return_as"):
        joblib.Parallel(
            n_jobs=2, backend="run_once", inner="multiprocessing", return_as="generator"
        )(calls)


@needs_parallel_options
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_nested_calls_may_name_our_options(n_jobs: int) -> None:
    """Inside a task they are run plainly, by a backend that does not know these options."""
    parallel = make_parallel(inner="threading", n_jobs=n_jobs)
    expected = [[x, x + 1, x + 2] for x in range(3)]
    assert parallel(joblib.delayed(nested_with_options)(x) for x in range(3)) == expected
    assert not [key for key in stored_keys() if "nested\x1f" in key]


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_an_array_changed_between_two_calls_has_another_key(n_jobs: int) -> None:
    """Also within one `with Parallel()`, and where a sample of the array shows no change."""
    array = np.arange(200_000.0)
    with make_parallel(inner="threading", n_jobs=n_jobs) as parallel:
        (before,) = parallel([joblib.delayed(np.sum)(array)])
        array[12_345] += 1
        (after,) = parallel([joblib.delayed(np.sum)(array)])
    assert after == before + 1


@pytest.mark.parametrize(
    "option",
    [{"version": "1"}, {"version": -1}, {"ignore": "x"}, {"key": "x"}, {"max_attempts": -1}],
)
def test_an_option_that_cannot_be_is_refused_at_once(option: dict[str, Any]) -> None:
    """The message names it."""
    (name,) = option
    with pytest.raises(ConfigError, match=name):
        RunOnceBackend(**option)


def test_a_key_that_becomes_busy_late_is_noticed_soon(runs: Path) -> None:
    """A key freed during the long poll for another key is run before that poll would end."""
    session = Session.get(load_config())
    backend = RunOnceBackend(inner="threading", key=lambda x, *_: f"k{x}")
    name = f"{note.__module__}.note"
    leases = session.claim([f"{name}/k{x}".encode() for x in (0, 1)], ttl_s=ENOUGH_S).leases
    assert len(leases) == 2
    generator = joblib.Parallel(n_jobs=2, backend=backend, return_as="generator_unordered")(
        joblib.delayed(note)(x, runs) for x in (0, 1)
    )
    session.release([leases[1]])
    assert next(generator) == 1
    session.release([leases[0]])
    assert next(generator) == 0
    assert run_once.__name__ == "run_once"
