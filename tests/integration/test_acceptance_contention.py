"""Eight processes, one list, short leases, failing bodies, busy cores: done once, accepted once."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Final

import pytest

from tests.loop_processes import Workers, busy_cores, workers
from tests.other_client import Other
from tests.servers import ServerProcess

KEYS: Final = 2_000
PROCESSES: Final = 8
LEASE_S: Final = 0.15
PAUSE_S: Final = 0.4
"""A process that is paused for so long has lost its lease."""

LIMIT_S: Final = 240.0


@pytest.mark.timeout(300)
def test_contention(server: ServerProcess, tmp_path: Path) -> None:
    """8 processes x 2,000 keys with a 0.15 s lease, 20 % of bodies failing, every core busy.

    Every key is done, and one completion of it was accepted, not two, whatever a process was told.
    """
    with busy_cores(2), workers(tmp_path / "workers", server.address, LEASE_S) as group:
        for number in range(PROCESSES):
            mode = ["--notify"] if number % 2 else []
            group.start(
                f"--keys={KEYS}",
                "--failing=0.2",
                "--stopping=0.02",
                "--wait",
                f"--seed={number}",
                *mode,
            )
        paused = pause_some(group)
        group.join(30)
    accepted, begun = group.counts("accepted"), group.lines("begun")
    lost, failed = group.counts("lost").total(), group.counts("failed").total()
    figures = (
        f"{len(begun)} begun, {failed} failed, {lost} lost, {paused} pauses, "
        f"{accepted.total()} accepted"
    )
    assert {key for key, count in accepted.items() if count > 1} == set(), figures
    assert len(accepted) == KEYS, figures
    tokens = [token for _, token in begun]
    assert len(set(tokens)) == len(tokens), "a fencing token was given twice"
    other = Other(server.address)
    counted = other.client.count()
    other.client.close()
    assert (counted.done, counted.held, counted.expired, counted.failed) == (KEYS, 0, 0, 0)
    # A run in which nothing went wrong would prove nothing.
    assert failed > KEYS * 0.1, figures
    assert lost >= 1, figures


def pause_some(group: Workers) -> int:
    """Pause one worker after the other for longer than its lease, until all have ended.

    Those that stopped themselves in the midst of a body go on with it.
    """
    rng = random.Random(1)
    deadline_s = time.monotonic() + LIMIT_S
    pauses = 0
    while running := [process for process in group.processes if process.poll() is None]:
        assert time.monotonic() < deadline_s, f"not done in time\n{group.errors()}"
        process = rng.choice(running)
        # Our own children are not waited for meanwhile, so the process id is still theirs.
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(PAUSE_S)
        for stopped in running:
            os.kill(stopped.pid, signal.SIGCONT)
        pauses += 1
        time.sleep(0.1)
    return pauses
