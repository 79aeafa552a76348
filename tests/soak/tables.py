"""Figures as a table for a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from tests.soak.ledger import Ledger
from tests.soak.parts import Part

COLUMNS: Final = ("tried", "noticed", "operations", "undecided", "void", "wrong")
"""Figures with a column of their own."""

WANTED_OPERATIONS: Final = 1_000_000
"""Operations whose history is checked in an hour, over all parts."""

TOTAL: Final = "all together"


def table(
    parts: Mapping[str, Part],
    figures: Mapping[str, Mapping[str, int]],
    seconds: float,
    skipped: Mapping[str, str],
) -> str:
    """Put figures into a table.

    Args:
        parts: What was to be tried.
        figures: What was, by part; also of parts that are no more.
        seconds: In how long a time.
        skipped: Parts that could not be done, and why.
    """
    hours = max(seconds, 1.0) / 3600
    head = ["part", "tried an hour", "wanted", *COLUMNS, "lane s", "skipped"]
    rows = [head]
    total: Counter[str] = Counter()
    for name in [*parts, *(name for name in figures if name not in parts)]:
        found = Counter(figures.get(name, {}))
        total.update(found)
        wanted = parts[name].wanted if name in parts else ""
        rows.append(
            [
                name,
                _an_hour(found["tried"], hours),
                wanted,
                *(f"{found[column]:,}" for column in COLUMNS),
                f"{found['seconds']:,}",
                skipped.get(name, ""),
            ]
        )
    operations = f"{_an_hour(total['operations'], hours)} operations"
    wanted = f"{WANTED_OPERATIONS:,} an hour"
    sums = ["", *(f"{total[column]:,}" for column in COLUMNS[1:])]
    rows.append([TOTAL, operations, wanted, *sums, f"{total['seconds']:,}", ""])
    return _aligned(rows)


def _an_hour(number: int, hours: float) -> str:
    return f"{number / hours:,.0f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def covered(parts: Mapping[str, Part], ledger: Ledger) -> str:
    """Give what all runs have covered, together and at each commit."""
    content = ledger.read()
    totals, seconds = ledger.totals()
    lines = [f"All runs, {seconds / 3600:.2f} hours", table(parts, totals, seconds, {})]
    for at, figures in content["covered"].items():
        seconds = content["seconds"].get(at, 0)
        lines += [f"\nAt {at}, {seconds / 3600:.2f} hours", table(parts, figures, seconds, {})]
    lines += [
        f"WRONG at {one['commit']}: {one['part']}, seed {one['seed']}: {one['message']}"
        for one in content["wrong"]
    ]
    return "\n".join(lines)
