"""Each benchmark runs, in small, and says what it found. Its figures mean nothing here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
BENCHMARKS: Final = ROOT / "benchmarks"
SCRIPTS: Final = sorted(
    path.stem for path in BENCHMARKS.glob("*.py") if "def measure(" in path.read_text()
)
LIMIT_S: Final = 100.0
HAS_PICTURES: Final = importlib.util.find_spec("matplotlib") is not None

pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="benchmarks are not installed")


@pytest.mark.parametrize("script", SCRIPTS)
def test_quick_run(script: str, tmp_path: Path) -> None:
    """A quick run prints a table, keeps every figure as JSON, and draws its curves if it can."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(["proto", ".", *sys.path])}
    command = [sys.executable, f"benchmarks/{script}.py", "--quick", f"--results={tmp_path}"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / f"{script}.json").read_text(encoding="utf-8"))
    assert found["figures"]
    for figure in found["figures"]:
        assert f"| {figure['what']} " in done.stdout
        assert figure["median"] is not None, figure
    for target in found["targets"]:
        assert f"| {target['what']} " in done.stdout
        assert target["got"] is not None, target
    assert found["command"] in done.stdout
    assert (tmp_path / f"{script}.png").exists() == bool(found["points"] and HAS_PICTURES)


def test_bench_runs_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make bench` leaves none out."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("bench_run", BENCHMARKS / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert sorted(module.SCRIPTS) == SCRIPTS


def test_bulk_database_is_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bulk-loaded database passes the server's own check, and counts what it holds."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bulk = importlib.import_module("bulk")
    count = bulk.PIECE + 7
    bulk.fill(tmp_path / "db", count)
    checked = subprocess.run(
        [sys.executable, "-m", "distlock_server", "check", f"--db={tmp_path / 'db'}"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{count}" in checked.stdout.replace(",", ""), checked.stdout
