"""What the benchmarks count as hoarded, wasted and ideal."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="benchmarks are not installed")


def _script(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


def _worker(items: list[Any], claims: list[Any], freed: list[Any] | None = None) -> dict[str, Any]:
    """Make a report as `traced.py` does, of a worker that was there from 0 to 10."""
    return {"items": items, "claims": claims, "freed": freed or [], "began": 0.0, "ended": 10.0}


STORED_B = "\x1ens\x1fb"
"""Claims name keys as stored, items as the user wrote them."""


@pytest.mark.parametrize(
    ("freed", "hoarded_s"),
    [([], 1.5), ([[1.7, [STORED_B]]], 0.2), ([[0.5, [STORED_B]]], 1.5)],
    ids=["kept", "given back", "given back before"],
)
def test_hoarded(freed: list[Any], hoarded_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key is hoarded from its grant to its start or release, while another worker is idle."""
    makespan = _script("makespan", monkeypatch)
    claims = [[0.9, 1.0, ["\x1ens\x1fa", STORED_B]]]
    holder = _worker([["a", 1.0, 3.0], ["b", 3.0, 4.0]], claims, freed)
    other = _worker([["c", 0.0, 1.5]], [[0.0, 0.0, ["c"]]])
    assert makespan.hoarded_s([holder, other]) == pytest.approx(hoarded_s)


def test_nobody_hoards_while_all_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that waits while every other worker has a body to run is not hoarded."""
    makespan = _script("makespan", monkeypatch)
    holder = _worker([["a", 0.0, 3.0], ["b", 3.0, 4.0]], [[0.0, 0.0, ["a", "b"]]])
    other = _worker([["c", 0.0, 4.0]], [[0.0, 0.0, ["c"]]])
    assert makespan.hoarded_s([holder, other]) == 0


def test_wasted_and_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wasted is a request without a grant that was sent before the last grant to anybody."""
    spread = _script("spread", monkeypatch)
    one = _worker(
        [["a", 1, 1], ["b", 2, 2]],
        [[0, 1, ["a"]], [1, 2, ["b"]], [9, 9, []]],  # the end
    )
    two = _worker([["a", 3, 3]], [[0.5, 1.5, []], [2, 3, ["a"]]])
    found = spread.judge([one, two], 2)
    assert (found.requests, found.wasted, found.twice) == (5, 1, 1)
    assert found.keys_s == pytest.approx(2 / 10)
    with pytest.raises(SystemExit, match="1 keys were not handed out"):
        spread.judge([one, two], 3)


def test_ideal(monkeypatch: pytest.MonkeyPatch) -> None:
    """List scheduling: whoever is free first takes the next key of the list."""
    makespan = _script("makespan", monkeypatch)
    assert makespan.ideal_s([3.0, 1.0, 1.0, 2.0], 2) == pytest.approx(4.0)
    lengths = makespan.lengths(50, 1)
    assert sum(lengths) / 50 == pytest.approx(makespan.MEAN_S)
