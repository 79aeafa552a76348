"""The parts of a soak run: what each does in one slice, its share of the time, what is wanted.

A slice is a function of a folder of its own and a seed; it gives figures (`tables.COLUMNS` names
those that are shown) and raises whatever it finds wrong. Each runs in a process of its own.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import pytest

from tests.faults.batches import check_batches
from tests.faults.crashes import Rig, check_next_life, crash_at
from tests.faults.power import build_shim
from tests.faults.process_faults import SCENARIOS
from tests.faults.test_corruption import Written, flip_often
from tests.faults.test_failpoints import PROFILES as CRASH_PROFILES
from tests.faults.test_failpoints import UNDER_LOAD
from tests.faults.test_power_cuts import fail_sync, run_cuts
from tests.hostile import fuzz
from tests.hostile.requests import run_hostile
from tests.load.load import run_load
from tests.servers import ServerProcess
from tests.simulation.planted_bugs import BUGS, MAX_SEEDS, PAGE, find, known_seeds
from tests.simulation.seeds import run_seeds
from tests.simulation.test_simulation import require_kept

ROOT: Final = Path(__file__).parents[2]

N_SEEDS: Final = 250
N_CUTS: Final = 8
N_CRASHES: Final = 8
N_ERRORS: Final = 4
N_FLIPS: Final = 200
N_BATCHED: Final = 150_000
N_HOSTILE: Final = 2_500
N_FUZZED: Final = 8_000

Run: TypeAlias = Callable[[Path, int], Counter[str]]


class Part(NamedTuple):
    """What is tried.

    Attributes:
        run: Does one slice.
        share: Of the time of both lanes, in proportion to the others; 0: done so many times only.
        wanted: What an hour must reach, in words.
        times_an_hour: Without a share: slices in each hour; 0: one in the whole run.
        expected_s: How long a slice takes, until one was seen.
        limit_s: A slice that takes longer is ended, and is wrong.
        min_run_s: Runs that are shorter leave it out.
    """

    run: Run
    share: float
    wanted: str = ""
    times_an_hour: int = 0
    expected_s: float = 20.0
    limit_s: float = 300.0
    min_run_s: float = 0.0

    def times(self, for_s: float) -> int:
        """Give how many slices a part without a share has in a run of that length."""
        return max(1, round(self.times_an_hour * for_s / 3600))


# -- simulation ----------------------------------------------------------------------------------


def simulate(folder: Path, seed: int) -> Counter[str]:
    """Run simulated seeds that no run had before, but for a rare chance."""
    tally = run_seeds(range(seed * N_SEEDS, (seed + 1) * N_SEEDS))
    require_kept(tally)
    return Counter(tried=tally.seeds, void=len(tally.void), events=tally.events)


def plant_bugs(folder: Path, seed: int) -> Counter[str]:
    """Plant each bug, and find it."""
    known = known_seeds(PAGE.read_text(encoding="utf-8"))
    for bug in BUGS:
        found = find(bug, [known[bug.__name__], *range(MAX_SEEDS)])
        assert found.seed is not None, f"{found.name} was not found: {found.promise}"
    return Counter(tried=len(BUGS), noticed=len(BUGS))


# -- faults --------------------------------------------------------------------------------------


def with_rig(
    kind: str, run: Callable[[Rig, int], Counter[str]], folder: Path, seed: int
) -> Counter[str]:
    """Do something with a server whose power can be cut."""
    if kind == "rocksdb":
        pytest.importorskip("rocksdict")
    rig = Rig(folder, build_shim(folder), f"--engine={kind}")
    with ExitStack() as cleanup:
        cleanup.callback(rig.server.close)
        return run(rig, seed)


def cut(rig: Rig, seed: int) -> Counter[str]:
    """Cut the power."""
    figures = run_cuts(rig, seed, N_CUTS)
    return Counter(tried=figures.n_cuts, operations=figures.n_ops, noticed=figures.n_dropped)


def crash(rig: Rig, seed: int) -> Counter[str]:
    """Crash between any two steps."""
    rng = random.Random(seed)
    n_ops = 0
    for point in rng.sample(UNDER_LOAD, N_CRASHES):
        number = rng.randint(1, 6) if point.startswith("upload.") else rng.randint(12, 120)
        n_ops += crash_at(rig, point, number, rng.choice(list(CRASH_PROFILES.values())), rng)
    check_next_life(rig)
    return Counter(tried=N_CRASHES, operations=n_ops, noticed=N_CRASHES)


def fail_syncs(rig: Rig, seed: int) -> Counter[str]:
    """Let syncs fail."""
    rng = random.Random(seed)
    n_ops = sum(fail_sync(rig, rng) for _ in range(N_ERRORS))
    return Counter(tried=N_ERRORS, operations=n_ops, noticed=N_ERRORS)


def flip_bits(kind: str, folder: Path, seed: int) -> Counter[str]:
    """Flip bits of a database."""
    pytest.importorskip("plyvel" if kind == "leveldb" else "rocksdict")
    rng = random.Random(seed)
    outcomes = flip_often(Written(folder, kind, rng), folder, rng, N_FLIPS)
    noticed = outcomes["noticed"] + outcomes["does not open"]
    assert noticed > N_FLIPS // 8, f"hardly any flip was noticed: {dict(outcomes)}"
    return Counter(tried=N_FLIPS, noticed=noticed)


def disturb(folder: Path, seed: int) -> Counter[str]:
    """Stop, cut off, deceive and fork processes; what cannot be done here does not count."""
    figures: Counter[str] = Counter()
    for place, (name, scenario) in enumerate(SCENARIOS.items()):
        with ExitStack() as cleanup:
            (own := folder / str(place)).mkdir()
            try:
                scenario(own, cleanup, random.Random(f"{name} {seed}"))
            except pytest.skip.Exception:
                figures["skipped"] += 1
                continue
            except Exception as error:
                raise AssertionError(f"{name}: {error}") from error
            figures["tried"] += 1
    return figures


def linearize(folder: Path, seed: int) -> Counter[str]:
    """Check the history of very many operations."""
    server = ServerProcess(folder / "server")
    with ExitStack() as cleanup:
        cleanup.callback(server.close)
        server.start()
        checked = check_batches(server.address, seed, N_BATCHED, folder / "history")
    return Counter(tried=1, operations=checked.n_ops, undecided=checked.n_undecided)


# -- input from outside, and load ----------------------------------------------------------------


def be_hostile(folder: Path, seed: int) -> Counter[str]:
    """Send hostile requests."""
    return run_hostile(folder, seed, N_HOSTILE)


def fuzz_all(folder: Path, seed: int) -> Counter[str]:
    """Fuzz each target."""
    figures: Counter[str] = Counter()
    for name in fuzz.TARGETS:
        figures.update(fuzz.run_target(name, seed % 2**31, N_FUZZED))
    return figures


def load(folder: Path, seed: int) -> Counter[str]:
    """Load a server with a thousand connections, slow syncs and large requests."""
    return run_load(folder, build_shim(folder), seed)


# -- suites --------------------------------------------------------------------------------------


def suite(arguments: Sequence[str], folder: Path, seed: int) -> Counter[str]:
    """Run tests as they are; each that passed counts."""
    options = ["-q", "-p", "no:cacheprovider", f"--basetemp={folder / 'pytest'}"]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3_000:] + done.stderr[-1_000:]
    last = done.stdout.strip().splitlines()[-1]
    counted = {what: int(number) for number, what in re.findall(r"(\d+) (passed|skipped)", last)}
    return Counter(tried=counted["passed"], skipped=counted.get("skipped", 0))


SECURITY: Final = (
    "tests/integration/test_security_2021.py",
    "tests/integration/test_security_command.py",
    "tests/integration/test_security_tls.py",
    "tests/integration/test_security_tokens.py",
    "tests/unit/test_access.py",
    "tests/unit/test_auth.py",
    "tests/unit/test_result_frames.py",
    "tests/unit/test_result_pickles.py",
    "tests/unit/test_results.py",
    "tests/unit/test_secret.py",
    "tests/unit/test_security.py",
)
SLOW: Final = ("-m", "soak", "--timeout=0", "-o", "faulthandler_timeout=0")


def slow_suite(name: str, limit_s: float, min_run_s: float) -> Part:
    """Give the part for the slow tests of a file; a short run has no room for them."""
    run = partial(suite, (f"tests/integration/{name}", *SLOW))
    return Part(run, 0, "once", expected_s=limit_s / 2, limit_s=limit_s, min_run_s=min_run_s)


PARTS: Final[dict[str, Part]] = {
    "simulated seeds": Part(simulate, 36, "30,000"),
    "power cuts leveldb": Part(partial(with_rig, "leveldb", cut), 12, "600 with rocksdb"),
    "power cuts rocksdb": Part(partial(with_rig, "rocksdb", cut), 3),
    "crashes at failpoints": Part(partial(with_rig, "leveldb", crash), 2),
    "syncs that fail": Part(partial(with_rig, "leveldb", fail_syncs), 1),
    "flipped bits leveldb": Part(partial(flip_bits, "leveldb"), 3, "5,000 with rocksdb"),
    "flipped bits rocksdb": Part(partial(flip_bits, "rocksdb"), 1),
    "pauses and partitions": Part(disturb, 5, "120"),
    "linearizability": Part(linearize, 2),
    "hostile requests": Part(be_hostile, 28, "100,000"),
    "fuzzing": Part(fuzz_all, 15, "1,000,000", limit_s=900.0),
    "load": Part(load, 2),
    "planted bugs": Part(plant_bugs, 0, "all", times_an_hour=1),
    "security matrix": Part(partial(suite, SECURITY), 0, "every cell", times_an_hour=1),
    "joblib's own tests": slow_suite("test_joblib_suite.py", 1_800, 3_600),
    "other joblibs": slow_suite("test_joblib_versions.py", 3_600, 7_200),
    "long examples": slow_suite("test_examples.py", 1_800, 3_600),
}
"""All parts; one line each. Those without a share are done so many times only.

The shares are such that two cores that others load as well reach what is wanted of an hour.
"""
