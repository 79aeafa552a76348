"""Power cuts of a real server under load: what was acknowledged stays.

Every run states its seed; `FAULT_SEED` repeats it. A run that could not fail is void and fails: too
few operations before a cut, or nothing unsynced dropped. The control, in which syncing does
nothing, must lose data.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Final

import grpc
import pytest

from tests.faults.crashes import (
    Load,
    Rig,
    check_after_restart,
    check_next_life,
    cut_power,
    lose_power,
)
from tests.faults.history import ViolationError
from tests.faults.traffic import Profile

N_CUTS: Final = 10
N_DATABASES: Final = 3
MIN_CUTS_THAT_DROPPED: Final = 8

PROFILES: Final = (
    Profile(),
    Profile(n_clients=8, n_keys=10, fresh=0.1),
    Profile(fresh=0.8, n_at_once=8, large=0.2),
    # Fills a log of LevelDB every few hundred completions: new files come and go.
    Profile(value_bytes=45_000, fresh=0.6),
)


@dataclass
class Figures:
    """What a run did."""

    n_cuts: int = 0
    n_ops: int = 0
    n_bytes: int = 0
    n_dropped: int = 0
    n_names: int = 0
    n_torn: int = 0

    def __add__(self, other: Figures) -> Figures:
        """Sum up."""
        return Figures(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def line(self, seed: int) -> str:
        """Say it."""
        return (
            f"{self.n_cuts} power cuts (seed {seed}): {self.n_ops} operations, 0 acknowledged "
            f"lost; dropped {self.n_bytes} unsynced bytes in {self.n_dropped} cuts, {self.n_names} "
            f"names, {self.n_torn} torn files"
        )


def run_cuts(rig: Rig, seed: int, n_cuts: int) -> Figures:
    """Cut the power so often."""
    rng = random.Random(seed)
    figures = Figures()
    for number in range(n_cuts):
        profile = PROFILES[number % len(PROFILES)]
        dropped, n_ops = cut_power(rig.server, rig.power, rig.recorder, profile, rng)
        try:
            check_next_life(rig)
        except (AssertionError, ViolationError) as error:
            raise AssertionError(f"FAULT_SEED={seed}, cut {number}: {error}") from error
        rig.server.kill()
        figures += Figures(
            1, n_ops, dropped.n_bytes, dropped.n_bytes > 0, dropped.n_names, dropped.n_torn
        )
    return figures


def test_power_cuts_lose_nothing(
    tmp_path: Path, shim: Path, seed: int, cleanup: ExitStack, report: Callable[[str], None]
) -> None:
    """After each power cut every acknowledged change is there, the others wholly or not at all.

    Tokens grow over all cuts, no completion is accepted twice, the counters agree with the keys.
    """
    figures = Figures()
    for number in range(N_DATABASES):
        rig = Rig(tmp_path / str(number), shim)
        cleanup.callback(rig.server.close)
        figures += run_cuts(rig, seed + number, N_CUTS)
    assert figures.n_dropped >= MIN_CUTS_THAT_DROPPED, "hardly any cut dropped anything: void"
    report(figures.line(seed))


def test_control_without_syncs_loses(
    tmp_path: Path, shim: Path, seed: int, cleanup: ExitStack, report: Callable[[str], None]
) -> None:
    """The control: where syncs do nothing, a power cut loses what was acknowledged."""
    rig = Rig(tmp_path, shim)
    cleanup.callback(rig.server.close)
    rng = random.Random(seed)

    def lie(load: Load) -> None:
        rig.recorder.await_ops(60)
        rig.power.lie.touch()

    dropped, _ = cut_power(
        rig.server, rig.power, rig.recorder, Profile(), rng, lie, is_control=True
    )
    assert dropped.n_bytes > 0
    rig.server.start()
    with pytest.raises((ViolationError, AssertionError, grpc.RpcError)) as found:
        check_after_restart(rig.server, rig.recorder, rig.recorder.max_token)
    report(f"control without syncs (seed {seed}): {str(found.value)[:100]}")


def test_power_cuts_of_rocksdb(
    tmp_path: Path, shim: Path, seed: int, cleanup: ExitStack, report: Callable[[str], None]
) -> None:
    """The same holds for the other engine."""
    pytest.importorskip("rocksdict")
    rig = Rig(tmp_path, shim, "--engine=rocksdb")
    cleanup.callback(rig.server.close)
    report(f"rocksdb: {run_cuts(rig, seed, 4).line(seed)}")


def test_disk_error_ends_the_server(
    tmp_path: Path, shim: Path, seed: int, cleanup: ExitStack
) -> None:
    """A sync that fails ends the server with a sentence, and nothing acknowledged is lost.

    What was being written may or may not be there; no reply said that it was.
    """
    rig = Rig(tmp_path, shim)
    cleanup.callback(rig.server.close)
    fail_sync(rig, random.Random(seed))
    assert "distlock: the storage failed, and the server must end" in rig.server.log
    assert "Input/output error" in rig.server.log


def fail_sync(rig: Rig, rng: random.Random) -> int:
    """Let syncs fail under load; check the next life; count the operations before."""
    rig.server.environment = rig.power.environment()
    rig.server.start()
    load = Load(rig.server, rig.recorder, rng.choice(PROFILES), rng)
    rig.recorder.await_ops(rng.randint(50, 300))
    rig.power.eio.touch()
    assert rig.server.wait(30) == 1
    n_ops = lose_power(rig, load, rng)
    check_next_life(rig)
    rig.server.kill()
    return n_ops
