"""Coverage-guided fuzzing: `python -m tests.hostile.fuzz TARGET --runs N --seed S`.

Each target takes bytes and lets only the documented errors out; see `fuzz_targets.py`. `run_target`
is what the tests and the soak run call: atheris ends its process, so it gets one of its own.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
TARGETS: Final = (
    "records",
    "log_ends",
    "snapshots",
    "tokens",
    "lock_table",
    "legacy",
    "wire",
    "answers",
    "frames",
    "signed_frames",
    "address_files",
    "options",
)
"""Names of all targets."""

MAX_BYTES: Final = 4_096
MAX_MEMORY_MIB: Final = 2_048
ONE_RUN_S: Final = 20
"""A single input that takes longer is a finding."""

_DONE: Final = re.compile(r"^Done (\d+) in", re.MULTILINE)


def run_target(name: str, seed: int, n_runs: int) -> Counter[str]:
    """Fuzz one target in a process of its own.

    Args:
        name: One of `TARGETS`.
        seed: Decides about all inputs.
        n_runs: How many.

    Returns:
        How many were tried.

    Raises:
        AssertionError: An input found something; has the target, the seed, the input and what
            came out.
    """
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.hostile.fuzz",
                name,
                f"--runs={n_runs}",
                f"--seed={seed}",
            ],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(_paths())},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    found = _DONE.search(done.stderr)
    # The fuzzer's timer may fire once more while the interpreter ends, when nobody catches it.
    is_well = done.returncode in {0, -signal.SIGALRM}
    assert is_well and found, (  # noqa: PT018 - one thing: it has gone through
        f"target {name}, seed {seed}, status {done.returncode}:\n{done.stdout[-4_000:]}\n"
        f"{done.stderr[-4_000:]}"
    )
    return Counter(tried=int(found[1]))


def _paths() -> list[str]:
    """Give the module path of this process, with this working copy first."""
    return [str(ROOT), *(path for path in sys.path if path)]


def _main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("target", choices=TARGETS)
    options.add_argument("--runs", type=int, default=100_000)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--file", type=Path, help="run this one input, as a finding names it")
    given = options.parse_args()

    import atheris

    with atheris.instrument_imports(include=["distlock_server", "run_once"]):
        from tests.hostile.fuzz_targets import make

    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        target = make(given.target, Path(folder))
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for number, example in enumerate(target.examples):
            (corpus / str(number)).write_bytes(example)
        if given.file is not None:
            target.run(given.file.read_bytes())
            return
        arguments = [
            sys.argv[0],
            f"-atheris_runs={given.runs}",
            f"-seed={given.seed % (2**32 - 1) or 1}",
            f"-max_len={MAX_BYTES}",
            "-len_control=0",
            f"-rss_limit_mb={MAX_MEMORY_MIB}",
            f"-timeout={ONE_RUN_S}",
            str(corpus),
        ]
        atheris.Setup(arguments, target.run)
        atheris.Fuzz()


if __name__ == "__main__":
    _main()
