"""Several processes share one loop; some are killed, some are told to end, one server restarts."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distlock_proto import lock_table_pb2 as pb
from tests.loop_processes import Workers, workers
from tests.other_client import Other, until
from tests.servers import ServerProcess

KEYS = 300
MAX_UNSETTLED = 40
"""Bodies of 10 ms are settled within 100 ms; a busy machine takes longer."""

LEASE_S = 3.0
RESTART_LEASE_S = 8.0
"""No lease may run out while a busy machine restarts the server and its clients come back."""


@pytest.fixture
def other(server: ServerProcess) -> Iterator[Other]:
    """Give another process's client."""
    made = Other(server.address)
    yield made
    made.client.close()


def check(group: Workers, other: Other, *, repeated: set[str]) -> None:
    """Check that all keys are done, none was accepted twice, and only some were begun twice."""
    accepted, begun = group.counts("accepted"), group.counts("begun")
    assert max(accepted.values()) == 1
    assert other.client.count().done == KEYS
    assert set(begun) == {f"key-{number}" for number in range(KEYS)}
    assert {key for key, count in begun.items() if count > 1} <= repeated


@pytest.mark.parametrize("mode", [[], ["--notify"]], ids=["settling", "notifying"])
def test_one_is_killed(
    server: ServerProcess, other: Other, tmp_path: Path, mode: list[str]
) -> None:
    """Three processes, one killed half way: the union is complete, nothing is accepted twice.

    Only what the killed one was working on is begun again. A rerun finds everything done.
    """
    with workers(tmp_path / "workers", server.address, LEASE_S) as group:
        arguments = [f"--keys={KEYS}", "--once", "--wait", "--body-s=0.01", *mode]
        for _ in range(3):
            group.start(*arguments)
        until(lambda: group.counts("begun").total() > KEYS // 2)
        group.processes[0].kill()
        group.processes[0].wait()
        lines = [line.split() for line in (group.folder / "worker-0.log").read_text().splitlines()]
        begun_by_killed = [words[1] for words in lines if words[0] == "begun"]
        accepted = {words[1] for words in lines if words[0] == "accepted"}
        assert 0 < len(begun_by_killed) < KEYS
        group.join(60)
        # What it was at, and the last ones before, whose completion may not have gone out.
        unsettled = [key for key in begun_by_killed if key not in accepted]
        assert unsettled == begun_by_killed[len(begun_by_killed) - len(unsettled) :]
        assert len(unsettled) < MAX_UNSETTLED
        check(group, other, repeated=set(unsettled))
        begun = group.counts("begun").total()
        group.start(*arguments)
        group.join(60)
        assert group.counts("begun").total() == begun


def test_the_server_is_killed(server: ServerProcess, other: Other, tmp_path: Path) -> None:
    """A server that is killed and started again in the midst costs nothing that was accepted."""
    with workers(tmp_path / "workers", server.address, RESTART_LEASE_S) as group:
        for _ in range(2):
            group.start(f"--keys={KEYS}", "--once", "--wait", "--body-s=0.01", "--notify")
        until(lambda: group.counts("accepted").total() > KEYS // 3)
        before = set(group.counts("accepted"))
        server.restart()
        assert set(other.states(*before)) == {pb.KEY_STATE_DONE}
        group.join(90)
        check(group, other, repeated=set())


PROGRAM = """
import signal, sys, time
from run_once import DistributedIterator
if sys.argv[1] == "handled":
    def handler(number, frame):
        print("handled", flush=True)
        raise SystemExit(3)
    signal.signal(signal.SIGTERM, handler)
if sys.argv[1] == "ignored":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
before = signal.getsignal(signal.SIGTERM)
for key in DistributedIterator(["a", "b"]):
    if key == "b":
        print("working", flush=True)
        for _ in range(int(sys.argv[2]) * 50):
            time.sleep(0.02)
assert signal.getsignal(signal.SIGTERM) == before
print("ended", flush=True)
"""


@pytest.mark.parametrize(
    ("kind", "seconds", "status", "state"),
    [
        ("default", 60, -signal.SIGTERM, pb.KEY_STATE_ABSENT),
        ("handled", 60, 3, pb.KEY_STATE_ABSENT),
        ("ignored", 1, 0, pb.KEY_STATE_DONE),
    ],
)
def test_sigterm(
    server: ServerProcess,
    other: Other,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    seconds: int,
    status: int,
    state: int,
) -> None:
    """SIGTERM gives the item back at once and then ends the process as it would have anyway.

    A handler of the program's own does what it did; so does a program that ignores the signal.
    """
    monkeypatch.setenv("RUN_ONCE_ADDRESS", server.address)
    process = start(PROGRAM, kind, str(seconds))
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == status, process.stdout.read()
        assert other.states("a", "b") == [pb.KEY_STATE_DONE, state]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("program", "state"),
    [
        ("loop = iter(it); next(loop); raise RuntimeError", pb.KEY_STATE_ABSENT),
        ("loop = iter(it); next(loop); import sys; sys.exit(1)", pb.KEY_STATE_ABSENT),
        ("loop = iter(it); next(loop); keep = loop", pb.KEY_STATE_ABSENT),
        ("[key for key in it]", pb.KEY_STATE_DONE),
    ],
)
def test_the_end_of_the_process_gives_back(
    server: ServerProcess, other: Other, monkeypatch: pytest.MonkeyPatch, program: str, state: int
) -> None:
    """However a program ends, what its loops still hold is given back."""
    monkeypatch.setenv("RUN_ONCE_ADDRESS", server.address)
    started_s = time.monotonic()
    process = start(f"from run_once import DistributedIterator as D; it = D(['a']); {program}")
    text, _ = process.communicate(timeout=60)
    assert time.monotonic() - started_s < 30
    assert other.states("a") == [state], text


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a program."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
