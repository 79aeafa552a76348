"""Pictures of throughput against batch, clients, keys and round trip.

python benchmarks/pictures.py [FOLDER]      # one picture of all results in a folder
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OVERVIEW = "throughput.png"
COLUMNS = 2
LINEAR = frozenset({"round trip ms"})


def draw(points: Sequence[dict[str, Any]], path: Path, title: str) -> str:
    """Draw one panel for each axis.

    Args:
        points: Of curves: `axis`, `curve`, `x`, `per_s`.
        path: Where the picture goes.
        title: What stands above it.

    Returns:
        A sentence on where it is, or why it is not.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return "No picture: it needs matplotlib (pip install 'run-once[bench]')."
    from matplotlib.figure import Figure  # noqa: PLC0415 - only where it is installed

    axes = list(dict.fromkeys(point["axis"] for point in points))
    columns = min(len(axes), COLUMNS)
    rows = -(-len(axes) // COLUMNS)
    figure = Figure(figsize=(6 * columns, 4.5 * rows), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, axis in zip(panels, axes, strict=False):
        curves: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        for point in points:
            if point["axis"] == axis:
                curves[point["curve"]].append((point["x"], point["per_s"]))
        for name, curve in curves.items():
            xs, ys = zip(*sorted(curve), strict=True)
            panel.plot(xs, ys, marker="o", label=name)
        panel.set(xlabel=axis, ylabel="keys/s", yscale="log")
        panel.set_xscale("linear" if axis in LINEAR else "log")
        panel.grid(visible=True, which="both", alpha=0.3)
        panel.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    return f"Picture: {path}"


def overview(folder: Path) -> str:
    """Draw the curves of all results in a folder."""
    points: list[dict[str, Any]] = []
    for file in sorted(folder.glob("*.json")):
        points += json.loads(file.read_text(encoding="utf-8")).get("points", [])
    if not points:
        return "No picture: no result in this folder has a curve."
    return draw(points, folder / OVERVIEW, "Throughput")


if __name__ == "__main__":
    default = Path(__file__).parent / "results"
    print(overview(Path(sys.argv[1]) if len(sys.argv) > 1 else default))
