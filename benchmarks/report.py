"""What a benchmark found: a table on the terminal, JSON and a picture in `results/`."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import signal
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from common import Sample
from pictures import draw

RESULTS = Path(__file__).parent / "results"
RUNS, QUICK_RUNS = 5, 1

Axis = Literal["batch", "clients", "keys", "round trip ms"]


@dataclass
class Figure:
    """One line of the table: the median, the lowest and the highest of the runs."""

    what: str
    unit: str
    median: float
    low: float
    high: float
    runs: int
    server_us: float
    how: str


@dataclass
class Target:
    """One promise, and what came of it: `got` is to be at least, or at most, `limit`."""

    what: str
    got: float
    limit: float
    at_least: bool
    unit: str

    @property
    def holds(self) -> bool:
        """Whether it is kept."""
        return self.got >= self.limit if self.at_least else self.got <= self.limit


@dataclass
class Point:
    """One point of a curve: throughput against something."""

    axis: Axis
    curve: str
    x: float
    per_s: float


@dataclass
class Report:
    """What one benchmark found.

    Attributes:
        name: Of its files in the folder of results.
        title: The question.
        quick: Only a smoke run: small, once, and no figure of it means anything.
        folder: Where JSON and pictures go.
        command: What repeats it.
        parts: What else the command line asks for.
    """

    name: str
    title: str
    quick: bool
    folder: Path
    command: str
    parts: Sequence[str] = ()
    figures: list[Figure] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def runs(self) -> int:
        """How often each side is measured."""
        return QUICK_RUNS if self.quick else RUNS

    def pick(self, full: int, quick: int) -> int:
        """Choose a size."""
        return quick if self.quick else full

    def goal_s(self, full_s: float) -> float:
        """Choose how long a run is to take, in seconds."""
        return 0.05 if self.quick else full_s

    def add(
        self, what: str, samples: Sequence[Sample], unit: str = "keys/s", how: str = ""
    ) -> None:
        """Add a line; `how` says which calls are behind it."""
        values = [sample.value for sample in samples]
        server_us = statistics.median(sample.server_us for sample in samples)
        self.figures.append(
            Figure(
                what,
                unit,
                statistics.median(values),
                min(values),
                max(values),
                len(values),
                server_us,
                how,
            )
        )

    def value(self, what: str, value: float, unit: str, how: str = "") -> None:
        """Add a line that was measured once."""
        self.add(what, [Sample(value)], unit, how)

    def point(self, axis: Axis, curve: str, x: float, samples: Sequence[Sample]) -> None:
        """Add a point to a curve."""
        median = statistics.median(sample.value for sample in samples)
        self.points.append(Point(axis, curve, x, median))

    def at_least(self, what: str, got: float, limit: float, unit: str = "x") -> None:
        """Add a promise that asks for at least so much."""
        self.targets.append(Target(what, got, limit, at_least=True, unit=unit))

    def at_most(self, what: str, got: float, limit: float, unit: str = "x") -> None:
        """Add a promise that asks for at most so much."""
        self.targets.append(Target(what, got, limit, at_least=False, unit=unit))

    def skip(self, why: str) -> None:
        """Say what is missing in this run, and why."""
        self.skipped.append(why)

    def show(self) -> None:
        """Print the tables; keep them as JSON, with a picture where there are curves."""
        print(f"\n{self.title}\n")
        header = ("what", "unit", "median", "lowest", "highest", "runs", "server us a key")
        print_table(header, [_figure_row(figure) for figure in self.figures])
        if self.targets:
            print()
            print_table(("target", "asked", "got", "holds"), [_target_row(t) for t in self.targets])
        print(f"\n`{self.command}`")
        calls: dict[str, list[str]] = {}
        for figure in self.figures:
            calls.setdefault(figure.how, []).append(figure.what)
        for how, what in calls.items():
            if how:
                print(f"- {'; '.join(what)}: {how}")
        for why in self.skipped:
            print(f"- not in this run: {why}")
        self.folder.mkdir(parents=True, exist_ok=True)
        content = asdict(self) | {"folder": str(self.folder), "machine": _machine()}
        text = json.dumps(_without_nan(content), indent=1)
        (self.folder / f"{self.name}.json").write_text(text, encoding="utf-8")
        if self.points:
            points = [asdict(point) for point in self.points]
            print(draw(points, self.folder / f"{self.name}.png", self.title))
        sys.stdout.flush()


def ratio(ours: Sequence[Sample], peer: Sequence[Sample]) -> float:
    """Give the median of the ratios of runs that were neighbours in time."""
    return statistics.median(a.value / b.value for a, b in zip(ours, peer, strict=True))


def median(samples: Sequence[Sample]) -> float:
    """Give the median of what was measured."""
    return statistics.median(sample.value for sample in samples)


def run(name: str, title: str, measure: Callable[[Report], None]) -> None:
    """Be the command: read the options, measure, show."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--quick", action="store_true", help="a smoke run, without meaning")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where JSON and pictures go")
    parser.add_argument("parts", nargs="*", help="only these parts, where the benchmark has some")
    args = parser.parse_args()
    options = " ".join(["--quick"] * args.quick + args.parts)
    command = f"python benchmarks/{name}.py {options}".strip()
    report = Report(name, title, args.quick, args.results, command, args.parts)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # servers end with their `with`
    measure(report)
    report.show()


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, the columns as wide as they need be."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for number, line in enumerate(lines):
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print(f"| {' | '.join(cells)} |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def number(value: float) -> str:
    """Write a number with about three digits that count."""
    if math.isnan(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _figure_row(figure: Figure) -> tuple[str, ...]:
    numbers = (figure.median, figure.low, figure.high)
    return (
        figure.what,
        figure.unit,
        *(number(value) for value in numbers),
        str(figure.runs),
        number(figure.server_us),
    )


def _target_row(target: Target) -> tuple[str, ...]:
    asked = f"{'>=' if target.at_least else '<='} {number(target.limit)} {target.unit}"
    got = f"{number(target.got)} {target.unit}"
    return (target.what, asked, got, "yes" if target.holds else "NO")


def _machine() -> dict[str, object]:
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
    }


def _without_nan(content: object) -> object:
    """JSON has no nan."""
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content
