"""The program whose values are of its own classes; tests start it twice, as users would.

python tests/class_script.py --n-jobs 2 --run first

Prints a JSON object: for each kind of value whether its class is the script's own and whether it
equals a fresh one; how many calls were computed; and an attribute of a class, as this run set it.
"""

from __future__ import annotations

import argparse
import json
from collections import namedtuple
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

import joblib

import run_once


@dataclass
class Result:
    """A dataclass, with an attribute of the class."""

    number: int
    parts: list[Any] = field(default_factory=list)
    run = "unset"


@dataclass
class Better(Result):
    """Derives from another class of the script."""


class Color(Enum):
    """Has members."""

    RED = 1
    GREEN = "green"


Pair = namedtuple("Pair", "left right")  # noqa: PYI024 (the other kind does not reach workers with cloudpickle 2.2)


class Outer:
    """Holds classes, one of them with a name that occurs twice."""

    class Inner(Result):
        """Has a method."""

        def doubled(self) -> int:
            """Double it."""
            return 2 * self.number

    class Bare(Result):
        """Has none."""

    class Color(Enum):
        """Not the other one."""

        RED = 1


class Slotted:
    """Has slots."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slotted) and other.number == self.number

    __hash__ = None  # type: ignore[assignment]  # as that of a class with __eq__ alone


def make(kind: str) -> Any:
    """Make a value."""
    values = {
        "dataclass": Result(1, [Color.GREEN]),
        "derived": Better(2),
        "enum": Color.RED,
        "namedtuple": Pair(1, 2),
        "nested": Outer.Inner(4),
        "nested bare": Outer.Bare(5),
        "nested enum": Outer.Color.RED,
        "slots": Slotted(6),
        "a class": Result,
    }
    return values[kind]


KINDS: Final = (
    "dataclass",
    "derived",
    "enum",
    "namedtuple",
    "nested",
    "nested bare",
    "nested enum",
    "slots",
    "a class",
)


NOT_TO_WORKERS: Final = {"slots"}
"""cloudpickle does not bring them to a worker as they are, so that plain joblib fails, too."""


def main() -> None:
    """Run, and print what came out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--n-jobs", type=int, required=True)
    parser.add_argument("--run", required=True)
    options = parser.parse_args()
    Result.run = options.run
    with joblib.parallel_config("run_once", n_jobs=options.n_jobs):
        kinds = [kind for kind in KINDS if options.n_jobs == 1 or kind not in NOT_TO_WORKERS]
        values = joblib.Parallel()(joblib.delayed(make)(kind) for kind in kinds)
    report = run_once.last_report()
    assert report is not None
    found: dict[str, Any] = {
        kind: [type(value) is type(make(kind)), value == make(kind)]
        for kind, value in zip(kinds, values, strict=True)
    }
    print(json.dumps({**found, "computed": report.computed, "run": Result.run}))  # noqa: T201 (a test reads it)


if __name__ == "__main__":
    main()
