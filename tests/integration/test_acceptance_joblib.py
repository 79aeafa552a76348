"""Several processes run the same joblib program, and are killed: nothing runs without a reason.

A run may be repeated only if it was in flight, or finished and not yet acknowledged, when its
process was killed. What the killed process had acknowledged is asked of the server behind the kill.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from distlock_proto import lock_table_pb2 as pb
from tests.other_client import Other, until
from tests.servers import ServerProcess

SCRIPT: Final = Path(__file__).parent.parent / "joblib_script.py"
LEASE_S: Final = 8.0
"""Long enough not to be lost on a busy machine, short enough to wait for after a kill."""

COUNT: Final = 1_000
PAUSE: Final = "--pause-s=0.03"
LABELS: Final = "ABCD"
LIMIT_S: Final = 150.0


class Run(NamedTuple):
    """A body that started."""

    label: str
    pid: int
    name: str


class Programs:
    """Processes of the script, each in a session of its own with its workers."""

    def __init__(self, folder: Path, server: ServerProcess) -> None:
        """Prepare."""
        self.folder = folder
        self.events = folder / "events"
        self.events.touch()
        self._server = server
        self._other = Other(server.address)
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, what: str, label: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start the script under a label."""
        with (self.folder / f"{label}.err").open("ab") as errors:
            process = subprocess.Popen(
                [
                    sys.executable,
                    str(SCRIPT),
                    what,
                    f"--label={label}",
                    f"--events={self.events}",
                    f"--out={self.folder / label}.json",
                    *arguments,
                ],
                env={
                    **os.environ,
                    "RUN_ONCE_ADDRESS": self._server.address,
                    "RUN_ONCE_LEASE_S": str(LEASE_S),
                    "RUN_ONCE_OWNER": label,
                },
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def runs(self) -> list[Run]:
        """Give the bodies that have started so far."""
        lines = self.events.read_text().splitlines()
        return [Run(label, int(pid), name) for label, pid, name in map(str.split, lines)]

    def until_runs(self, count: int, label: str = LABELS) -> None:
        """Wait for so many runs under these labels."""
        until(lambda: sum(run.label in label for run in self.runs()) >= count, LIMIT_S)

    def values(self, label: str) -> list[float]:
        """Give what the program of a label wrote."""
        values: list[float] = json.loads((self.folder / f"{label}.json").read_text())
        return values

    def done(self) -> int:
        """Count the done keys."""
        return self._other.client.count().done

    def not_kept(self, label: str) -> int:
        """Count the runs of a label whose completion the server has not accepted."""
        owners = Counter(
            info.owner for info in self._other.client.list() if info.state == pb.KEY_STATE_DONE
        )
        return sum(run.label == label for run in self.runs()) - owners[label]

    def errors(self) -> str:
        """Give what the programs wrote to standard error."""
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}"
            for path in sorted(self.folder.glob("*.err"))
        )

    def close(self) -> None:
        """Kill what still runs, workers included."""
        for process in self._processes:
            kill_session(process)
        self._other.client.close()


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """Kill a program with its workers, as a power cut would."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
    until(lambda: not _session_lives(process.pid))


def _session_lives(session: int) -> bool:
    try:
        os.killpg(session, 0)
    except ProcessLookupError:
        return False
    return True


def worker_of(parent: subprocess.Popen[bytes], programs: Programs, label: str) -> int:
    """Give a worker process of a program, one that has run something."""
    pids = {run.pid for run in programs.runs() if run.label == label}
    for pid in pids:
        status = Path(f"/proc/{pid}/status")
        if status.exists() and f"PPid:\t{parent.pid}\n" in status.read_text():
            return pid
    raise AssertionError(f"program {label} has no worker")


@pytest.fixture
def programs(tmp_path: Path, server: ServerProcess) -> Iterator[Programs]:
    """Give a group of programs, all ended whatever happens."""
    made = Programs(tmp_path, server)
    yield made
    made.close()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="finds workers in /proc")
@pytest.mark.timeout(400)
def test_kills(programs: Programs, server: ServerProcess, report: Callable[[str], None]) -> None:
    """Four processes, the same 1,000 calls; a worker, a parent and the server are killed.

    Bodies begun equal distinct keys plus those cut off; everyone gets every value in order.
    """
    rng = random.Random()
    started = {label: programs.start("calls", label, PAUSE) for label in LABELS}
    programs.until_runs(rng.randint(100, 250))
    programs.until_runs(1, "A")
    os.kill(worker_of(started["A"], programs, "A"), signal.SIGKILL)
    programs.until_runs(rng.randint(300, 450))
    server.restart()
    programs.until_runs(rng.randint(500, 650))
    programs.until_runs(1, "B")
    kill_session(started["B"])
    cut_off = programs.not_kept("B")
    assert started["A"].wait(LIMIT_S) == 1, "joblib ends a call whose worker was killed"
    assert "TerminatedWorkerError" in programs.errors()
    kill_session(started["A"])
    cut_off += programs.not_kept("A")
    again = {label: programs.start("calls", label, PAUSE) for label in ("A2", "B2")}
    for label in ("C", "D"):
        assert started[label].wait(LIMIT_S) == 0, programs.errors()
    for process in again.values():
        assert process.wait(LIMIT_S) == 0, programs.errors()
    runs = Counter(run.name for run in programs.runs())
    figures = f"{runs.total()} begun of {COUNT} keys, {cut_off} cut off by the kills"
    assert len(runs) == COUNT, figures
    assert runs.total() == COUNT + cut_off, figures
    for label in ("A2", "B2", "C", "D"):
        assert programs.values(label) == [x * x for x in range(COUNT)]
    assert programs.done() == COUNT
    report(figures)


@pytest.mark.timeout(300)
def test_wider_grid(programs: Programs, report: Callable[[str], None]) -> None:
    """A grid search is killed at 60 %; another process with a wider grid computes what is new."""
    narrow, wide, folds = 6, 9, 5
    first = programs.start("search", "A", f"--width={narrow}")
    programs.until_runs(int(0.6 * narrow * folds))
    kill_session(first)
    cut_off = programs.not_kept("A")
    kept = programs.done()
    begun = len(programs.runs())
    assert 0 < kept < narrow * folds, "it was not killed in the midst"
    assert kept == begun - cut_off
    second = programs.start("search", "B", f"--width={wide}")
    assert second.wait(LIMIT_S) == 0, programs.errors()
    plain = programs.start("search", "P", f"--width={wide}", "--plain")
    assert plain.wait(LIMIT_S) == 0, programs.errors()
    computed = sum(run.label == "B" for run in programs.runs())
    figures = f"{begun} fits begun, {cut_off} cut off, {computed} of {wide * folds} computed anew"
    assert computed == wide * folds - kept, figures
    assert programs.values("B") == programs.values("P")
    report(figures)
