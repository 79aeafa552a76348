"""The runner of `make soak`: bounded, all parts, figures that add up, failures with their seeds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Final

import pytest

from tests.other_client import until
from tests.soak.ledger import ROOT, Ledger
from tests.soak.parts import PARTS, Part
from tests.soak.runner import Soak
from tests.soak.slices import run_slice
from tests.soak.tables import covered, table

QUICK: Final = "syncs that fail"


def _seeds(folder: Path, seed: int) -> Counter[str]:
    return Counter(tried=1, operations=seed)


def test_ledger_adds_up(tmp_path: Path) -> None:
    """Figures of all runs are added by commit and part, and in total; what was wrong stays."""
    place = tmp_path / "new" / "covered.json"
    for at, number in (("one", 1), ("one", 2), ("two", 3)):
        Ledger(place).add(at, "cuts", {"tried": number, "wrong": 0})
        Ledger(place).add_seconds(at, 1800)
    Ledger(place).add_wrong("two", "cuts", 7, "lost")
    content = Ledger(place).read()
    assert content["covered"] == {"one": {"cuts": {"tried": 3}}, "two": {"cuts": {"tried": 3}}}
    assert content["wrong"] == [{"commit": "two", "part": "cuts", "seed": 7, "message": "lost"}]
    totals, seconds = Ledger(place).totals()
    assert (totals["cuts"]["tried"], seconds) == (6, 5400)
    shown = covered({"cuts": Part(_seeds, 1, "10")}, Ledger(place))
    assert "WRONG at two: cuts, seed 7: lost" in shown
    assert [line.split()[:4] for line in shown.splitlines() if line.startswith("cuts")] == [
        ["cuts", "4", "10", "6"],
        ["cuts", "3", "10", "3"],
        ["cuts", "6", "10", "3"],
    ]


def test_ledger_of_runs_side_by_side(tmp_path: Path) -> None:
    """Two runs that write at the same time lose nothing of each other."""
    code = (
        "import sys; from pathlib import Path; from tests.soak.ledger import Ledger\n"
        "for _ in range(100): Ledger(Path(sys.argv[1])).add('one', 'cuts', {'tried': 1})"
    )
    place = tmp_path / "covered.json"
    command = [sys.executable, "-c", code, str(place)]
    runs = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [run.wait(60) for run in runs] == [0, 0]
    assert Ledger(place).totals()[0]["cuts"]["tried"] == 200


def test_slice_tells_what_went_wrong(tmp_path: Path) -> None:
    """A slice gives its figures, why it cannot be done, or what it found wrong."""

    def wrong(folder: Path, seed: int) -> Counter[str]:
        raise AssertionError(f"lost with {seed}")

    def skipped(folder: Path, seed: int) -> Counter[str]:
        pytest.skip("no compiler")

    assert run_slice(Part(_seeds, 1), 5, tmp_path) == {"figures": {"tried": 1, "operations": 5}}
    assert run_slice(Part(wrong, 1), 5, tmp_path)["wrong"] == "AssertionError: lost with 5"
    assert run_slice(Part(skipped, 1), 5, tmp_path) == {"figures": {}, "skipped": "no compiler"}


class _Scripted(Soak):
    """A run whose slices are small programs."""

    script = ""

    def _command(self, name: str, seed: int, folder: Path) -> list[str]:
        return [sys.executable, "-c", f"{PRELUDE}\n{self.script}", name, str(seed), str(folder)]


PRELUDE: Final = """
import json, pathlib, sys, time
name, seed, folder = sys.argv[1:]
def say(**said): (pathlib.Path(folder) / "figures.json").write_text(json.dumps(said))
"""


def _run(script: str, parts: dict[str, Part], place: Path, for_s: float) -> tuple[Soak, list[str]]:
    lines: list[str] = []
    folder = place.parent / "slices"
    folder.mkdir()
    soak = _Scripted(parts, Ledger(place), 1, for_s, folder, say=lines.append)
    soak.script = script
    soak.run()
    return soak, lines


def test_failing_part_is_named_with_its_seed(tmp_path: Path) -> None:
    """A slice that fails or dies is told with its seed, and kept; the others go on."""
    script = """
