"""The server crashes between any two steps of a commit, an upload, its start and its end.

Each crash is a power cut as well: what was not synced by then is gone. What must hold after the
restart is what must hold after any crash; the history of all lives is checked.
"""

from __future__ import annotations

import random
import re
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

import distlock_server
from distlock_server.failpoints import POINTS, VARIABLE
from tests.faults.crashes import (
    Load,
    Rig,
    check_after_restart,
    check_next_life,
    crash_at,
    lose_power,
)
from tests.faults.traffic import Profile

PROFILES: Final = {
    "contended": Profile(n_clients=6, n_keys=6, fresh=0.1, large=0.3),
    "fresh keys": Profile(n_clients=4, fresh=0.9, n_at_once=6, large=0.3),
    "short leases": Profile(n_clients=4, n_keys=12, fresh=0.2, large=0.3, ttl_ns=2_000_000),
}
UNDER_LOAD: Final = [point for point in POINTS if not point.startswith(("start.", "end."))]


def test_every_point_is_in_the_code_once() -> None:
    """The list of points is that of the calls in the server's source."""
    folder = Path(distlock_server.__file__).parent
    source = "".join(file.read_text(encoding="utf-8") for file in folder.rglob("*.py"))
    assert sorted(re.findall(r'reach\("([a-z_.]+)"\)', source)) == sorted(POINTS)
    assert len(POINTS) >= 20


@pytest.mark.parametrize("profile", PROFILES)
def test_crashes_at_every_point(
    profile: str, shim: Path, tmp_path: Path, cleanup: ExitStack, report: Callable[[str], None]
) -> None:
    """Wherever the server crashes, nothing acknowledged is lost and nothing is half there."""
    rig = Rig(tmp_path, shim)
    cleanup.callback(rig.server.close)
    rng = random.Random(profile)
    n_ops = 0
    for point in UNDER_LOAD:
        # The check before the load passes the points of a group a few times.
        number = rng.randint(1, 3) if point.startswith("upload.") else rng.randint(12, 60)
        n_ops += crash_at(rig, point, number, PROFILES[profile], rng)
    check_next_life(rig)
    checked = rig.recorder.check()
    report(
        f"crashes at {len(UNDER_LOAD)} points ({profile}): {n_ops} operations, "
        f"{checked.n_takeovers} leases taken over, 0 acknowledged lost"
    )


@pytest.mark.parametrize("point", [point for point in POINTS if point.startswith("start.")])
def test_crash_at_the_start(point: str, shim: Path, tmp_path: Path, cleanup: ExitStack) -> None:
    """A server that crashes while it makes or opens its database starts well the next time."""
    rig = Rig(tmp_path, shim)
    cleanup.callback(rig.server.close)
    rng = random.Random(point)
    for _ in range(2):  # a new database, and one that is there
        rig.server.environment = rig.power.environment() | {VARIABLE: f"{point}:1"}
        with pytest.raises(AssertionError, match="did not start"):
            rig.server.start()
        rig.power.apply(rng)
        rig.server.environment = {}
        token = rig.recorder.max_token
        rig.server.start()
        load = Load(rig.server, rig.recorder, PROFILES["fresh keys"], rng)
        rig.recorder.await_ops(30)
        load.stop()
        check_after_restart(rig.server, rig.recorder, token)
        rig.server.terminate()


@pytest.mark.parametrize("point", [point for point in POINTS if point.startswith("end.")])
def test_crash_at_the_end(point: str, shim: Path, tmp_path: Path, cleanup: ExitStack) -> None:
    """A server that crashes while it shuts down has lost nothing."""
    rig = Rig(tmp_path, shim)
    cleanup.callback(rig.server.close)
    rng = random.Random(point)
    rig.server.environment = rig.power.environment() | {VARIABLE: f"{point}:1"}
    rig.server.start()
    load = Load(rig.server, rig.recorder, PROFILES["short leases"], rng)
    rig.recorder.await_ops(60)
    assert rig.server.terminate() == -signal.SIGKILL
    lose_power(rig, load, rng)
    check_next_life(rig)
