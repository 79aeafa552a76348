"""`make soak`: as many faults as fit into the time, with a table of what was tried and found.

`FAULT_SOAK_S` bounds the time over all parts (an hour). The figures of all runs add up in
`.faults/totals.json` of the working copy, or in the file that `FAULT_TOTALS` names. `FAULT_SEED`
repeats a run.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from tests.faults.crashes import Rig, check_after_restart
from tests.faults.test_corruption import Written, flip_often
from tests.faults.test_failpoints import PROFILES as CRASH_PROFILES
from tests.faults.test_failpoints import UNDER_LOAD, crash_at
from tests.faults.test_power_cuts import fail_sync, run_cuts

ROOT: Final = Path(__file__).parents[2]
LIVES_OF_A_DATABASE: Final = 12


class Soak(NamedTuple):
    """What a part is given."""

    tmp_path: Path
    shim: Path
    rng: random.Random


Part = Callable[[Soak, Rig, int], Counter[str]]


def _cuts(soak: Soak, rig: Rig, seed: int) -> Counter[str]:
    figures = run_cuts(rig, seed, LIVES_OF_A_DATABASE)
    return Counter(
        tried=figures.n_cuts,
        operations=figures.n_ops,
        noticed=figures.n_dropped,
    )


def _crashes(soak: Soak, rig: Rig, seed: int) -> Counter[str]:
    rng = random.Random(seed)
    n_ops = 0
    for point in rng.sample(UNDER_LOAD, LIVES_OF_A_DATABASE):
        number = rng.randint(1, 6) if point.startswith("upload.") else rng.randint(12, 120)
        profile = rng.choice(list(CRASH_PROFILES.values()))
        n_ops += crash_at(rig, point, number, profile, rng)
    rig.server.environment = {}
    token = rig.recorder.max_token
    rig.server.start()
    check_after_restart(rig.server, rig.recorder, token)
    return Counter(tried=LIVES_OF_A_DATABASE, operations=n_ops, noticed=LIVES_OF_A_DATABASE)


def _errors(soak: Soak, rig: Rig, seed: int) -> Counter[str]:
    rng = random.Random(seed)
    n_ops = sum(fail_sync(rig, rng) for _ in range(4))
    return Counter(tried=4, operations=n_ops, noticed=4)


def _flips(kind: str) -> Part:
    def flips(soak: Soak, rig: Rig, seed: int) -> Counter[str]:
        rng = random.Random(seed)
        folder = soak.tmp_path / f"flips-{seed}"
        outcomes = flip_often(Written(folder, kind, rng), folder, rng, 100)
        noticed = outcomes["noticed"] + outcomes["does not open"]
        return Counter(tried=100, operations=0, noticed=noticed)

    return flips


PARTS: Final[dict[str, tuple[float, str, Part]]] = {
    "power cuts, leveldb": (0.4, "leveldb", _cuts),
    "power cuts, rocksdb": (0.15, "rocksdb", _cuts),
    "crashes at failpoints": (0.25, "leveldb", _crashes),
    "syncs that fail": (0.05, "leveldb", _errors),
    "flipped bits, leveldb": (0.1, "leveldb", _flips("leveldb")),
    "flipped bits, rocksdb": (0.05, "rocksdb", _flips("rocksdb")),
}
"""For each part its share of the time, its engine, and what it does once."""


def _seeds(rng: random.Random, until_s: float) -> Iterator[int]:
    """Give seeds, at least one, until it is late."""
    while True:
        yield rng.randrange(2**32)
        if time.monotonic() >= until_s:
            return


@pytest.mark.soak
def test_soak(tmp_path: Path, shim: Path, seed: int, report: Callable[[str], None]) -> None:
    """Nothing acknowledged is lost, and nothing wrong served, however often it is tried."""
    budget_s = float(os.environ.get("FAULT_SOAK_S", "3600"))
    rng = random.Random(seed)
    table: dict[str, Counter[str]] = {}
    wrong: list[str] = []
    for name, (share, kind, part) in PARTS.items():
        if kind == "rocksdb":
            pytest.importorskip("rocksdict")
        table[name] = figures = Counter(tried=0, operations=0, noticed=0, wrong=0)
        for run in _seeds(rng, time.monotonic() + share * budget_s):
            try:
                figures.update(_once(part, kind, Soak(tmp_path, shim, rng), run))
            except Exception as error:  # noqa: BLE001 - the other parts are tried all the same
                figures["wrong"] += 1
                wrong.append(f"{name}, seed {run}: {error}")
    _tell(table, seed, report)
    assert not wrong, "\n".join(wrong)


def _once(part: Part, kind: str, soak: Soak, seed: int) -> Counter[str]:
    folder = soak.tmp_path / f"run-{seed}"
    with ExitStack() as cleanup:
        rig = Rig(folder, soak.shim, f"--engine={kind}")
        cleanup.callback(rig.server.close)
        figures = part(Soak(folder, soak.shim, soak.rng), rig, seed)
    shutil.rmtree(folder, ignore_errors=True)  # what went wrong stays, to be looked at
    return figures


def _tell(table: dict[str, Counter[str]], seed: int, report: Callable[[str], None]) -> None:
    place = Path(os.environ.get("FAULT_TOTALS") or ROOT / ".faults" / "totals.json")
    totals = json.loads(place.read_text()) if place.exists() else {}
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    report(f"seed {seed}, commit {commit or 'unknown'}; in brackets: over all runs")
    report(f"{'':24}{'tried':>16}{'operations':>22}{'noticed':>16}{'wrong':>12}")
    for name, figures in table.items():
        total = Counter(totals.get(name, {}))
        total.update(figures)
        totals[name] = dict(total)
        cells = [f"{figures[key]} ({total[key]})" for key in ("tried", "operations", "noticed")]
        cells.append(f"{figures['wrong']} ({total['wrong']})")
        report(f"{name:24}{cells[0]:>16}{cells[1]:>22}{cells[2]:>16}{cells[3]:>12}")
    totals["runs"] = [*totals.get("runs", []), {"seed": seed, "commit": commit}]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(totals, indent=1) + "\n")