if name == "bad": say(figures={}, wrong="lost")
elif name == "dead": sys.exit("died")
else: say(figures={"tried": 2})
"""
    parts = {name: Part(_seeds, 0) for name in ("bad", "dead", "good")}
    soak, lines = _run(script, parts, tmp_path / "covered.json", 60)
    assert soak.figures["good"] == {
        "tried": 2,
        "slices": 1,
        "seconds": soak.figures["good"]["seconds"],
    }
    assert len(soak.wrong) == 2
    kept = Ledger(tmp_path / "covered.json").read()["wrong"]
    assert {(one["part"], one["message"].split(":")[0]) for one in kept} == {
        ("bad", "lost"),
        ("dead", "ended with status 1 after 0 s"),
    }
    told = "\n".join(lines)
    for one in kept:
        assert f"{one['part']}, seed {one['seed']}, kept in " in told
        folder = tmp_path / "slices" / f"{one['part']}-{one['seed']}"
        assert (folder / "output").exists()
    assert not list((tmp_path / "slices").glob("good-*"))


def test_time_is_bounded(tmp_path: Path) -> None:
    """No slice begins when the time is over, and one that hangs is ended at its limit, and wrong.

    Every part has its turn before any has a second.
    """
    script = """
if name == "hangs": time.sleep(600)
say(figures={"tried": 1})
"""
    parts = {
        "heavy": Part(_seeds, 1_000, expected_s=0.1),
        "light": Part(_seeds, 0.001, expected_s=0.1),
        "hangs": Part(_seeds, 1, limit_s=1.0),
        "twice": Part(_seeds, 0, times_an_hour=1_800, expected_s=0.1),
        "long runs only": Part(_seeds, 0, min_run_s=3_600),
    }
    began_s = time.monotonic()
    soak, _ = _run(script, parts, tmp_path / "covered.json", 4.0)
    assert time.monotonic() - began_s < 30
    tried = {name: figures["tried"] for name, figures in soak.figures.items()}
    assert tried["heavy"] > tried["light"] >= 1
    assert (tried["twice"], tried["long runs only"], tried["hangs"]) == (2, 0, 0)
    assert all("hangs" in wrong and "status -9" in wrong for wrong in soak.wrong)
    assert soak.wrong


def test_interrupted_run_tells_its_table(tmp_path: Path) -> None:
    """The command runs real slices; a signal ends it with its table, and the figures are kept."""
    place = tmp_path / "covered.json"
    environment = {**os.environ, "SOAK_PARTS": QUICK, "SOAK_LEDGER": str(place), "SOAK_SEED": "3"}
    run = subprocess.Popen(
        [sys.executable, "-m", "tests.soak"],
        cwd=ROOT,
        env={**environment, "SOAK_S": "600"},
        stdout=subprocess.PIPE,
        text=True,
    )
    until(
        lambda: run.poll() is not None or (place.exists() and bool(Ledger(place).totals()[0])), 90
    )
    run.send_signal(signal.SIGTERM)
    told, _ = run.communicate(timeout=60)
    assert run.returncode == 0, told
    figures = json.loads(place.read_text())["covered"]
    ((_, of_commit),) = figures.items()
    if of_commit[QUICK].get("skipped"):
        pytest.skip("the fault cannot be made here")
    assert of_commit[QUICK]["tried"] >= 4
    assert "This run: seed 3, commit " in told
    assert "All runs, " in told


def test_table_shows_what_is_wanted() -> None:
    """Each part has its line, with what an hour must reach; operations are summed up."""
    lines = table(PARTS, {"linearizability": {"operations": 500}}, 1800, {}).splitlines()
    assert len(lines) == len(PARTS) + 2
    assert "1,000 operations 1,000,000 an hour" in " ".join(lines[-1].split())
