"""The simulation finds bugs: each of those that are planted, by the seed that the page names."""

from __future__ import annotations

import pytest

from tests.simulation.planted_bugs import BUGS, MAX_SEEDS, PAGE, Bug, find, known_seeds


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_planted_bug_is_found(bug: Bug) -> None:
    """A planted bug breaks a promise: in the seed that is known for it, or in one of the first."""
    known = known_seeds(PAGE.read_text(encoding="utf-8"))[bug.__name__]
    found = find(bug, [known, *range(MAX_SEEDS)])
    assert found.seed is not None, found.promise


def test_every_row_is_a_planted_bug() -> None:
    """The table names no bug that is not planted any more."""
    known = known_seeds(PAGE.read_text(encoding="utf-8"))
    assert list(known) == [bug.__name__ for bug in BUGS]
