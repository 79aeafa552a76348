"""Bugs that the simulation must find, each planted into the real code.

`python -m tests.simulation.planted_bugs` looks for the first seed that finds each, and writes the
table in docs/simulation.md anew.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import pytest

from tests.simulation import bugs_of_disk, bugs_of_loops, bugs_of_rules, bugs_of_time
from tests.simulation.history import BrokenPromiseError
from tests.simulation.seeds import run_seeds

MAX_SEEDS: Final = 1_200
"""A planted bug must be found within so many seeds."""

PAGE: Final = Path(__file__).parents[2] / "docs" / "simulation.md"

Bug: TypeAlias = Callable[[pytest.MonkeyPatch], None]

BUGS: Final[tuple[Bug, ...]] = (
    *bugs_of_time.BUGS,
    *bugs_of_disk.BUGS,
    *bugs_of_rules.BUGS,
    *bugs_of_loops.BUGS,
)


class Found(NamedTuple):
    """The first seed that a planted bug breaks, and what it breaks there."""

    name: str
    what: str
    seed: int | None
    promise: str


def find(bug: Bug, seeds: Sequence[int]) -> Found:
    """Plant a bug, and run seeds until one finds it."""
    what = (bug.__doc__ or "").split("\n")[0]
    with pytest.MonkeyPatch.context() as monkeypatch:
        bug(monkeypatch)
        violations = run_seeds(seeds, stop_at_first=True).violations
    for seed, error in violations.items():
        if isinstance(error, BrokenPromiseError) and error.promise != "I0":
            return Found(bug.__name__, what, seed, error.promise)
        return Found(bug.__name__, what, None, f"seed {seed} failed otherwise: {error!r}")
    return Found(bug.__name__, what, None, "")


HEAD: Final = "| planted bug | what is wrong | found by seed | promise |\n|---|---|---|---|\n"


def table_row(found: Found) -> str:
    """Give a bug's row."""
    seed = "none" if found.seed is None else found.seed
    return f"| `{found.name}` | {found.what} | {seed} | {found.promise} |\n"


def known_seeds(page: str) -> dict[str, int]:
    """Read from the page which seed finds which bug."""
    rows = [line.strip("| \n").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): int(row[2]) for row in rows if len(row) == 4 and row[2].isdigit()}


def main() -> None:
    """Write the table anew; fail if a bug was not found."""
    page = PAGE.read_text(encoding="utf-8")
    start = page.index(HEAD)
    end = start + len(HEAD)
    while page.startswith("| ", end):
        end = page.index("\n", end) + 1
    found = []
    for bug in BUGS:
        found.append(find(bug, range(MAX_SEEDS)))
        print(table_row(found[-1]), end="", flush=True)
    PAGE.write_text(page[:start] + HEAD + "".join(map(table_row, found)) + page[end:], "utf-8")
    missed = [one.name for one in found if one.seed is None]
    sys.exit(f"not found within {MAX_SEEDS} seeds: {missed}" if missed else 0)


if __name__ == "__main__":
    main()
